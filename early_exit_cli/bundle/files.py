"""What a bundle is: the files of its folder, its config.json, and where it came from.

`config.json` and `calibration.json` are as DSSD reads them; `heads.safetensors` holds the heads, and `aux_heads.pt` too
when they are linear; `eagle.safetensors` an EAGLE head, where there is one; `eexit.json` is everything else we know: the
backbone's fingerprint, the kind of head, the training and calibration records.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from early_exit_cli.config import Quantization
from early_exit_cli.config_fields import FORMER_WORDS
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import file_sha256, read_json
from early_exit_cli.files.schemas import BundleForm, Eagle, Heads, RecordForm, read_form, require_form

CONFIG_FILE, CALIBRATION_FILE, HEADS_FILE, DSSD_HEADS_FILE, EAGLE_FILE, RECORD_FILE = (
    "config.json",
    "calibration.json",
    "heads.safetensors",
    "aux_heads.pt",
    "eagle.safetensors",
    "eexit.json",
)
BUNDLE_FILES = (CONFIG_FILE, CALIBRATION_FILE, HEADS_FILE, DSSD_HEADS_FILE, EAGLE_FILE, RECORD_FILE)
CARD_FILE = "README.md"
FORMER_EAGLE_FILE = "lookahead.safetensors"
"""What older bundles call EAGLE_FILE: read, written nowhere."""


@dataclass(frozen=True)
class BundleSource:
    """Where a bundle lies; for one of the Hub also its repository and commit.

    is_shipped: it is the program's own, under its name.
    """

    folder: Path
    repo_id: str | None = None
    commit: str | None = None
    is_shipped: bool = False

    def record(self) -> dict[str, str]:
        """What results keep of it: where it is from, and which heads it held (SHA-256 of their files)."""
        kinds = {"heads": self.folder / HEADS_FILE, "eagle": eagle_file(self.folder)}
        held = {name: file_sha256(path) for name, path in kinds.items() if path.is_file()}
        if self.repo_id is None or self.commit is None:
            return {"folder": self.folder.resolve().name, **held}
        return {"repo_id": self.repo_id, "commit": self.commit, **held}


def read_bundle_config(folder: Path) -> BundleForm:
    """config.json of a bundle, with the seven keys that DSSD's loader requires; without exit heads, of no layers.

    Raises:
        BundleError: a key missing, of another type, or heads out of range.
    """
    return read_form(folder / CONFIG_FILE, BundleForm)


def applied_quantization(quantization: str) -> str:
    """What config.json says of a backbone's: what loading applies, so nothing to a checkpoint quantized by another tool."""
    return quantization if quantization in get_args(Quantization) else "none"


def read_bundle_record(folder: Path) -> RecordForm:
    """eexit.json of a bundle.

    Raises:
        BundleError: missing, damaged, or written by a newer version.
    """
    path = folder / RECORD_FILE
    return require_form(record_json(path), RecordForm, str(path))


def record_json(path: Path) -> dict[str, Any]:
    """A record as it stands in its file, in today's words: to change it, keys that nobody here reads stay."""
    return in_todays_words(read_json(path))


def in_todays_words(record: dict[str, Any]) -> dict[str, Any]:
    """eexit.json with the keys that are written now."""
    found = {}
    for key, value in record.items():
        for former, word in FORMER_WORDS.items():
            key = key.replace(former, word)
        found[key] = in_todays_words(value) if key == "drafting" and isinstance(value, dict) else value
    return found


def eagle_file(folder: Path) -> Path:
    """The file of a bundle's EAGLE head, under the name that it has there."""
    former = folder / FORMER_EAGLE_FILE
    return former if former.is_file() and not (folder / EAGLE_FILE).is_file() else folder / EAGLE_FILE


def kind_of_heads(record: RecordForm, folder: Path) -> Heads:
    """Kind and rank of the exit heads, as the record of the bundle in `folder` has them.

    Raises:
        BundleError: not there.
    """
    if record.heads is None:
        raise BundleError(f"{folder / RECORD_FILE} does not say of what kind the heads are")
    return record.heads


def eagle_exit_layers(eagle: Eagle, folder: Path, num_blocks: int) -> list[int]:
    """Exit layers of the EAGLE head, as the record of the bundle in `folder` has them.

    Raises:
        BundleError: not ascending, or beyond the backbone.
    """
    if sorted(set(eagle.exit_layers)) != eagle.exit_layers or eagle.exit_layers[-1] > num_blocks:
        raise BundleError(
            f"{folder / RECORD_FILE}: the EAGLE head's exit_layers must be ascending, at most {num_blocks}"
        )
    return eagle.exit_layers
