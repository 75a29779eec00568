"""What attentions of the heads' own share: their shape, rotary tables, and a KV cache over one text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.backbone.output import AttentionShape

GROWTH = 512


def rotary(positions: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """cos and sin for `rotate`, [positions, head_dim] float32 each; sin with the sign of the turned half (Su et al. 2021)."""
    if shape.scaled is None:
        exponents = -torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32) / shape.head_dim
        frequencies, factor = shape.rope_theta**exponents, 1.0
    else:
        frequencies = torch.tensor(shape.scaled.frequencies, device=positions.device)
        factor = shape.scaled.factor
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return cos.repeat(1, 2), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [*, head_dim] by the tables of `rotary`, first half against second."""
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sin.to(x.dtype)


class HeadCache:
    """Keys and values of one attention over one text: verified positions first, what is drafted behind them.

    keys, values: [kv_heads, capacity, head_dim]. cos, sin: [capacity, 1, head_dim], the tables of `rotate`.
    length: positions that are verified.
    """

    def __init__(self, shape: AttentionShape, like: Tensor) -> None:
        self.shape, self.like = shape, like
        self.keys = self.values = self.cos = self.sin = torch.empty(0)
        self.length = 0

    def fork(self) -> HeadCache:
        """An empty one for another text."""
        return type(self)(self.shape, self.like)

    def reserve(self, length: int) -> None:
        """Make room for so many positions."""
        if self.keys.numel() and length <= self.keys.shape[1]:
            return
        capacity, size = -(-length // GROWTH) * GROWTH, self.shape.head_dim
        grown = [self.like.new_zeros(self.shape.kv_heads, capacity, size) for _ in range(2)]
        for new, old in zip(grown, (self.keys, self.values), strict=True):
            if old.numel():
                new[:, : old.shape[1]] = old
        self.keys, self.values = grown
        cos, sin = rotary(torch.arange(capacity, device=self.like.device), self.shape)
        self.cos, self.sin = cos.to(self.like.dtype)[:, None], sin.to(self.like.dtype)[:, None]
        self.moved()

    def moved(self) -> None:
        """Called when keys, values and tables have come to lie elsewhere."""

    def attend(self, qkv: Tensor, position: int, queries: int) -> Tensor:
        """Keep keys and values of rows at `position`, and attend from the last rows over all up to their own.

        Args:
            qkv: [rows, (query_heads + 2 kv_heads) * head_dim], queries, then keys, then values.
            queries: how many of the last rows attend.

        Returns:
            [queries, query_heads * head_dim].
        """
        shape, rows = self.shape, qkv.shape[0]
        end = position + rows
        self.reserve(end)
        heads = shape.query_heads + shape.kv_heads
        split = qkv.view(rows, heads + shape.kv_heads, shape.head_dim)
        qk = rotate(split[:, :heads], self.cos[position:end], self.sin[position:end])
        self.keys[:, position:end] = qk[:, shape.query_heads :].transpose(0, 1)
        self.values[:, position:end] = split[:, heads:].transpose(0, 1)
        group = shape.query_heads // shape.kv_heads
        # Rows (token, query head) of one key head side by side: [kv_heads, queries * group, head_dim]
        query = qk[-queries:, : shape.query_heads].reshape(queries, shape.kv_heads, group, shape.head_dim)
        mask = None
        if queries > 1:
            places = torch.arange(end, device=qkv.device)
            mask = (places <= places[end - queries :, None]).repeat_interleave(group, 0)
        query = query.transpose(0, 1).reshape(1, shape.kv_heads, queries * group, shape.head_dim)
        keys, values = self.keys[None, :, :end], self.values[None, :, :end]
        if query.device.type == "cuda":  # the library plans its kernel anew for every length, in 50 ms
            scores = query @ keys.transpose(2, 3) * shape.head_dim**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            attended = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype) @ values
        else:
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        return attended.view(shape.kv_heads, queries, -1).transpose(0, 1).reshape(queries, -1)
