"""How likely drafts survive, by drafter: what calibration found, in the bundle's record.

What it found of the MTP layer or the assistant, which belong to the backbone and to no bundle, is kept beside what passes
cost here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import Field, Strict

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.bundle.files import RECORD_FILE, read_bundle_record, record_json
from early_exit_cli.drafting.suffix_automaton import PRIOR, SHORTEST
from early_exit_cli.engine import OwnHead
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import write_json
from early_exit_cli.files.forms import Form, Share
from early_exit_cli.files.kept import MADE_FROM
from early_exit_cli.files.schemas import RecordForm, read_form, require_form
from early_exit_cli.runtime.measurements import measurement_path


class Survival(Form):
    """P(the backbone agrees | entropy H, it agreed so far) = sigmoid(intercept + slope H) at one draft position.

    mean: the same without knowing the entropy. entropies: some entropies (nats) that stand for those to be met, equally
    many for each; none where calibration has not kept them.
    """

    intercept: float = Field(ge=-1e6, le=1e6)
    slope: float = Field(ge=-1e6, le=1e6)
    mean: Share
    entropies: Annotated[tuple[Annotated[float, Field(ge=0.0, le=1e3)], ...], Strict(False)] = Field(
        default=(), max_length=64
    )

    def at(self, uncertainty: float) -> float:
        return 1 / (1 + math.exp(min(-(self.intercept + self.slope * uncertainty), 700.0)))


MTP_PRIOR = [
    Survival(intercept=intercept, slope=-1.2, mean=mean, entropies=(0.0, 0.05, 0.2, 0.6, 1.2, 2.5))
    for intercept, mean in ((2.4, 0.8), (2.0, 0.75), (1.7, 0.7))
]
"""Of an MTP layer or an assistant that was not calibrated, as such are reported to do; the text soon tells of this one."""


class MtpChances(Form):
    """Of an MTP layer or an assistant: by draft position, and what a second text says of it, as in `DraftChances`."""

    survival: list[Survival] = Field(min_length=1)
    checked: list[Annotated[tuple[Share, Share], Strict(False)]]


def mtp_survival(backbone: Backbone, head: OwnHead | None = None) -> list[Survival]:
    """What calibration on this machine found of a backbone's own drafter; else a prior.

    Args:
        head: the drafter; by default the layer that the checkpoint brings.
    """
    try:
        return read_form(_mtp_path(backbone, head), MtpChances).survival
    except BundleError:  # nothing there, or damaged
        return MTP_PRIOR


def save_mtp_chances(chances: MtpChances, backbone: Backbone, head: OwnHead | None = None) -> Path:
    """Keep them for the next time; where."""
    path = _mtp_path(backbone, head)
    write_json(path, {MADE_FROM: backbone.name, **chances.model_dump()})
    return path


def _mtp_path(backbone: Backbone, head: OwnHead | None) -> Path:
    return measurement_path("chances", {**backbone.identity, **({} if head is None else head.identity)})


class DraftChances(Form):
    """What drafts are worth.

    lookup: P(next token right) by kind of match (`lookup.SHORTEST`). eagle: by draft position, empty without such a
    head. checked: for each of these, on a second text: the share that agreed, and the share that was expected to.
    exit_temperature, eagle_temperature: of sampled drafts, times the text's own.
    """

    lookup: list[Share]
    eagle: list[Survival]
    checked: list[Annotated[tuple[Share, Share], Strict(False)]]  # JSON has lists only
    exit_temperature: float = Field(gt=0.0, default=1.0)
    eagle_temperature: float = Field(gt=0.0, default=1.0)


def draft_chances_of(record: RecordForm | None) -> DraftChances:
    """The chances in a bundle's record; default ones where it was not calibrated.

    Raises:
        BundleError: damaged.
    """
    if record is None or record.drafting is None:
        return DraftChances(lookup=list(PRIOR), eagle=[], checked=[])
    found = require_form(record.drafting, DraftChances, "the bundle's drafting record is damaged")
    if len(found.lookup) != len(SHORTEST):
        raise BundleError(
            f"the bundle's drafting record is damaged: {len(found.lookup)} chances for {len(SHORTEST)} kinds of match",
            hint="make it again with eexit calibrate",
        )
    return found


def save_draft_chances(chances: DraftChances, folder: Path) -> None:
    """Into the bundle's eexit.json."""
    read_bundle_record(folder)  # refuse a damaged one
    path = folder / RECORD_FILE
    write_json(path, {**record_json(path), "drafting": chances.model_dump()})
