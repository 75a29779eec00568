"""4-bit weights in the packing that bitsandbytes gives them on CPUs with AVX512-BF16, made sooner.

bitsandbytes repacks a matrix when it first multiplies, in every start and by way of 32-bit integers: half a second for SmolLM2, five
for 1.4 billion parameters. Here bytes stay bytes, and matrices are shared among threads. What comes out is its own packing
(a test, and one matrix of each model), which its modules then find done.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from early_exit_cli.numerics import one_thread

ROWS_TOGETHER = 32
"""Outputs that lie together; a byte holds two of them, 16 apart."""


def repack(model: nn.Module, threads: int) -> None:
    """Repack all matrices that bitsandbytes would, where its packing is the one that is known here."""
    waiting: list[Any] = [module.weight for module in model.modules() if _is_to_be_repacked(module)]
    if not waiting or not _is_as_expected(min(waiting, key=Tensor.numel)):
        return
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_repack, weight) for weight in waiting]:
            done.result()


def _is_to_be_repacked(module: nn.Module) -> bool:
    """As bitsandbytes decides when a module first runs."""
    from bitsandbytes.nn import Linear4bit

    if not isinstance(module, Linear4bit) or module.training or not module.support_avx512bf16_for_cpu:
        return False
    weight, state = module.weight, getattr(module.weight, "quant_state", None)
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.uint8
        and state is not None
        and not getattr(state, "packing_format_for_cpu", False)
        and len(state.shape) == 2
        and state.shape[0] % ROWS_TOGETHER == 0
        and state.shape[1] % state.blocksize == 0
    )


def _is_as_expected(weight: Any) -> bool:
    """Whether bitsandbytes, the one that is installed, makes the same of a matrix."""
    try:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        packed, state = _convert_weight_packed_for_cpu(weight.data.clone(), copy.deepcopy(weight.quant_state))
    except (ImportError, TypeError):  # another release
        return False
    ours = packed_for_cpu(weight.data, *weight.quant_state.shape)
    return torch.equal(ours, packed) and torch.equal(_scales(weight.quant_state), state.absmax)


def _repack(weight: Any) -> None:
    """In place, with what bitsandbytes notes of it."""
    state = weight.quant_state
    state.original_dtype, state.original_nested, state.original_qshape = state.dtype, state.nested, weight.shape
    weight.data = packed_for_cpu(weight.data, *state.shape)
    state.absmax = _scales(state)
    if state.nested:
        state.nested = False
        del state.state2
    state.dtype = torch.bfloat16
    state.packing_format_for_cpu = True


def packed_for_cpu(codes: Tensor, outputs: int, inputs: int) -> Tensor:
    """Codes in rows, [outputs * inputs / 2] uint8 in any shape, the first of two inputs in the upper half -> [outputs, inputs / 2]:
    32 outputs together, for each two inputs 16 times both inputs of an output in the lower halves, those of the output 16
    further in the upper ones.
    """
    low, high = codes.view(outputs // ROWS_TOGETHER, 2, ROWS_TOGETHER // 2, inputs // 2).unbind(1)
    pairs = torch.stack(((high & 0xF0) | (low >> 4), (high << 4) | (low & 0x0F)), -1)  # [blocks, 16, inputs / 2, 2]
    return pairs.transpose(1, 2).reshape(outputs, inputs // 2)


def _scales(state: Any) -> Tensor:
    """[inputs / block size, outputs] bfloat16, of a quantization state in rows."""
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    rows = absmax.float().reshape(state.shape[0], state.shape[1] // state.blocksize)
    return rows.T.to(torch.bfloat16).contiguous()
