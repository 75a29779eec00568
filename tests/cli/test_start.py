"""What a start leaves out: searching for garbage among what loads, and importing PyTorch's compiler."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from early_exit_cli.__main__ import _search_between_steps
from early_exit_cli.steps import Step


@pytest.fixture
def as_before():
    yield
    gc.unfreeze()
    gc.enable()


def test_what_loads_is_set_aside_and_what_comes_later_is_searched(as_before):
    _search_between_steps(Step("loading"))
    assert not gc.isenabled()
    _search_between_steps(None)
    assert gc.isenabled()
    assert gc.get_freeze_count() > 1000
    assert gc.get_count()[2] == 0


def test_a_command_searches_again_once_it_has_loaded():
    found = printed_by(
        "import gc, sys; from early_exit_cli import __main__; sys.argv = ['eexit', 'infer', '--model-name', '/nowhere', 'hi']\n"
        "try: __main__.main()\n"
        "except SystemExit as stop: print(stop.code, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    assert found == "1 True True\n"


def test_a_command_does_not_end_with_a_search_for_garbage():
    """Among torch's objects it takes a second."""
    found = printed_by(
        "import atexit, gc, sys; sys.argv = ['eexit', '--version']\n"
        "atexit.register(lambda: print('SPARED', gc.get_freeze_count() > 0))\n"
        "from early_exit_cli.__main__ import main\n"
        "main()"
    )
    assert "SPARED True" in found


def test_bitsandbytes_comes_without_the_compiler_which_is_asked_at_a_first_call():
    found = printed_by(
        "import sys, torch\n"
        "asked = []\n"
        "now = torch.compile = lambda function, **options: asked.append(function.__name__) or function\n"
        "from early_exit_cli.backbone.quantization import import_bitsandbytes\n"
        "import_bitsandbytes()\n"
        "print(torch.compile is now, asked, 'torch._inductor.compile_fx' in sys.modules)\n"
        "from bitsandbytes.backends.default import ops\n"
        "code, numbers = torch.tensor([-1.0, 0.0, 0.5, 1.0]), torch.tensor([0, 1, 2, 3], dtype=torch.uint8)\n"
        "for _ in range(2):\n"
        "    out = ops._dequantize_blockwise_compute(numbers, torch.tensor([2.0]), code, 4, torch.float32)\n"
        "print(out.tolist(), asked)"
    )
    assert found == "True [] False\n[-2.0, 0.0, 1.0, 2.0] ['_dequantize_blockwise_compute']\n"


def printed_by(program: str) -> str:
    """By a process of its own."""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return result.stdout or result.stderr
