"""What was measured on this device, and under which name it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from early_exit_cli.files.atomic import sha256_of
from early_exit_cli.files.environment import kept_path, versions
from early_exit_cli.runtime.blocks import Blocks


def device_identity(blocks: Blocks) -> dict[str, Any]:
    """All that a measurement of a runner may depend on: model, device, threads, versions."""
    backbone = blocks.backbone
    return {
        "fingerprint": backbone.identity,
        "device": backbone.device_name,
        "dtype": str(backbone.dtype),
        "runner": blocks.name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def measurement_path(kind: str, identity: dict[str, Any]) -> Path:
    """Where a measurement is kept: made once for an identity, in the user's cache folder."""
    return kept_path(kind, f"{sha256_of(json.dumps(identity, sort_keys=True))[:24]}.json")
