"""What a checkpoint of draft heads is, by its config.json: what `eexit import` takes, and what it names and refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from early_exit_cli.bundle.files import CONFIG_FILE
from early_exit_cli.errors import BundleError, shown
from early_exit_cli.files.atomic import read_json


@dataclass(frozen=True)
class Kind:
    """words: what it is, to people. is_supported: whether it can be imported."""

    words: str
    is_supported: bool = False


SAFEAILAB = Kind("an EAGLE-3 head in SafeAILab's layout", True)
SPECULATORS = Kind("an EAGLE-3 head in speculators' layout", True)
EAGLE = Kind("an EAGLE-1 or EAGLE-2 head, which reads the last block's state alone")
MEDUSA = Kind("a set of Medusa heads")
HYDRA = Kind("a set of Hydra heads")
WHOLE_MODEL = Kind("a whole model")


def kind_of_checkpoint(settings: Mapping[str, Any]) -> Kind | None:
    """None where config.json says nothing that is known here."""
    told = settings.get("speculators_model_type")
    if told is not None:
        return SPECULATORS if told == "eagle3" else Kind(f"a head of speculators' type {shown(told)}, not eagle3")
    architectures = str(settings.get("architectures") or "").lower()
    if "medusa_num_heads" in settings or "medusa" in architectures:
        return MEDUSA
    if "hydra_num_heads" in settings or "hydra" in architectures:
        return HYDRA
    if "draft_vocab_size" in settings or "eagle3" in architectures:
        return SAFEAILAB
    blocks = settings.get("num_hidden_layers")
    if "eagle" in architectures or settings.get("model_type") == "eagle" or (architectures and blocks == 1):
        return EAGLE
    return WHOLE_MODEL if architectures and isinstance(blocks, int) and blocks > 1 else None


def refuse_checkpoint(folder: Path, name: str) -> None:
    """Where a bundle is wanted and a checkpoint of draft heads stands: say what it is, and what to do with it.

    Raises:
        BundleError
    """
    try:
        kind = kind_of_checkpoint(read_json(folder / CONFIG_FILE))
    except BundleError:  # none there, or damaged: who needs it says so
        return
    if kind is None:
        return
    if kind.is_supported:
        raise BundleError(
            f"{name} is no bundle, but {kind.words}",
            hint=f"eexit import {name} --output-dir FOLDER makes a bundle of it",
        )
    raise BundleError(f"{name} is no bundle, but {kind.words}")
