"""What a bundle is: the files of its folder, its config.json, and where it came from.

`config.json` and `calibration.json` are as DSSD reads them; `heads.safetensors` holds the heads, and `aux_heads.pt` too
when they are linear; `lookahead.safetensors` a lookahead head, where there is one; `eexit.json` is everything else we know: the backbone's fingerprint, the kind of head, the training
and calibration records.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from early_exit_cli.artifacts import file_sha256, read_json
from early_exit_cli.config import Quantization
from early_exit_cli.errors import BundleError

FORMAT_VERSION = 1
CONFIG_FILE, CALIBRATION_FILE, HEADS_FILE, DSSD_HEADS_FILE, LOOKAHEAD_FILE, RECORD_FILE = (
    "config.json",
    "calibration.json",
    "heads.safetensors",
    "aux_heads.pt",
    "lookahead.safetensors",
    "eexit.json",
)
BUNDLE_FILES = (CONFIG_FILE, CALIBRATION_FILE, HEADS_FILE, DSSD_HEADS_FILE, LOOKAHEAD_FILE, RECORD_FILE)
CARD_FILE = "README.md"
CONFIG_KEYS = {
    "model_name": str,
    "num_heads": int,
    "head_layer_indices": list,
    "quantization": str,
    "hidden_size": int,
    "vocab_size": int,
    "num_hidden_layers": int,
}


@dataclass(frozen=True)
class BundleSource:
    """Where a bundle lies; for one of the Hub also its repository and commit."""

    folder: Path
    repo_id: str | None = None
    commit: str | None = None

    def record(self) -> dict[str, str]:
        """What results keep of it: where it is from, and which heads it held (SHA-256 of their files)."""
        kinds = {"heads": self.folder / HEADS_FILE, "lookahead": self.folder / LOOKAHEAD_FILE}
        held = {name: file_sha256(path) for name, path in kinds.items() if path.is_file()}
        if self.repo_id is None or self.commit is None:
            return {"folder": self.folder.resolve().name, **held}
        return {"repo_id": self.repo_id, "commit": self.commit, **held}


def read_bundle_config(folder: Path) -> dict[str, Any]:
    """config.json of a bundle, with the seven keys that DSSD's loader requires; without exit heads, of no layers.

    Raises:
        BundleError: a key missing, of another type, or heads out of range.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    for key, kind in CONFIG_KEYS.items():
        if key not in config:
            raise BundleError(f"{path} has no {key!r}")
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise BundleError(f"{path}: {key} must be {kind.__name__}, found {config[key]!r}")
    if config["quantization"] not in get_args(Quantization):
        raise BundleError(
            f"{path}: quantization is {config['quantization']!r}; known: {', '.join(get_args(Quantization))}"
        )
    layers = config["head_layer_indices"]
    depth = config["num_hidden_layers"]
    if (
        len(layers) != config["num_heads"]
        or any(not isinstance(layer, int) or not 0 <= layer < depth for layer in layers)
        or sorted(set(layers)) != layers
    ):
        raise BundleError(
            f"{path}: head_layer_indices {layers} must be {config['num_heads']} ascending blocks between 0 and {depth - 1}"
        )
    return config


def applied_quantization(quantization: str) -> str:
    """What config.json says of a backbone's: what loading applies, so nothing to a checkpoint quantized by another tool."""
    return quantization if quantization in get_args(Quantization) else "none"


def kind_of_heads(record: dict[str, Any], path: Path) -> tuple[str, int]:
    """(kind, rank) of the heads as eexit.json, read from `path`, has them.

    Raises:
        BundleError: not there, or of another type.
    """
    heads = record.get("heads")
    kind = heads.get("kind") if isinstance(heads, dict) else None
    rank = heads.get("rank", 0) if isinstance(heads, dict) else None
    if not isinstance(kind, str) or not isinstance(rank, int):
        raise BundleError(f"{path}: heads must have a kind and a rank, found {heads!r}")
    return kind, rank


def lookahead_layers(record: dict[str, Any], path: Path) -> list[int]:
    """0-based blocks whose output the lookahead head reads, as eexit.json, read from `path`, has them.

    Raises:
        BundleError: not a list of numbers.
    """
    found = record["lookahead"].get("exit_layers") if isinstance(record["lookahead"], dict) else None
    if not isinstance(found, list) or not all(isinstance(layer, int) and layer > 0 for layer in found):
        raise BundleError(f"{path}: lookahead must name its exit_layers, found {found!r}")
    return [layer - 1 for layer in found]
