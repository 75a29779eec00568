"""A cache folder and a model that a test may change."""

import shutil
from pathlib import Path

import pytest

from early_exit_cli.backbone import contents


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache folder of its own for every test, and no second that has to pass before hashes are remembered."""
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(contents, "SETTLED_NS", 0)
    return tmp_path / "home"


@pytest.fixture
def model(tiny_folder, tmp_path):
    """Folder of a tiny Llama that a test may change."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
