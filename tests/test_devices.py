"""Where things run: `auto` takes a GPU where there is one, and no test leaves it to `auto` (`devices.py`)."""

import os
import subprocess
import sys

import pytest
import torch
from commands import command_line, eexit

from early_exit_cli.backbone import load

PICK = load.pick_device
"""As the product has it: read before a test's guard is there."""


@pytest.mark.parametrize(("is_there", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch, is_there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    assert PICK("auto") == torch.device(device)
    assert PICK("cpu") == torch.device("cpu")


def test_a_test_that_leaves_its_device_to_auto_fails(tiny_folder):
    model = ["--model-name", tiny_folder("llama"), "--quantization", "none", "--mode", "full"]
    with pytest.raises(pytest.fail.Exception, match="auto takes a GPU"):
        eexit("infer", *model, "--prompt", "a", "--device", "auto")


def test_a_command_of_a_test_names_the_cpu_where_it_takes_a_device():
    assert command_line("infer", "--prompt", "a")[-2:] == ["--device", "cpu"]
    assert command_line("cache", "extract")[-2:] == ["--device", "cpu"]
    assert command_line("infer", "--device", "cuda:1")[-2:] == ["--device", "cuda:1"]
    assert command_line("cache", "info")[-2:] == ["cache", "info"]
    assert command_line("pull", "org/heads")[-1] == "org/heads"
    assert command_line("nonsense")[-1] == "nonsense"


def test_a_process_that_a_test_starts_sees_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    script = "import torch; print(torch.cuda.is_available())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
