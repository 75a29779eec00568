"""The library on the shipped bundle: the example as it stands, and a model that was loaded before, in NF4."""

import subprocess
import sys
from pathlib import Path

import torch

from early_exit_cli import EarlyExitModel
from early_exit_cli.drafters import NoDrafter

ROOT = Path(__file__).parent.parent.parent


def test_the_example_runs():
    command = [sys.executable, ROOT / "examples" / "library.py", "12"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert "tokens/s" in run.stdout
    assert "12 new tokens" in run.stdout


def test_a_loaded_4_bit_model_takes_the_shipped_heads_and_answers_as_plain_decoding(smollm2):
    early = EarlyExitModel.from_pretrained("smollm2-135m", model=smollm2.model, tokenizer=smollm2.tokenizer)
    assert early.engine.backbone.quantization == "4bit"
    ids = torch.tensor([smollm2.encode_prompt("Name five colours, then name them again backwards.")])
    drafted = early.generate(ids, max_new_tokens=48)
    assert early.last.stats.tokens_accepted > 0
    plain = EarlyExitModel(early.engine, NoDrafter(), 8).generate(ids, max_new_tokens=48)
    assert torch.equal(drafted, plain)
    assert torch.equal(smollm2.model.generate(ids, max_new_tokens=48, custom_generate=early.custom_generate), plain)
