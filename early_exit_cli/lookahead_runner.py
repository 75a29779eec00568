"""The lookahead head over one text, in PyTorch: its KV cache, reading what was verified, and steps of its own.

Drafts may be approximate, so on a CPU the head's products run in int8 (docs/decisions/0010).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.blocks import LARGEST_WIDTH
from early_exit_cli.gating import entropy
from early_exit_cli.lm_head import int8_rows
from early_exit_cli.lookahead import LookaheadHead, rotary
from early_exit_cli.sampling import GREEDY, Chooser

LinearMap = Callable[[Tensor], Tensor]

GROWTH = 512
KEPT_TOGETHER = 16
"""Compiled code keeps the keys of so many tokens together."""


def draft_linear(weights: list[Tensor]) -> LinearMap:
    """x [rows, in] -> [rows, sum of out]: for a few rows on the CPU in int8 with a scale a row, else the weights as they are."""
    weight = torch.cat(weights)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not hasattr(torch, "_weight_int8pack_mm"):
        return lambda x: F.linear(x, weight)
    quantized, scales = int8_rows(weight.float())
    return lambda x: (
        torch._weight_int8pack_mm(x, quantized, scales) if x.shape[0] <= LARGEST_WIDTH else F.linear(x, weight)
    )


class LookaheadRunner:
    """The head over one text: a KV cache of its own, true states first, its own steps behind them until they are verified."""

    def __init__(self, head: LookaheadHead) -> None:
        block, attention = head.block, head.block.self_attn
        self.head = head
        self.query_heads, self.kv_heads, self.head_dim = (
            attention.query_heads,
            attention.kv_heads,
            attention.head_dim,
        )
        self.inner = block.mlp.down_proj.in_features
        self.length = 0
        """Positions whose true states were read."""
        self.keys = self.values = self.cos = self.sin = torch.empty(0)
        self.load_weights()

    def load_weights(self) -> None:
        """Bring the head's weights into the form in which they are multiplied."""
        block, attention = self.head.block, self.head.block.self_attn
        self.fc = draft_linear([self.head.fc.weight])
        self.qkv = draft_linear([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        self.output = draft_linear([attention.o_proj.weight])
        self.gate_up = draft_linear([block.mlp.gate_proj.weight, block.mlp.up_proj.weight])
        self.down = draft_linear([block.mlp.down_proj.weight])
        self.lm_head = draft_linear([self.head.lm_head_weight])

    def reset(self) -> None:
        """Begin another text."""
        self.length = 0

    def another(self) -> LookaheadRunner:
        """The same weights over another text."""
        other = copy.copy(self)
        other.keys = other.values = torch.empty(0)
        other.reset()
        return other

    def reserve(self, length: int) -> None:
        if self.keys.numel() and length <= self.keys.shape[1]:
            return
        capacity = -(-length // GROWTH) * GROWTH
        weight = self.head.fc.weight
        kept = -(-self.length // KEPT_TOGETHER) * KEPT_TOGETHER
        grown = [weight.new_zeros(self.kv_heads, capacity, self.head_dim) for _ in range(2)]
        if kept:
            grown[0][:, :kept], grown[1][:, :kept] = self.keys[:, :kept], self.values[:, :kept]
        self.keys, self.values = grown
        positions = torch.arange(capacity, device=weight.device)
        cos, sin = rotary(positions, self.head_dim, self.head.rope_theta)
        half = self.head_dim // 2
        sin = torch.cat((-sin[:, :half], sin[:, half:]), -1)  # carries the sign of the turned half
        self.cos, self.sin = cos.to(weight.dtype)[:, None], sin.to(weight.dtype)[:, None]  # [capacity, 1, head_dim]

    def read(self, tokens: list[int], states: list[Tensor]) -> Tensor:
        """Take in verified positions -> the state [1, hidden] that says the token after the last of `tokens`.

        Args:
            tokens: the one that follows each position.
            states: after the exit layers and the final normed one, [rows, hidden] each.
        """
        hidden = self._block(tokens, self.fc(self.head.normed(states)), self.length)
        self.length += len(tokens)
        return hidden[-1:]

    def step(self, token: int, hidden: Tensor, ahead: int) -> Tensor:
        """Roll forward from its own state: a token, [1, hidden], the steps before this one + 1 -> [1, hidden]."""
        return self._block([token], hidden, self.length + ahead - 1)

    def _block(self, tokens: list[int], hidden: Tensor, position: int) -> Tensor:
        head, block, rows = self.head, self.head.block, len(tokens)
        ids = torch.tensor(tokens, device=hidden.device)
        end = position + rows
        self.reserve(end)
        joined = torch.cat(
            (block.input_layernorm(F.embedding(ids, head.embedding_weight)), block.hidden_norm(hidden)), -1
        )
        heads = self.query_heads + self.kv_heads
        qkv = self.qkv(joined).view(rows, heads + self.kv_heads, self.head_dim)
        qk = qkv[:, :heads]
        qk = qk * self.cos[position:end] + qk.roll(self.head_dim // 2, -1) * self.sin[position:end]
        self.keys[:, position:end] = qk[:, self.query_heads :].transpose(0, 1)
        self.values[:, position:end] = qkv[:, heads:].transpose(0, 1)
        group = self.query_heads // self.kv_heads
        # Rows (token, query head) of one key head side by side: [kv_heads, rows * group, head_dim]
        query = qk[:, : self.query_heads].reshape(rows, self.kv_heads, group, self.head_dim).transpose(0, 1)
        mask = None
        if rows > 1:
            seen = torch.arange(end, device=hidden.device) <= torch.arange(position, end, device=hidden.device)[:, None]
            mask = seen.repeat_interleave(group, 0)
        attended = F.scaled_dot_product_attention(
            query.reshape(1, self.kv_heads, rows * group, self.head_dim),
            self.keys[None, :, :end],
            self.values[None, :, :end],
            attn_mask=mask,
        )
        attended = attended.view(self.kv_heads, rows, -1).transpose(0, 1).reshape(rows, -1)
        hidden = hidden + self.output(attended)
        gate_up = self.gate_up(block.post_attention_layernorm(hidden))
        hidden = hidden + self.down(block.mlp.activation(gate_up[:, : self.inner]) * gate_up[:, self.inner :])
        return head.norm(hidden)

    def choose(
        self, hidden: Tensor, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[int, float]:
        """[1, hidden] -> its token (`Chooser.draft`), and its entropy (nats)."""
        logits = self.lm_head(hidden)
        token = chooser.draft(logits, self.head.draft_vocab, list(drafted), temperature)
        return token, float(entropy(logits))
