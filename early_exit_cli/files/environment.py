"""What a run ran in: versions, processor, commit, the user's cache folder; and the record of a run."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import platformdirs

from early_exit_cli import __version__

RECORDED_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors")
LEAST_FREE = 1_000_000
"""Bytes: a disk with less counts as one that cannot be written, since not even compiled code fits."""


def user_cache_dir() -> Path:
    """Where converted models, on-policy answers and measurements are kept: `EEXIT_HOME`, else the system's own place."""
    return cache_place()[0]


def cache_place() -> tuple[Path, str]:
    """The user's cache folder, and what says so.

    By default it is `eexit` among the system's caches: `XDG_CACHE_HOME` or `~/.cache` on Linux, `~/Library/Caches` on macOS,
    `%LOCALAPPDATA%` on Windows. Where there is no home, as for an unknown user in a container, it is a folder of this
    process alone.
    """
    root = os.environ.get("EEXIT_HOME")
    if root:
        return Path(root).expanduser(), "EEXIT_HOME"
    try:
        found = platformdirs.user_cache_path("eexit", appauthor=False)
    except RuntimeError:
        found = Path()
    if not found.is_absolute():
        return _folder_of_process(), "of this process alone: there is no home folder"
    caches = os.environ.get("XDG_CACHE_HOME")
    return found, "XDG_CACHE_HOME" if caches and found.is_relative_to(caches) else "default"


def kept_path(*parts: str) -> Path:
    """The place of something that is kept in the user's cache folder, or would be.

    Where that folder cannot be written, what is there already is still read; anything else goes to a folder of this
    process alone, and `unsaved` says so.
    """
    path = user_cache_dir().joinpath(*parts)
    return path if path.exists() or _can_write(user_cache_dir()) else _folder_of_process().joinpath(*parts)


def from_home(path: Path | str) -> str:
    """A path as a person writes it, the home folder as `~`; other text as it is."""
    try:
        home = str(Path.home())
    except RuntimeError:
        return str(path)
    whole = str(path)
    return f"~{whole[len(home) :]}" if whole == home or whole.startswith(home + os.sep) else whole


def unsaved() -> str | None:
    """What to tell a person where this process could keep nothing; None where it could, or had nothing to keep."""
    if not _folder_of_process.cache_info().currsize:
        return None
    return "nothing was kept for the next time: there is no cache folder that can be written, or its disk is full; name one with EEXIT_HOME"


def is_writable(folder: Path) -> bool:
    """Whether this user may write into a folder, or make it; it is not made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def keeps_nothing() -> bool:
    """Whether nobody has a home here: all that is written to the user's cache folder goes with this process."""
    folder = user_cache_dir()
    return bool(_folder_of_process.cache_info().currsize) and folder == _folder_of_process()


@functools.cache
def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder).free >= LEAST_FREE
    except OSError:
        return False


@functools.cache
def _folder_of_process() -> Path:
    """A folder that nobody else may enter, removed when the process ends."""
    folder = tempfile.mkdtemp(prefix="eexit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def versions() -> dict[str, str]:
    """Versions of this program, Python and the libraries that decide a result."""
    return {"eexit": __version__, "python": platform.python_version(), **installed(RECORDED_PACKAGES)}


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those of some packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def processor_name() -> str:
    """The processor as the system names it, with its core count."""
    name = _processor().get("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def processor_flags() -> frozenset[str] | None:
    """The processor's instruction sets, as Linux calls them; None where it does not say."""
    flags = _processor().get("flags")
    return None if flags is None else frozenset(flags.split())


@functools.cache
def _processor() -> dict[str, str]:
    """What Linux says of its first processor; nothing on other systems. py-cpuinfo knows those, but takes a second."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def commit() -> str | None:
    """Commit of the checkout this program runs from; none outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def environment(processor: str | None = None) -> dict[str, Any]:
    """What a measurement was made on and with.

    Args:
        processor: the name of what computed, by default this machine's own.
    """
    return {"processor": processor or processor_name(), "versions": versions(), "commit": commit()}


def run_record(settings: list[tuple[str, Any, str]], processor: str | None = None, **extra: Any) -> dict[str, Any]:
    """What `run.json` holds: command, settings with origins, versions, commit, hardware (`environment`), and `extra`."""
    return {
        "command": ["eexit", *sys.argv[1:]],
        "settings": {key: {"value": value, "origin": origin} for key, value, origin in settings},
        **environment(processor),
        **extra,
    }
