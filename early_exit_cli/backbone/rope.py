"""Rotary positions as a configuration asks for them, by the library's own formulas."""

from __future__ import annotations

from typing import Any

from early_exit_cli.backbone.families import LENGTH_INDEPENDENT_ROTARY
from early_exit_cli.backbone.output import ScaledRotary
from early_exit_cli.errors import BundleError, said, shown


def scaled_rotary(parameters: dict[str, Any], head_dim: int, positions: int) -> ScaledRotary | None:
    """Frequencies of `rope_parameters`; None where they are those of the base alone.

    Args:
        positions: the configuration's `max_position_embeddings`.

    Raises:
        BundleError: a kind that depends on the length of the text, turns only a part of a head, or lacks a number.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in LENGTH_INDEPENDENT_ROTARY:
        raise BundleError(
            f"rope_type {shown(kind)} is not supported; supported: {', '.join(LENGTH_INDEPENDENT_ROTARY)}"
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise BundleError(f"partial_rotary_factor {shown(parameters['partial_rotary_factor'])} is not supported")
    base = parameters.get("rope_theta")
    if not isinstance(base, int | float) or base <= 1:
        raise BundleError(f"rope_theta {shown(base)} is no base of rotary positions")
    if kind == "default":
        return None
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    try:
        with torch.device("cpu"):
            config = LlamaConfig(head_dim=head_dim, rope_parameters=dict(parameters), max_position_embeddings=positions)
            found = LlamaRotaryEmbedding(config)
        return ScaledRotary(tuple(found.inv_freq.tolist()), float(found.attention_scaling))
    except Exception as error:  # the library raises whatever a wrong number provokes
        raise BundleError(f"rope parameters {shown(parameters)}: {said(error)}") from error
