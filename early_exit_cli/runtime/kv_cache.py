"""The KV cache of one text: a preallocated buffer a block, and what a pass needs to know of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

LARGEST_WIDTH = 16
"""The most rows of a decoding pass; wider passes are the prefill's."""
Rotary = dict[str | None, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Rows:
    """What a pass needs to know of its rows, made once and shared by all blocks.

    place: where they stand, a slice or, when only the device knows, [width] int64. keys: how many are read.
    rotary: cos and sin, [width, 1, rotary dimensions] each, by the kind of block (`Backbone.rotary_kind`).
    masks: window -> additive mask [1, 1, width, keys]. grouped: the same with each row repeated for the query heads
    of a key head, [1, 1, width * group, keys].
    """

    place: slice | Tensor
    width: int
    keys: int
    rotary: Rotary
    masks: dict[int | None, Tensor]
    grouped: dict[int | None, Tensor]


class KVCache:
    """Keys and values of every block, [kv_heads, capacity, head_dim] each, and the number of committed tokens.

    rotary: cos and sin as in `Rows`, [limit, 1, rotary dimensions] each. limit is what the request may need, capacity
    what is allocated.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], rotary: Rotary, limit: int) -> None:
        self.keys = keys
        self.values = values
        self.rotary = rotary
        self.limit = limit
        self.length = 0
        self.rows: Rows | None = None
        self.addresses: Any = None
        """Where the buffers are, for compiled code (`native_buffers.Addresses`)."""

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    def grow(self, capacity: int) -> None:
        """Move to buffers of `capacity` tokens: contiguous ones, which products read several times faster."""
        for buffers in (self.keys, self.values):
            for block, old in enumerate(buffers):
                buffers[block] = F.pad(old, (0, 0, 0, capacity - old.shape[1]))


@dataclass(frozen=True)
class Part:
    """Rows of one text in a pass over several: `width` of them, at `position` of its KV cache."""

    cache: KVCache
    position: int
    width: int
