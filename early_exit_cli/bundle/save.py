"""Heads written as a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from early_exit_cli.backbone.output import BackboneView
from early_exit_cli.bundle.files import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    DSSD_HEADS_FILE,
    EAGLE_FILE,
    FORMER_EAGLE_FILE,
    HEADS_FILE,
    RECORD_FILE,
    applied_quantization,
    read_bundle_record,
    record_json,
)
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import atomic_files, fingerprint_differences, write_atomic, write_json
from early_exit_cli.files.forms import to_block_numbers
from early_exit_cli.files.schemas import FORMAT_VERSION
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads


def save_bundle(
    folder: Path,
    view: BackboneView,
    heads: ExitHeads,
    training_config: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Write heads, config.json and eexit.json together; a calibration of other heads is removed.

    An EAGLE head of the same backbone that is there stays. A failure leaves the bundle that was there.
    """
    if (folder / RECORD_FILE).exists():
        before = read_bundle_record(folder)
        if before.eagle is not None and before.fingerprint == view.fingerprint:
            record = {**record, "eagle": record_json(folder / RECORD_FILE)["eagle"]}
    described = {
        "format_version": FORMAT_VERSION,
        "fingerprint": view.fingerprint,
        "heads": {
            "kind": heads.kind,
            "rank": heads.rank,
            "draft_vocab": 0 if heads.draft_vocab is None else int(heads.draft_vocab.numel()),
        },
        **record,
    }
    with atomic_files(folder, (CALIBRATION_FILE, DSSD_HEADS_FILE, HEADS_FILE, CONFIG_FILE, RECORD_FILE)) as temporary:
        heads.save(temporary / HEADS_FILE, view.dtype)
        if heads.kind == "linear":
            weights = heads.dssd_state_dict(view.dtype)
            write_atomic(temporary / DSSD_HEADS_FILE, lambda path: torch.save(weights, path))
        write_json(temporary / CONFIG_FILE, bundle_config(view, heads.exit_layers, training_config))
        write_json(temporary / RECORD_FILE, described)


def save_eagle(
    folder: Path, view: BackboneView, head: EagleHead, training_config: dict[str, Any], record: dict[str, Any]
) -> None:
    """Add an EAGLE head to the bundle in `folder`, or begin one without exit heads.

    Raises:
        BundleError: the bundle there was made for another backbone.
    """
    if (folder / RECORD_FILE).exists():
        differences = fingerprint_differences(read_bundle_record(folder).fingerprint, view.fingerprint)
        if differences:
            key, theirs, ours = differences[0]
            raise BundleError(
                f"the bundle in {folder} was made for another backbone ({key}: {theirs!r} there, {ours!r} here)",
                hint="use another --output-dir",
            )
        before = record_json(folder / RECORD_FILE)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, bundle_config(view, [], training_config))
        before = {"format_version": FORMAT_VERSION, "fingerprint": view.fingerprint}
    head.save(folder / EAGLE_FILE, view.dtype)
    (folder / FORMER_EAGLE_FILE).unlink(missing_ok=True)
    described = {
        "exit_layers": head.exit_layers,
        "draft_vocab": 0 if head.draft_vocab is None else int(head.draft_vocab.numel()),
        **record,
    }
    write_json(folder / RECORD_FILE, {**before, "eagle": described})


def bundle_config(view: BackboneView, exit_layers: list[int], training_config: dict[str, Any]) -> dict[str, Any]:
    """config.json, with the keys that DSSD's loader requires."""
    return {
        "model_name": view.name,
        "num_heads": len(exit_layers),
        "head_layer_indices": to_block_numbers(exit_layers),
        "quantization": applied_quantization(view.quantization),
        "hidden_size": view.hidden_size,
        "vocab_size": view.vocab_size,
        "num_hidden_layers": view.num_blocks,
        "training_config": training_config,
    }
