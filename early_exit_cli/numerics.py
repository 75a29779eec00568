"""Finite logits, products in bfloat16, clocks that wait for the device, and work for one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from early_exit_cli.errors import NumericsError


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read after it counts finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bfloat16_products(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Heads' products in bfloat16 where the backbone computes in it, `dtype`; weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@contextmanager
def one_thread() -> Iterator[None]:
    """For small operations one after another, as while loading: beside busy programs the threads of PyTorch wait for each
    other at the end of each, and a start of six seconds takes more than thirty. Not for sums whose bits count.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_finite(best_logits: Tensor) -> None:
    """Refuse a row whose best logit is NaN or infinite: argmax would silently say token 0.

    Raises:
        NumericsError
    """
    if not torch.isfinite(best_logits).all():
        raise not_finite()


def not_finite() -> NumericsError:
    return NumericsError(
        "the backbone's logits are NaN or infinite",
        hint="check the model file and the text, or --quantization none",
    )
