"""What this program keeps in the user's cache folder: entries by kind, what each was made from, and removing them.

All of it is made again when it is needed. What takes seconds or minutes to make goes when everything is removed; answers and
hidden states, which may have taken hours, only by name or kind.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from early_exit_cli.config_files import KeptKind
from early_exit_cli.errors import ConfigError
from early_exit_cli.files.environment import from_home, user_cache_dir

MADE_FROM = "made_from"
"""The key that names the model, and with answers the text, in what is kept under a hash."""
MADE_FROM_FILE = f"{MADE_FROM}.json"
"""That of a folder."""
UNKNOWN, UNFINISHED = "unknown", "unfinished"
HASH = re.compile(r"[0-9a-f]{24}")
"""How files and folders are named after what decides them."""
SHOWN_HASH = 12


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
    "measurements": Kind(
        ("widths", "costs", "chances"),
        "widths and costs of passes here, chances of MTP drafts",
    ),
    "code": Kind(("native", "cuda"), "code compiled here"),
    "answers": Kind(("answers",), "on-policy answers to train on", is_dear=True),
    "states": Kind(("states",), "hidden states without a --cache-dir of their own", is_dear=True),
    "history": Kind(("chat",), "what was typed in eexit chat", is_dear=True),
}


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: a model's copy, its measurements, the answers of one run.

    key: KIND/ID, its own; name: what it was made from, which several entries may share.
    bytes: as files count them.
    made, used: seconds since the epoch; used is the last reading as far as the file system notes it, None where nobody can
        tell: the names of small files are read from them.
    """

    kind: KeptKind
    key: str
    name: str
    paths: tuple[Path, ...]
    files: int
    bytes: int
    made: float
    used: float | None


def kept(kinds: Sequence[KeptKind] = get_args(KeptKind)) -> list[Entry]:
    """What is there, by kind and name."""
    found = []
    for kind in kinds:
        groups: dict[tuple[str, str], list[Path]] = {}
        for folder in KINDS[kind].folders:
            for path in _content_of(user_cache_dir() / folder):
                groups.setdefault(_identity(kind, path), []).append(path)
        found += [_entry(kind, key, name, paths) for (name, key), paths in sorted(groups.items())]
    return found


def totals(entries: Iterable[Entry]) -> dict[KeptKind, tuple[int, int]]:
    """Files and bytes of each kind."""
    found: dict[KeptKind, tuple[int, int]] = {}
    for entry in entries:
        files, size = found.get(entry.kind, (0, 0))
        found[entry.kind] = files + entry.files, size + entry.bytes
    return found


def named(entries: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The entries that have one of these names or keys.

    Raises:
        ConfigError: a name that none has.
    """
    unknown = [name for name in names if not any(name in (entry.key, entry.name) for entry in entries)]
    if unknown:
        raise ConfigError(f"nothing that is kept is called {unknown[0]!r}", hint="eexit cache ls shows names and keys")
    return [entry for entry in entries if entry.key in names or entry.name in names]


def cleared(kind: KeptKind | None) -> tuple[KeptKind, ...]:
    """The kinds that clearing means: one that is named, or all that are not dear."""
    return (kind,) if kind is not None else tuple(name for name, found in KINDS.items() if not found.is_dear)


def remove(entry: Entry) -> None:
    """Remove one entry.

    Raises:
        OSError: it may not be removed.
    """
    for path in entry.paths:
        _remove(path)


def clear(kind: KeptKind) -> None:
    """Remove all of one kind.

    Raises:
        OSError: it may not be removed.
    """
    for folder in KINDS[kind].folders:
        _remove(user_cache_dir() / folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # a link leads to what somebody chose to keep elsewhere: that is theirs
        path.unlink(missing_ok=True)


def _content_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _entry(kind: KeptKind, key: str, name: str, paths: list[Path]) -> Entry:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if not file.is_dir()]
    found = [file.lstat() for file in files] or [path.lstat() for path in paths]
    made = max(stat.st_mtime for stat in found)
    read = max(
        found, key=lambda stat: stat.st_size
    ).st_atime  # of the largest; the small ones are read to look at it, too
    used = None if kind in ("measurements", "answers") else max(made, read)
    size = sum(stat.st_size for stat in found) if files else 0
    return Entry(kind, key, name, tuple(paths), len(files), size, made, used)


def _identity(kind: KeptKind, path: Path) -> tuple[str, str]:
    """(name, key) of the entry that a path in a kind's folder belongs to."""
    own = path.stem if path.is_file() else path.name
    own = own[:SHOWN_HASH] if HASH.fullmatch(own) else own
    if path.name.startswith("."):
        return UNFINISHED, f"{kind}/{path.name}"
    name = _name(kind, path)
    if kind == "measurements":  # hundreds of small files: one entry a model
        own = name
    if kind == "code":
        own = path.parent.name
    return name, f"{kind}/{own}"


def _name(kind: KeptKind, path: Path) -> str:
    if kind == "models":
        return path.name.rpartition("-")[0] or path.name
    if kind == "bundles":
        return path.name.replace("--", "/", 1)
    if kind == "code":
        return {"native": "passes on this processor", "cuda": "kernels for GPUs"}[path.parent.name]
    if kind == "measurements":
        found = _json(path)
        return _told(found) or _shape(found.get("fingerprint"))
    if kind == "history":
        return "what was typed"
    if kind == "weights" and path.is_file():
        return "hashes of model files"
    if kind == "weights":
        return _told(_json(path / MADE_FROM_FILE)) or _shape(_json(path / "config.json"))
    if kind == "answers":
        return _told(_json(path, is_first_line=True)) or UNKNOWN
    request = _json(path / "manifest.json").get("request")
    request = request if isinstance(request, dict) else {}
    told = [from_home(str(request[key])) for key in ("backbone.model_name", "data.dataset_name") if request.get(key)]
    return ", ".join(told) or UNKNOWN


def _told(found: dict[str, Any]) -> str | None:
    """The name that stands in what is kept; of a model that was converted from a GGUF file, the file's."""
    told = found.get(MADE_FROM)
    if not isinstance(told, str):
        return None
    path = Path(told)
    return _name("models", path) if path.parent == user_cache_dir() / "gguf" else from_home(told)


def _shape(fingerprint: Any) -> str:
    """A model that was not named when this was made."""
    known = fingerprint if isinstance(fingerprint, dict) else {}
    parts = [known.get(key) for key in ("model_type", "num_hidden_layers", "hidden_size")]
    return "unnamed {}, {} blocks, {} wide".format(*parts) if all(parts) else UNKNOWN


def _json(path: Path, *, is_first_line: bool = False) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError), open(path, encoding="utf-8") as file:
        value = json.loads(file.readline() if is_first_line else file.read())
        return value if isinstance(value, dict) else {}
    return {}
