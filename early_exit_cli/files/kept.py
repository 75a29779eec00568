"""What this program keeps in the user's cache folder, by kind: how much it is, and removing it.

All of it is made again when it is needed. What takes seconds or minutes to make goes when everything is cleared; answers and
hidden states, which may have taken hours, only by name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from early_exit_cli.config import KeptKind
from early_exit_cli.files.environment import user_cache_dir


@dataclass(frozen=True)
class Kind:
    """folders: names in the user's cache folder."""

    folders: tuple[str, ...]
    meaning: str
    is_dear: bool = False


KINDS: dict[KeptKind, Kind] = {
    "models": Kind(("gguf",), "models converted from GGUF files"),
    "weights": Kind(("weights",), "4-bit copies of backbones"),
    "bundles": Kind(("dssd",), "heads converted from DSSD's files"),
    "measurements": Kind(("widths", "costs"), "widths and costs of passes here"),
    "code": Kind(("native", "cuda"), "code compiled here"),
    "answers": Kind(("answers",), "on-policy answers to train on", is_dear=True),
    "states": Kind(("states",), "hidden states without a --cache-dir of their own", is_dear=True),
}


@dataclass(frozen=True)
class Kept:
    """What is there of one kind; bytes as files count them."""

    kind: KeptKind
    meaning: str
    folders: tuple[Path, ...]
    files: int
    bytes: int


def kept(kinds: Sequence[KeptKind] = get_args(KeptKind)) -> list[Kept]:
    """What is there of each kind."""
    found = []
    for name in kinds:
        folders = tuple(user_cache_dir() / folder for folder in KINDS[name].folders)
        sizes = [path.lstat().st_size for folder in folders for path in folder.rglob("*") if not path.is_dir()]
        found.append(Kept(name, KINDS[name].meaning, folders, len(sizes), sum(sizes)))
    return found


def cleared(kind: KeptKind | None) -> tuple[KeptKind, ...]:
    """The kinds that clearing means: one that is named, or all that are not dear."""
    return (kind,) if kind is not None else tuple(name for name, found in KINDS.items() if not found.is_dear)


def clear(found: Kept) -> None:
    """Remove all of one kind.

    Raises:
        OSError: it may not be removed.
    """
    for folder in found.folders:
        if folder.is_symlink():  # kept elsewhere by somebody's choice: what lies there is theirs
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
