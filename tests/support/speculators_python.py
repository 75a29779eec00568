"""A Python that has the package `speculators`, which asks for other releases than ours."""

import os
import subprocess
import venv
from pathlib import Path

PACKAGES = ["torch", "transformers<=5.19.0", "loguru", "pydantic-settings", "psutil", "protobuf", "openai", "aiohttp"]
PACKAGES += ["datasets", "typer", "rich", "httpx", "click", "tqdm"]
UNRESOLVED = ["speculators==0.9.0", "hs-connectors==0.9.0"]  # the first asks for torchvision and torchaudio


def python_with_speculators(folder: Path) -> str:
    """That of EEXIT_SPECULATORS_PYTHON, or of an environment that is made in `folder`."""
    known = os.environ.get("EEXIT_SPECULATORS_PYTHON")
    if known:
        return known
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
    constraints = Path(__file__).parents[2] / "constraints.txt"
    pins = [line for line in constraints.read_text().splitlines() if line.startswith("torch==")]
    subprocess.run([*pip, *pins, *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", *UNRESOLVED], check=True)
    return str(folder / "bin" / "python")
