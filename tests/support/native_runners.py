"""The compiled runner of the real small model, for tests of passes and of heads: fixtures to be imported."""

import pytest
import torch

from early_exit_cli.files.instruction_sets import SETS
from early_exit_cli.runtime.native_blocks import NativeBlocks, why_not_native

AVX2_WHEN_SLOW = pytest.mark.parametrize(
    "any_blocks", ["", pytest.param("avx2", marks=pytest.mark.slow)], indirect=True
)
"""Where the kernels' own tests at odd shapes say enough."""


@pytest.fixture(scope="module", name="blocks")
def compiled_blocks(smollm2):
    reason = why_not_native(smollm2)
    if reason is not None:
        pytest.skip(reason)
    return NativeBlocks(smollm2)


@pytest.fixture(scope="module", name="made_blocks")
def blocks_by_instruction_set(smollm2, blocks):
    """Instruction set -> the runner that uses it."""
    return {"": blocks}


@pytest.fixture(params=["", "avx2"], name="any_blocks")
def blocks_of_any_instruction_set(request, monkeypatch, made_blocks, smollm2):
    """The runner of this processor, then that of AVX2, which all code of a test uses."""
    if request.param:
        force(monkeypatch, request.param)
    if request.param not in made_blocks:
        made_blocks[request.param] = NativeBlocks(smollm2)
    return made_blocks[request.param]


def force(monkeypatch, name):
    missing = next(known for known in SETS if known.name == name).missing()
    if missing is not None:
        pytest.skip(missing)
    monkeypatch.setenv("EEXIT_ISA", name)


def real_ids(backbone, length):
    ids = backbone.encode_prompt("Write a short story about a lighthouse keeper, a storm and 3 ships. " * 40)
    return torch.tensor(ids[:length])
