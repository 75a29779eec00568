"""The library on the shipped bundle, as the example and the guide show it; in NF4; with heads from a Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import WRITER, HubServer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from early_exit_cli import EarlyExitModel
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.errors import UnsupportedBackboneError

ROOT = Path(__file__).parent.parent.parent


def test_the_example_runs():
    command = [sys.executable, ROOT / "examples" / "library.py", "12"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "tokens/s" in run.stdout
    assert "12 new tokens" in run.stdout


def test_the_guides_first_lines_run(capsys):
    block = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(encoding="utf-8"), re.S)[0]
    for long, short in (
        ("max_new_tokens=64", "max_new_tokens=6"),
        ('("smollm2-135m")', '("smollm2-135m", device="cpu")'),
    ):
        assert long in block
        block = block.replace(long, short)
    exec(block, {})
    text, figures = capsys.readouterr().out.strip().split("\n", 1)
    assert "capital" in text
    assert all(float(figure) > 0 for figure in figures.split())


FROM_A_HUB = """
import sys
from transformers import AutoModelForCausalLM
from early_exit_cli import EarlyExitModel
from early_exit_cli.cli.app import main
backbone, bundle = sys.argv[1:]
sys.argv = ["eexit", "push", "--repo-id", "org/heads", bundle]
try: main()
except SystemExit as end: assert not end.code
model = AutoModelForCausalLM.from_pretrained(backbone)
early = EarlyExitModel.from_pretrained("org/heads@main", model=model, drafter="exit", accuracy_level=0.3)
early.answer("a text", max_new_tokens=8)
assert len(early.engine.heads) == 2 and early.last.stats.total_tokens_generated
"""


def test_a_hub_id_names_the_heads(linear_bundle, tiny_folder, tmp_path):
    with HubServer() as server:
        surroundings = {
            "HF_ENDPOINT": server.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
            "HF_TOKEN": WRITER,
        }
        command = [sys.executable, "-c", FROM_A_HUB, tiny_folder("llama"), linear_bundle]
        environment = {**os.environ, **surroundings}
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert run.returncode == 0, run.stderr


def test_a_loaded_4_bit_model_takes_the_shipped_heads_and_answers_as_plain_decoding(smollm2):
    early = EarlyExitModel.from_pretrained("smollm2-135m", model=smollm2.model, tokenizer=smollm2.tokenizer)
    assert early.engine.backbone.quantization == "4bit"
    ids = torch.tensor([smollm2.encode_prompt("Name five colours, then name them again backwards.")])
    drafted = early.generate(ids, max_new_tokens=48)
    assert early.last.stats.tokens_accepted > 0
    plain = EarlyExitModel(early.engine, NoDrafter(), 8).generate(ids, max_new_tokens=48)
    assert torch.equal(drafted, plain)
    assert torch.equal(smollm2.model.generate(ids, max_new_tokens=48, custom_generate=early.custom_generate), plain)


def test_4_bit_with_float32_states_is_refused_on_a_cpu(tiny_folder):
    """The CPU kernel for packed NF4 weights reads bfloat16, whatever it is given."""
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder("llama"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    with pytest.raises(UnsupportedBackboneError, match=r"states in torch\.float32"):
        EarlyExitModel.from_pretrained(None, model=model)
