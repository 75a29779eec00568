"""The widths at which bitsandbytes multiplies NF4 weights without unpacking them on a GPU.

Beyond some width, which depends on the shape and the GPU, it unpacks the weight and multiplies with that: several times
the cost, and other bits. Which width that is, its own dispatch is asked, for the products that a pass really makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from early_exit_cli.runtime.blocks import KEY_STEP, Blocks

Dispatch = Callable[[int, torch.dtype, int, int, int], bool]
"""(device index, dtype, width, rows, inner) -> whether the fused kernel runs."""


def fused_widths(blocks: Blocks, candidates: tuple[int, ...]) -> tuple[int, ...]:
    """The candidates at which every NF4 product of a pass takes a fused kernel.

    All of them where there is nothing to ask: on a CPU, in other precisions, with a release that has no such dispatch.
    """
    device = blocks.backbone.device
    is_fused = _dispatch() if device.type == "cuda" else None
    if is_fused is None:
        return candidates
    index = torch.cuda.current_device() if device.index is None else device.index
    products = nf4_products(blocks)
    fused = tuple(
        width
        for width in candidates
        if all(is_fused(index, dtype, width, rows, inner) for rows, inner, dtype in products)
    )
    return fused or candidates


def _dispatch() -> Dispatch | None:
    """bitsandbytes' own, private to it."""
    try:
        ops = importlib.import_module("bitsandbytes.backends.cuda.ops")
    except (ImportError, AttributeError):
        return None
    return getattr(ops, "_gemm_4bit_use_custom_fn", None)


def nf4_products(blocks: Blocks) -> set[tuple[int, int, torch.dtype]]:
    """(rows, inner, dtype of the input) of the 4-bit products that a block asks bitsandbytes for; that all do, where they differ.

    One whose inner size is no whole number of quantization blocks is left out: it is never fused, at no width.
    """
    token = torch.zeros(1, dtype=torch.int64, device=blocks.backbone.device)
    with torch.inference_mode(), _Products() as products:
        cache = blocks.new_cache(KEY_STEP)
        blocks.run(blocks.embed(token), cache, 0, 0, blocks.num_blocks if cache.states else 1)
    return products.found


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, int, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.bitsandbytes.gemm_4bit.default:
            x, _, (rows, inner), _, block, *_ = args
            if inner % block == 0:
                self.found.add((int(rows), int(inner), x.dtype))
        return func(*args, **(kwargs or {}))
