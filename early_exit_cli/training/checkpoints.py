"""The checkpoints of a training run on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from early_exit_cli.config_fields import todays_word
from early_exit_cli.errors import CheckpointError, shown
from early_exit_cli.files.schemas import MarkerForm, read_form

MARKER = "complete.json"
KEPT_CHECKPOINTS = 2
LATER_KEYS = ("content",)
"""Of a run's identity, what older checkpoints do not name: compared where they do."""


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders that carry their marker, oldest first; half-written ones are passed over."""
    return sorted(path for path in (output_dir / "checkpoints").glob("step-*") if (path / MARKER).is_file())


def half_written_checkpoints(output_dir: Path) -> list[Path]:
    """What a run that was killed left of checkpoints it was writing."""
    folders = (output_dir / "checkpoints").glob("*step-*")
    return sorted(path for path in folders if not (path / MARKER).is_file() or path.suffix == ".tmp")


def resumable(output_dir: Path, identity: dict[str, Any]) -> tuple[Path, MarkerForm] | None:
    """The newest complete checkpoint and what its marker says; None where there is none.

    Raises:
        BundleError: a damaged marker.
        CheckpointError: of another run than `identity`, with every difference.
    """
    found = complete_checkpoints(output_dir)
    if not found:
        return None
    state = read_form(found[-1] / MARKER, MarkerForm, CheckpointError)
    before = {key: todays_word(value) for key, value in state.identity.items()}
    changed = [
        f"{key}: {shown(before.get(key))} then, {value!r} now"
        for key, value in identity.items()
        if before.get(key) != value and (key in before or key not in LATER_KEYS)
    ]
    if changed:
        raise CheckpointError(
            f"{found[-1]} belongs to another run ({'; '.join(changed)})", hint="use another --output-dir"
        )
    return found[-1], state
