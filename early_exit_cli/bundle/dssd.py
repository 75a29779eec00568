"""Heads as DSSD keeps them: `aux_heads.pt` beside config.json and, if any, calibration.json, made into a bundle.

`aux_heads.pt` is a pickle, and a pickle can run code. It is read with `weights_only=True` here and nowhere else, checked
against config.json name by name, and written again as safetensors.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from early_exit_cli.bundle.files import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    DSSD_HEADS_FILE,
    HEADS_FILE,
    RECORD_FILE,
    read_bundle_config,
)
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import file_sha256, write_json
from early_exit_cli.files.schemas import FORMAT_VERSION
from early_exit_cli.heads.exit_heads import head_shapes, require_tensors


def convert(folder: Path, target: Path) -> None:
    """Write the bundle of DSSD's `folder` into the existing folder `target`; eexit.json comes last.

    Raises:
        BundleError: a file missing or damaged, a pickle that holds more than tensors, names or shapes that do not fit.
    """
    config = read_bundle_config(folder)
    shapes = head_shapes("linear", config.num_heads, config.hidden_size, config.vocab_size, 0)
    source = folder / DSSD_HEADS_FILE
    heads = load_tensors(source)
    require_tensors(source, heads, shapes)
    heads = {name: heads[name].contiguous() for name in shapes}
    save_file(heads, target / HEADS_FILE, metadata={"kind": "linear"})
    save_dssd_heads(heads, target / DSSD_HEADS_FILE)
    for name in (CONFIG_FILE, CALIBRATION_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    record = {
        "format_version": FORMAT_VERSION,
        "fingerprint": config.declared,
        "heads": {"kind": "linear", "rank": 0, "draft_vocab": 0},
        "imported": {"from": "DSSD", "sha256": file_sha256(source)},
    }
    write_json(target / RECORD_FILE, record)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, without running what else its pickle may hold.

    Raises:
        BundleError: no such file, a damaged one, or one that is not a plain state dict.
    """
    if not path.is_file():
        raise BundleError(f"no file {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a strange file, we say ourselves
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BundleError(f"{path} holds more than tensors; it is not loaded, because it could run code") from error
    except Exception as error:  # a damaged or hostile file fails in any way it likes
        raise BundleError(f"{path} is damaged: {type(error).__name__}", hint="copy or download it again") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        for name, value in state.items()
    ):
        raise BundleError(f"{path} is not a plain dict of tensors")
    return dict(state)


def save_dssd_heads(heads: Mapping[str, Tensor], path: Path) -> None:
    """Write a state dict that DSSD's loader takes; the same heads give the same bytes."""
    torch.save(dict(heads), path)
