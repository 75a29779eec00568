"""What a run ran in: versions, processor, commit, the user's cache folder; and the record of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from early_exit_cli import __version__

RECORDED_PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "safetensors")


def user_cache_dir() -> Path:
    """Where converted models, on-policy answers and measurements are kept: `EEXIT_HOME`, else `~/.cache/eexit`."""
    root = os.environ.get("EEXIT_HOME")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "eexit"


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
