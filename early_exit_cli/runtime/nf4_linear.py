"""Linear maps, several of one input merged into one: over NF4 weights in bitsandbytes' two packings, int8 or plain ones."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LinearMap = Callable[[Tensor], Tensor]
SCALED_TOGETHER, VOCAB_TILE = 64, 16
"""NF4 weights that share a scale, and rows of the LM head multiplied together, where a pass is code of our own."""


def merged_linear(modules: list[Any]) -> LinearMap:
    """One linear map whose output rows are those of `modules` (same input), in order.

    The modules keep working: their weights become parts of the merged one, so that nothing is held twice. NF4 merges
    exactly where a row is whole quantization blocks. In 8 bit, each keeps its own product (`Int8Rows`).
    """
    bias = None
    if any(getattr(module, "bias", None) is not None for module in modules):
        bias = torch.cat([module.bias for module in modules])
    if all(type(module) is nn.Linear for module in modules):
        return PlainRows(modules, bias)
    if all(is_packed_nf4(module) for module in modules):
        return PackedNF4(modules, bias)
    if all(is_plain_nf4(module) for module in modules):
        return MergedNF4(modules, bias)
    if all(is_int8(module) for module in modules):
        return Int8Rows(modules, bias)
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


def _joined(modules: list[Any]) -> Tensor:
    """The modules' weights as one tensor, [rows, ...]; theirs become views of it."""
    if len(modules) == 1:
        return modules[0].weight.data
    weight = torch.cat([module.weight.data for module in modules])
    for module, part in zip(modules, weight.split([module.weight.shape[0] for module in modules]), strict=True):
        module.weight.data = part
    return weight


class PlainRows:
    """Weights [out, in] of any number format, as PyTorch multiplies by them."""

    def __init__(self, modules: list[Any], bias: Tensor | None) -> None:
        self.weight, self.bias = _joined(modules), bias
        self.out_features, self.in_features = self.weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def is_int8(module: Any) -> bool:
    """Whether this linear map's weight is in bitsandbytes' 8 bit: whole numbers up to 127, and a scale for each row."""
    return getattr(module, "state", None) is not None and module.weight.dtype == torch.int8


class Int8Rows:
    """Weights in bitsandbytes' 8 bit. Called, it does what the library's modules do: 8-bit inputs, but for outliers."""

    def __init__(self, modules: list[Any], bias: Tensor | None) -> None:
        self.modules, self.bias = modules, bias
        self.out_features = sum(int(module.out_features) for module in modules)
        self.in_features = int(modules[0].in_features)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([module(x) for module in self.modules], -1) if len(self.modules) > 1 else self.modules[0](x)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Whole numbers [out, in] int8, and what those of a row are times, [out] float32; the modules share them."""
        holders = [module.weight if module.weight.CB is not None else module.state for module in self.modules]
        weight = _joined(self.modules)
        for module, holder in zip(self.modules, holders, strict=True):
            holder.CB = module.weight.data
        return weight, torch.cat([holder.SCB.flatten() for holder in holders]).float() / 127


def is_plain_nf4(module: Any) -> bool:
    """NF4 in bitsandbytes' own layout (GPUs, and CPUs without AVX512-BF16), rows of whole quantization blocks."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return (
        state is not None
        and not getattr(state, "packing_format_for_cpu", False)
        and state.quant_type == "nf4"
        and state.shape[1] % state.blocksize == 0
    )


class MergedNF4:
    """One NF4 weight in bitsandbytes' layout for GPUs: packed rows and scales one after another.

    packed: [rows * in / 2, 1] uint8. scales: [rows * in / 64] float32; doubly quantized ones are unpacked once.
    """

    def __init__(self, modules: list[Any], bias: Tensor | None) -> None:
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        states = [module.weight.quant_state for module in modules]
        scales = [
            dequantize_blockwise(state.absmax, state.state2).float() + state.offset if state.nested else state.absmax
            for state in states
        ]
        first = states[0]
        self.packed, self.scales, self.bias = _joined(modules), torch.cat(scales), bias
        self.out_features, self.in_features = sum(int(state.shape[0]) for state in states), int(first.shape[1])
        self.state = QuantState(
            absmax=self.scales,
            shape=torch.Size((self.out_features, self.in_features)),
            code=first.code,
            blocksize=first.blocksize,
            quant_type=first.quant_type,
            dtype=first.dtype,
        )

    def __call__(self, x: Tensor) -> Tensor:
        import bitsandbytes

        return bitsandbytes.matmul_4bit(x, self.packed.t(), quant_state=self.state, bias=self.bias)


def is_packed_nf4(module: Any) -> bool:
    """Whether this linear map's weight is NF4 in bitsandbytes' packing for CPUs with AVX512-BF16."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return (
        state is not None
        and getattr(state, "packing_format_for_cpu", False)
        and state.quant_type == "nf4"
        and _nf4_kernel() is not None
    )


def _nf4_kernel() -> Any:
    """bitsandbytes' CPU kernel for packed NF4 weights; none where this build has none.

    The torch operator around it costs 16 us a call, half of what the product itself takes at small widths.
    """
    from bitsandbytes.cextension import lib

    return getattr(lib, "gemv_4bit_inference_cpu_nf4_bf16", None)


class PackedNF4:
    """x [width, in] bf16 -> [width, out] bf16 for NF4 weights packed by bitsandbytes for AVX512-BF16."""

    def __init__(self, modules: list[Any], bias: Tensor | None) -> None:
        states = [module.weight.quant_state for module in modules]
        self.weight = _joined(modules)
        self.scales = torch.cat([state.absmax for state in states], 1)  # [in / 64, out]
        self.bias = bias
        self.out_features = sum(int(state.shape[0]) for state in states)
        self.in_features = int(states[0].shape[1])
        self.kernel = _nf4_kernel()
        self.arguments = (
            ctypes.c_int64(self.out_features),
            ctypes.c_int64(self.in_features),
            ctypes.c_void_p(self.weight.data_ptr()),
            ctypes.c_void_p(self.scales.data_ptr()),
            ctypes.c_int64(int(states[0].blocksize)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[0]
        out = torch.empty(width, self.out_features, dtype=torch.bfloat16)
        n, k, weight, scales, block = self.arguments
        self.kernel(
            ctypes.c_int64(width),
            n,
            k,
            ctypes.c_void_p(x.data_ptr()),
            weight,
            scales,
            ctypes.c_void_p(out.data_ptr()),
            block,
            k,
            n,
        )
        return out if self.bias is None else out + self.bias
