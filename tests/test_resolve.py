"""Configuration: layers, origins, and faults that name what to mend."""

from pathlib import Path

import pytest
import yaml

from early_exit_cli.cli.shared import is_without_heads
from early_exit_cli.config import Config
from early_exit_cli.errors import ConfigError
from early_exit_cli.resolve import resolve, setting_keys

CONFIGS = sorted(path for path in (Path(__file__).parent.parent / "configs").glob("*.yaml") if "ddp" not in path.name)


def write(tmp_path, tree):
    path = tmp_path / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def test_a_flag_beats_yaml_and_yaml_beats_the_default(tmp_path):
    path = write(tmp_path, {"training": {"max_steps": 7, "lr": 0.01}})
    resolved = resolve({"training.lr": (0.5, "--lr")}, path)
    assert resolved.config.training.lr == 0.5
    assert resolved.config.training.max_steps == 7
    assert resolved.config.training.batch_size == 4
    assert resolved.origins["training.lr"] == "--lr"
    assert resolved.origins["training.max_steps"] == str(path)
    assert resolved.is_default("training.batch_size")


def test_every_setting_has_an_origin():
    assert set(resolve({}).origins) == set(setting_keys())


@pytest.mark.parametrize(
    ("flags", "alone"),
    [
        ({}, False),
        ({"backbone.quantization": "4bit"}, False),
        ({"backbone.quantization": "8bit"}, True),
        ({"backbone.model_name": "ORG/OTHER"}, True),
        ({"backbone.quantization": "8bit", "bundle.bundle": "runs/heads"}, False),
    ],
)
def test_the_shipped_heads_are_left_where_another_backbone_or_precision_is_named(flags, alone):
    assert is_without_heads(resolve({key: (value, "a flag") for key, value in flags.items()})) is alone


def test_all_faults_come_at_once_with_file_key_and_nearest_name(tmp_path):
    path = write(tmp_path, {"training": {"max_stepps": 7, "lr": -1}, "trainin": {}, "lr": 1})
    with pytest.raises(ConfigError) as caught:
        resolve({"heads.num_heads": (0, "--num-heads")}, path)
    lines = caught.value.message.splitlines()
    assert len(lines) == 5
    assert f"{path}: unknown section 'lr', a setting that stands in a section: 'training: lr:'" in lines
    assert f"{path}: unknown key 'training.max_stepps', did you mean 'training.max_steps'?" in lines
    assert f"{path}: unknown section 'trainin', did you mean 'training'?" in lines
    assert any(line.startswith(f"{path}: training.lr = -1") for line in lines)
    assert any(line.startswith("--num-heads: heads.num_heads = 0") for line in lines)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "training: 3"])
def test_yaml_that_is_no_configuration_is_refused(tmp_path, text):
    with pytest.raises(ConfigError):
        resolve({}, write(tmp_path, text))


def test_levels_that_collide_after_rounding_are_refused():
    with pytest.raises(ConfigError, match=r"both 0\.80"):
        resolve({"calibration.accuracy_levels": ("0.8,0.801", "--accuracy-levels")})
    levels = resolve({"calibration.accuracy_levels": ("0.9, 0.6", "--accuracy-levels")}).config.calibration
    assert levels.accuracy_levels == [0.6, 0.9]


@pytest.mark.parametrize(
    ("layers", "message"), [("3,3", "ascending"), ("5,2", "ascending"), ("-1,2", "ascending"), ("", "empty")]
)
def test_head_layers_must_ascend(layers, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"heads.head_layer_indices": (layers, "--head-layer-indices")})


def test_head_layers_decide_the_number_of_heads():
    assert resolve({"heads.head_layer_indices": ("1,4", "--x")}).config.heads.num_heads == 2
    with pytest.raises(ConfigError, match="names 2 blocks"):
        resolve({"heads.head_layer_indices": ("1,4", "--x"), "heads.num_heads": (3, "--num-heads")})


def test_adaptive_is_short_for_adaptive_early_exit():
    assert resolve({"inference.mode": ("adaptive", "--mode")}).config.inference.mode == "adaptive_early_exit"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_resolve(path):
    resolve({}, path)


def test_the_seeds_llama_configuration_has_the_seeds_heads():
    path = next(path for path in CONFIGS if path.name == "llama3-8b-4bit.yaml")
    assert resolve({}, path).config.heads.head_layer_indices == [8, 16, 24]


def test_unknown_fields_never_pass_silently():
    for section in Config.model_fields.values():
        assert section.annotation.model_config["extra"] == "forbid"
