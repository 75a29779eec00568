"""One decoder block of the Llama shape, written once: whoever runs it brings the attention over its own KV cache.

The order of floating-point operations is part of the contract: what is bit-exact elsewhere rests on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.runtime.nf4_linear import LinearMap, merged_linear

Attention = Callable[[Tensor, Tensor], Tensor]
"""(rotated queries and keys [*lead, query_heads + kv_heads, head_dim], values [*lead, kv_heads, head_dim]) -> attended
[rows, query_heads * head_dim]. It keeps the keys and values too."""


@dataclass(frozen=True)
class LlamaBlock:
    """RMSNorm, rotary embedding, attention, gated MLP; queries, keys and values are one product, gate and up another.

    qk_norm: [query_heads + kv_heads, head_dim], for models that norm queries and keys (Qwen3). inner: of the MLP.
    """

    input_norm: Tensor
    qkv: LinearMap
    qk_norm: Tensor | None
    output: LinearMap
    mlp_norm: Tensor
    gate_up: LinearMap
    down: LinearMap
    inner: int
    activation: Callable[[Tensor], Tensor]
    eps: float
    query_heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def merged(
        cls,
        block: Any,
        activation: Callable[[Tensor], Tensor],
        eps: float,
        query_heads: int,
        kv_heads: int,
        head_dim: int,
    ) -> LlamaBlock:
        """The library's block, with products of one input merged."""
        attention, mlp = block.self_attn, block.mlp
        qk_norm = None
        if getattr(attention, "q_norm", None) is not None:
            norms = (attention.q_norm.weight.expand(query_heads, -1), attention.k_norm.weight.expand(kv_heads, -1))
            qk_norm = torch.cat(norms)
        return cls(
            input_norm=block.input_layernorm.weight,
            qkv=merged_linear([attention.q_proj, attention.k_proj, attention.v_proj]),
            qk_norm=qk_norm,
            output=merged_linear([attention.o_proj]),
            mlp_norm=block.post_attention_layernorm.weight,
            gate_up=merged_linear([mlp.gate_proj, mlp.up_proj]),
            down=merged_linear([mlp.down_proj]),
            inner=int(mlp.down_proj.in_features),
            activation=activation,
            eps=eps,
            query_heads=query_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
        )

    def run(self, hidden: Tensor, lead: tuple[int, ...], rotary: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[rows, hidden] -> [rows, hidden].

        Args:
            lead: how the rows lie: (rows,) of one text, (texts, width) side by side.
            rotary: cos and sin, which broadcast to [*lead, heads, head_dim]; sin carries the sign of rotate_half.
        """
        heads, size = self.query_heads + self.kv_heads, (hidden.shape[1],)
        cos, sin = rotary
        qkv = self.qkv(self.input_norm * F.rms_norm(hidden, size, None, self.eps))
        qk = qkv[:, : heads * self.head_dim].view(*lead, heads, self.head_dim)
        if self.qk_norm is not None:
            qk = self.qk_norm * F.rms_norm(qk, (self.head_dim,), None, self.eps)
        qk = qk * cos + qk.roll(self.head_dim // 2, -1) * sin
        values = qkv[:, heads * self.head_dim :].view(*lead, self.kv_heads, self.head_dim)
        hidden = hidden + self.output(attention(qk, values))
        gate_up = self.gate_up(self.mlp_norm * F.rms_norm(hidden, size, None, self.eps))  # [rows, 2 * inner]
        return hidden + self.down(self.activation(gate_up[:, : self.inner]) * gate_up[:, self.inner :])
