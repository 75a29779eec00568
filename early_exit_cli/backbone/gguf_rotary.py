"""Rotary scaling of a GGUF model, which `transformers` leaves out when it reads one: put into the configuration, or refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.errors import UnsupportedBackboneError

FACTORS = "rope_freqs.weight"
"""By what each rotary frequency is divided."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of Llama 3.1 to 3.3, which have one factor more: that of the lowest frequencies."""
YARN_KEYS = {"type", "factor", "original_context_length", "finetuned"}
"""What is said of YaRN with the usual constants."""


def rotary_scaling(name: str, config: Any, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `rope_parameters` of a GGUF model hold beside those of `config`, as `transformers` reads it.

    Args:
        fields: the metadata under `rope.` of its architecture. tensors: those whose names begin with `rope_`.

    Raises:
        UnsupportedBackboneError: scaling of a kind that no configuration here says.
    """
    said = {key.removeprefix("scaling."): value for key, value in fields.items() if key.startswith("scaling.")}
    factor = float(said.get("factor") or fields.get("scale_linear") or 1.0)
    kind = "none" if factor == 1.0 else str(said.get("type", "linear"))
    factors = tensors.get(FACTORS, torch.ones(1))
    refused = UnsupportedBackboneError(
        f"{name} has rotary scaling of another kind than linear, YaRN and Llama 3's: {', '.join([*tensors, *said]) or kind}",
        hint="the model's own checkpoint, in place of the GGUF file, may run",
    )
    if set(tensors) - {FACTORS}:
        raise refused
    if (factors != 1.0).any():
        found = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
        if kind != "none" or not _gives(config, found, factors):
            raise refused
        return found
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or "original_context_length" not in said or set(said) - YARN_KEYS:
        raise refused
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(said["original_context_length"]),
    }


def _gives(config: Any, scaling: dict[str, Any], factors: Tensor) -> bool:
    """Whether a configuration with this scaling divides the frequencies by these factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = copy.deepcopy(config)
    config.rope_parameters |= scaling
    frequencies, _ = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    places = torch.arange(len(factors)) / len(factors)
    expected = config.rope_parameters["rope_theta"] ** -places / factors
    return frequencies.shape == expected.shape and torch.allclose(frequencies, expected, rtol=1e-4, atol=0.0)
