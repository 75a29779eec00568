"""A bundle names its backbone, from wherever it is asked."""

import json
import shutil

import pytest
from commands import eexit

from early_exit_cli.bundle.load import backbone_of_bundle, with_names_of_bundle
from early_exit_cli.config import BackboneConfig


@pytest.fixture
def project(tmp_path, tiny_bundle, tiny_folder):
    """models/tiny and runs/heads, as training from this folder leaves them."""
    project = tmp_path / "project"
    shutil.copytree(tiny_folder("llama"), project / "models" / "tiny")
    config = shutil.copytree(tiny_bundle, project / "runs" / "heads") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_name": "models/tiny"}))
    return project


def test_a_relative_backbone_is_found_from_any_folder(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    assert with_names_of_bundle(BackboneConfig(), project / "runs" / "heads").model_name == "models/tiny"
    monkeypatch.chdir(tmp_path)
    found = with_names_of_bundle(BackboneConfig(), project / "runs" / "heads")
    assert found.model_name == str(project / "models" / "tiny")
    bundle = ["--bundle", project / "runs" / "heads", "--prompt", "Hi", "--max-tokens", 4]
    code, _, err = eexit("infer", *bundle)
    assert code == 0, err


def test_the_nearest_folder_counts_and_the_working_folder_most(project, tmp_path, monkeypatch):
    bundle = project / "runs" / "heads"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project / "models", bundle / "models")
    assert backbone_of_bundle("models/tiny", bundle) == str(bundle / "models" / "tiny")
    shutil.copytree(project / "models", tmp_path / "models")
    assert backbone_of_bundle("models/tiny", bundle) == "models/tiny"


@pytest.mark.parametrize("name", ["org/model", "/nowhere/model", "~/nowhere", "x" * 900])
def test_what_is_nowhere_keeps_its_name(project, name):
    assert backbone_of_bundle(name, project / "runs" / "heads") == name


def test_a_backbone_that_is_asked_for_is_taken(project):
    asked = BackboneConfig(model_name="org/model")
    assert with_names_of_bundle(asked, project / "runs" / "heads").model_name == "org/model"
