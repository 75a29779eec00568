"""One decoder block of the Llama shape or near it, written once: whoever runs it brings the attention over its own KV cache.

The order of floating-point operations is part of the contract: what is bit-exact elsewhere rests on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.backbone.block_layout import BlockLayout
from early_exit_cli.runtime.nf4_linear import LinearMap, merged_linear

Attention = Callable[[Tensor, Tensor], Tensor]
"""(rotated queries and keys [*lead, query_heads + kv_heads, head_dim], values [*lead, kv_heads, head_dim]) -> attended
[rows, query_heads * head_dim]. It keeps the keys and values too."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm over the last dimension of `weight` [*, size], which is in float32 where only the product is rounded."""

    weight: Tensor
    eps: float
    rounds_once: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        size = self.weight.shape[-1:]
        if self.rounds_once:
            return (self.weight * F.rms_norm(x.float(), size, None, self.eps)).to(x.dtype)
        return self.weight * F.rms_norm(x, size, None, self.eps)


@dataclass(frozen=True)
class LlamaBlock:
    """RMSNorm, rotary embedding, attention, gated MLP; queries, keys and values are one product, gate and up another. What
    departs from Llama, `layout` says.

    input_norm, mlp_norm, behind_attention, behind_mlp: see `BlockLayout`. qk_norm: of each head alone, its weight
    [query_heads + kv_heads, head_dim]. q_norm, k_norm: of all heads together, [query_heads * head_dim] and
    [kv_heads * head_dim].
    """

    layout: BlockLayout
    input_norm: Norm | None
    qkv: LinearMap
    qk_norm: Norm | None
    q_norm: Norm | None
    k_norm: Norm | None
    output: LinearMap
    behind_attention: Norm | None
    mlp_norm: Norm | None
    gate_up: LinearMap
    down: LinearMap
    behind_mlp: Norm | None
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def merged(cls, block: Any, layout: BlockLayout, activation: Callable[[Tensor], Tensor]) -> LlamaBlock:
        """The library's block, with products of one input merged."""
        attention, mlp = block.self_attn, block.mlp

        def norm(weight: Tensor) -> Norm:
            return Norm(weight, layout.eps, layout.rounds_once)

        def named(name: str | None) -> Norm | None:
            return None if name is None else norm(layout.norm_weight(getattr(block, name)))

        q_norm = k_norm = qk_norm = None
        if getattr(attention, "q_norm", None) is not None:
            q_norm, k_norm = (norm(layout.norm_weight(found)) for found in (attention.q_norm, attention.k_norm))
            if not layout.norms_all_heads:
                heads = (q_norm.weight.expand(layout.query_heads, -1), k_norm.weight.expand(layout.kv_heads, -1))
                q_norm, k_norm, qk_norm = None, None, norm(torch.cat(heads))
        if layout.is_merged:
            qkv, gate_up = [attention.qkv_proj], [mlp.gate_up_proj]
        else:
            qkv, gate_up = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        input_norm, mlp_norm = map(named, layout.norms_before)
        behind_attention, behind_mlp = map(named, layout.norms_behind)
        return cls(
            layout=layout,
            input_norm=input_norm,
            qkv=merged_linear(qkv),
            qk_norm=qk_norm,
            q_norm=q_norm,
            k_norm=k_norm,
            output=merged_linear([attention.o_proj]),
            behind_attention=behind_attention,
            mlp_norm=mlp_norm,
            gate_up=merged_linear(gate_up),
            down=merged_linear([mlp.down_proj]),
            behind_mlp=behind_mlp,
            activation=activation,
        )

    def run(self, hidden: Tensor, lead: tuple[int, ...], rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[rows, hidden] -> [rows, hidden].

        Args:
            lead: how the rows lie: (rows,) of one text, (texts, width) side by side.
            rotary: cos and sin, which broadcast to [*lead, heads, head_dim]; sin carries the sign of rotate_half.
        """
        layout = self.layout
        heads, head_dim, inner = layout.query_heads + layout.kv_heads, layout.head_dim, layout.inner
        cos, sin = rotary
        qkv = self.qkv(_normed(self.input_norm, hidden))
        qk = qkv[:, : heads * head_dim]
        if self.q_norm is not None and self.k_norm is not None:
            queries = layout.query_heads * head_dim
            qk = torch.cat((self.q_norm(qk[:, :queries]), self.k_norm(qk[:, queries:])), -1)
        qk = _normed(self.qk_norm, qk.view(*lead, heads, head_dim))
        qk = (qk * cos + self._other_halves(qk) * sin).to(qkv.dtype)  # OLMo's tables are in float32
        values = qkv[:, heads * head_dim :].view(*lead, layout.kv_heads, head_dim)
        hidden = self._added(hidden, self.output(attention(qk, values)), self.behind_attention)
        gate_up = self.gate_up(_normed(self.mlp_norm, hidden))  # [rows, 2 * inner]
        made = self.down(self.activation(gate_up[:, :inner]) * gate_up[:, inner:])
        return self._added(hidden, made, self.behind_mlp)

    def _other_halves(self, qk: Tensor) -> Tensor:
        """For each number of a head the one that it is turned with; behind the turned ones, whose sin is 0, itself."""
        half = self.layout.rotary_dim // 2
        if 2 * half == qk.shape[-1]:
            return qk.roll(half, -1)
        return torch.cat((qk[..., half : 2 * half], qk[..., :half], qk[..., 2 * half :]), -1)

    def _added(self, hidden: Tensor, made: Tensor, behind: Norm | None) -> Tensor:
        made = _normed(behind, made)
        return hidden + (made if self.layout.residual_multiplier == 1.0 else made * self.layout.residual_multiplier)


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
