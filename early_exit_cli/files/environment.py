"""What a run ran in: versions, processor, commit, the user's cache folder; and the record of a run."""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from early_exit_cli import __version__

RECORDED_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors")


def user_cache_dir() -> Path:
    """Where converted models, on-policy answers and measurements are kept: `EEXIT_HOME`, else `~/.cache/eexit`.

    Where there is no home, as for an unknown user in a container, it is a folder of this process alone.
    """
    root = os.environ.get("EEXIT_HOME")
    if root:
        return Path(root).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if caches.is_absolute():  # the specification says to ignore any other
        return caches / "eexit"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    return home / ".cache" / "eexit" if home.is_absolute() else _folder_of_process()


def kept_path(*parts: str) -> Path:
    """The place of something that is kept in the user's cache folder, or would be.

    Where that folder cannot be written, what is there already is still read; anything else goes to a folder of this
    process alone, and `unsaved` says so.
    """
    path = user_cache_dir().joinpath(*parts)
    return path if path.exists() or _can_write(user_cache_dir()) else _folder_of_process().joinpath(*parts)


def unsaved() -> str | None:
    """What to tell a person where this process could keep nothing; None where it could, or had nothing to keep."""
    if not _folder_of_process.cache_info().currsize:
        return None
    return "nothing was kept for the next time: there is no cache folder that can be written; name one with EEXIT_HOME"


@functools.cache
def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
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
    found = {"eexit": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """The processor as the system names it, with its core count."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


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
