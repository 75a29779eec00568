"""4-bit weights repacked by us are those that bitsandbytes repacks, with all that it notes of them."""

from __future__ import annotations

import copy

import bitsandbytes.functional
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from early_exit_cli.backbone.repacking import _repack, repack


def quantized(inputs=128, outputs=96, nested=True):
    torch.manual_seed(inputs + outputs)
    module = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, compress_statistics=nested, quant_type="nf4"
    )
    return module.to(torch.bfloat16).to("cpu").eval().requires_grad_(False)


def by_bitsandbytes(module):
    weight = module.weight
    return bitsandbytes.functional._convert_weight_packed_for_cpu(
        weight.data.clone(), copy.deepcopy(weight.quant_state)
    )


def noted(state):
    return {name: value for name, value in vars(state).items() if not isinstance(value, torch.Tensor)} | {"code": None}


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 32), (128, 96), (576, 1536)])
def test_a_matrix_is_packed_as_bitsandbytes_packs_it(inputs, outputs, nested):
    module = quantized(inputs, outputs, nested)
    packed, state = by_bitsandbytes(module)
    _repack(module.weight)
    assert module.weight.data.shape == packed.shape
    assert torch.equal(module.weight.data, packed)
    assert torch.equal(module.weight.quant_state.absmax, state.absmax)
    assert noted(module.weight.quant_state) == noted(state)


def test_a_repacked_model_computes_the_same_and_is_saved_the_same():
    module, beside = quantized(), quantized()
    if not module.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes repacks on CPUs with AVX512-BF16 alone")
    repack(nn.Sequential(module, quantized(64, 64)), 2)
    assert module.weight.quant_state.packing_format_for_cpu
    states = torch.randn(3, 128, dtype=torch.bfloat16)
    assert torch.equal(module(states), beside(states))
    ours, theirs = module.state_dict(), beside.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_packing_is_left_to_bitsandbytes(monkeypatch):
    module = quantized()
    before = module.weight.data.clone()
    packed, state = by_bitsandbytes(module)
    monkeypatch.setattr(
        bitsandbytes.functional, "_convert_weight_packed_for_cpu", lambda weight, state_: (packed.flip(0), state)
    )
    repack(nn.Sequential(module), 1)
    assert torch.equal(module.weight.data, before)
