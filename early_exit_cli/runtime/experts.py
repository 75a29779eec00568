"""Mixture-of-experts layers whose results do not depend on what stands beside a row.

The library gives an expert the rows routed to it, one here, three there, and a product over few rows may take another
kernel than one over many. In a decoding pass an expert that any row chose therefore runs all rows of the pass: the
products have the pass's width, as all others do, and weights are read as often as before. What a row does not want is
dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "eexit"


def use_wide_experts(model: Any, widest: int) -> None:
    """Have the experts of a `transformers` model run so in passes of at most `widest` rows; no experts, no change."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if not model._can_set_experts_implementation():
        return

    def forward(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return run_experts(experts, hidden, chosen, weights, widest)

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    model.set_experts_implementation(NAME)


def run_experts(experts: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, widest: int) -> Tensor:
    """[rows, hidden], each row's experts and their weights [rows, top_k] -> [rows, hidden], added in experts' order."""
    result = torch.zeros_like(hidden)
    is_narrow = hidden.shape[0] <= widest
    for expert in chosen.unique().tolist():
        rows, rank = (chosen == expert).nonzero(as_tuple=True)
        inner = experts._apply_gate(_product(experts, "gate_up_proj", expert, hidden if is_narrow else hidden[rows]))
        output = _product(experts, "down_proj", expert, inner)
        output = (output[rows] if is_narrow else output) * weights[rows, rank, None]
        result.index_add_(0, rows, output.to(result.dtype))
    return result


def _product(experts: Any, name: str, expert: int, rows: Tensor) -> Tensor:
    """One expert's linear map of some rows; gpt-oss keeps weights the other way round, and biases."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(rows, weight.t() if experts.is_transposed else weight, bias)
