"""benchmarks/gpu.py runs where there is no card, too."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_it_compares_every_method_and_says_what_it_ran_on(tmp_path):
    record = tmp_path / "gpu.json"
    short = ["--tokens", "4", "--repeats", "0", "--library-prompts", "1", "--prompt-lengths", "20", "--answers", "4"]
    command = [sys.executable, str(SCRIPT), "--body", "smollm2", "--device", "cpu", *short, "--output", str(record)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found["device"] == "CPU"
    assert set(found["answers"]) == {"full", "lookup", "eagle", "adaptive", "auto"}
    for row in found["answers"].values():
        assert row["same_words"] == row["same_bits"] == row["answers"] == 6
        assert row["tokens_per_second"] > 0
    assert found["transformers"]["tokens_per_second"] > 0
    assert found["training_answers_per_second"] > 0
    assert [row["prompt_tokens"] for row in found["first_tokens"]] == [20]
