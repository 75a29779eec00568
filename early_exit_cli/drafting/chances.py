"""How likely drafts survive, by drafter: what calibration found, in the bundle's record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from early_exit_cli.bundle.files import RECORD_FILE, read_bundle_record
from early_exit_cli.drafting.suffix_automaton import PRIOR, SHORTEST
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import write_json
from early_exit_cli.files.schemas import DraftingForm, require_form


@dataclass(frozen=True)
class Survival:
    """P(the backbone agrees | entropy H, it agreed so far) = sigmoid(intercept + slope H) at one draft position.

    mean: the same without knowing the entropy. entropies: some entropies (nats) that stand for those to be met, equally
    many for each; none where calibration has not kept them.
    """

    intercept: float
    slope: float
    mean: float
    entropies: tuple[float, ...] = ()

    def at(self, uncertainty: float) -> float:
        return 1 / (1 + math.exp(min(-(self.intercept + self.slope * uncertainty), 700.0)))


@dataclass(frozen=True)
class DraftChances:
    """What drafts are worth.

    lookup: P(next token right) by kind of match (`lookup.SHORTEST`). eagle: by draft position, empty without such a
    head. checked: for each of these, on a second text: the share that agreed, and the share that was expected to.
    exit_temperature, eagle_temperature: of sampled drafts, times the text's own.
    """

    lookup: list[float]
    eagle: list[Survival]
    checked: list[tuple[float, float]]
    exit_temperature: float = 1.0
    eagle_temperature: float = 1.0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def draft_chances_of(record: dict[str, Any]) -> DraftChances:
    """The policy in a bundle's record; a default one where it was not calibrated.

    Raises:
        BundleError: damaged.
    """
    found = record.get("drafting")
    if found is None:
        return DraftChances(list(PRIOR), [], [])
    require_form(found, DraftingForm, "the bundle's drafting record is damaged")
    if len(found["lookup"]) != len(SHORTEST):
        raise BundleError(
            f"the bundle's drafting record is damaged: {len(found['lookup'])} chances for {len(SHORTEST)} kinds of match",
            hint="make it again with eexit calibrate",
        )
    return DraftChances(
        found["lookup"],
        [_survival(entry) for entry in found["eagle"]],
        [(agreed, expected) for agreed, expected in found["checked"]],
        *(found.get(f"{kind}_temperature", 1.0) for kind in ("exit", "eagle")),
    )


def _survival(entry: dict[str, Any]) -> Survival:
    entropies = tuple(entry.get("entropies", ()))
    return Survival(entry["intercept"], entry["slope"], entry["mean"], entropies)


def save_draft_chances(chances: DraftChances, folder: Path) -> None:
    """Into the bundle's eexit.json."""
    record = read_bundle_record(folder)
    record["drafting"] = chances.record()
    write_json(folder / RECORD_FILE, record)
