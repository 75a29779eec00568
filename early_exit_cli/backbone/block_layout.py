"""How the blocks of a backbone are laid out, for code of our own that reads their weights: Llama's way and what departs
from it.

One description, read from the library's modules and configuration. The fused runner and the compiled passes follow it, and
so does whoever must know whether blocks are Llama's and nothing else (docs/decisions/0030-one-description-of-a-block.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from early_exit_cli.backbone.families import Family

Names = tuple[str | None, str | None]
IN_FRONT: Names = ("input_layernorm", "post_attention_layernorm")
IN_FRONT_TOO: Names = ("input_layernorm", "pre_feedforward_layernorm")
BEHIND: Names = ("post_attention_layernorm", "post_feedforward_layernorm")
NOWHERE: Names = (None, None)


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of one backbone; the defaults are Llama's.

    norms_before, norms_behind: names of the norms in front of a block's attention and MLP, and behind them. rounds_once:
    a norm's weight multiplies in float32, and the product is rounded; Llama's rounds in between. adds_one: it multiplies by
    one more than its weight. norms_all_heads: the norms of queries and of keys are over all heads together. is_merged:
    queries, keys and values are one weight already, gate and up another. rotary_dim: dimensions of a head that rotary
    positions turn. without_rotary: numbers of the blocks where they turn none. score_cap: what attention's scores are bent
    below. residual_multiplier: what the output of attention and MLP is multiplied by; embedding_multiplier: what embedded
    tokens are.
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    eps: float
    activation: str
    scale: float
    rotary_dim: int
    norms_before: Names = IN_FRONT
    norms_behind: Names = NOWHERE
    rounds_once: bool = False
    adds_one: bool = False
    norms_all_heads: bool = False
    is_merged: bool = False
    without_rotary: frozenset[int] = frozenset()
    score_cap: float | None = None
    residual_multiplier: float = 1.0
    embedding_multiplier: float = 1.0

    @property
    def unlike_llama(self) -> str | None:
        """The first thing in which these blocks depart from Llama's; None where nothing does."""
        found = {
            "norms behind attention and MLP": self.norms_behind != NOWHERE,
            "norms that round once": self.rounds_once,
            "norms over all heads together": self.norms_all_heads,
            "merged projections": self.is_merged,
            "a multiplier of attention's scores": self.scale != self.head_dim**-0.5,
            "a cap of attention's scores": self.score_cap is not None,
            "multipliers of states": (self.residual_multiplier, self.embedding_multiplier) != (1.0, 1.0),
            "heads that are turned in part": self.rotary_dim != self.head_dim,
            "blocks without rotation": bool(self.without_rotary),
        }
        return next((what for what, is_there in found.items() if is_there), None)

    def norm_weight(self, norm: Any) -> Tensor:
        """What a library's norm multiplies by: as it is, or float32 where the product is rounded once."""
        if not self.rounds_once:
            return norm.weight
        weight = norm.weight.detach().float()
        return 1.0 + weight if self.adds_one else weight


def layout_of(config: Any, family: Family, block: Any, embedding: nn.Embedding, rotary_dim: int) -> BlockLayout:
    """The layout of blocks that `families` calls fused.

    Args:
        block: any of them; they are alike. rotary_dim: see `BlockLayout`.
    """
    attention, mlp = block.self_attn, block.mlp
    head_dim, inner = int(attention.head_dim), int(mlp.down_proj.in_features)
    before, behind = IN_FRONT, NOWHERE
    if hasattr(block, "pre_feedforward_layernorm"):
        before, behind = IN_FRONT_TOO, BEHIND
    elif hasattr(block, "post_feedforward_layernorm"):
        before, behind = NOWHERE, BEHIND
    q_norm = getattr(attention, "q_norm", None)
    scale_of_embedding = getattr(embedding, "embed_scale", None)  # Gemma's, rounded like the weights
    multiplier = getattr(config, "embedding_multiplier", None)  # Granite's
    if scale_of_embedding is not None:
        multiplier = float(scale_of_embedding.to(embedding.weight.dtype))
    return BlockLayout(
        query_heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=head_dim,
        hidden=int(config.hidden_size),
        inner=inner,
        eps=float(config.rms_norm_eps),
        activation=str(getattr(config, "hidden_activation", None) or config.hidden_act),
        scale=float(attention.scaling),
        rotary_dim=rotary_dim,
        norms_before=before,
        norms_behind=behind,
        rounds_once=family.rounds_once,
        adds_one=family.adds_one,
        norms_all_heads=q_norm is not None and q_norm.weight.numel() != head_dim,
        is_merged=hasattr(attention, "qkv_proj"),
        without_rotary=frozenset(_without_rotary(config)),
        score_cap=getattr(config, "attn_logit_softcapping", None) if family.caps_scores else None,
        residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
        embedding_multiplier=1.0 if multiplier is None else float(multiplier),
    )


def _without_rotary(config: Any) -> list[int]:
    """SmolLM3 tells it block by block; with EXAONE 4's windows it is the blocks without one."""
    blocks = range(config.num_hidden_layers)
    if getattr(config, "no_rope_layers", None):
        return [block for block in blocks if not config.no_rope_layers[block]]
    if config.model_type == "exaone4" and config.sliding_window is not None:
        return [block for block in blocks if config.layer_types[block] != "sliding_attention"]
    return []
