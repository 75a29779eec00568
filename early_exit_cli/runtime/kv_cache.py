"""The KV cache of one text: what each block remembers of it, and what a pass needs to know of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.runtime.block_state import BlockState

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


@dataclass(frozen=True)
class KeptStates:
    """Copies of the states after the first `length` tokens, by the number of the block."""

    length: int
    states: dict[int, BlockState]

    @property
    def bytes(self) -> int:
        return sum(state.bytes for state in self.states.values())


class KVCache:
    """The memory of every block, and the number of committed tokens.

    keys, values: [kv_heads, capacity, head_dim] each block; no heads where it has no attention. states: of blocks that
    have one, by number. rotary: cos and sin as in `Rows`, [limit, 1, rotary dimensions] each. limit is what the request
    may need, capacity what is allocated.
    """

    def __init__(
        self, keys: list[Tensor], values: list[Tensor], rotary: Rotary, limit: int, with_state: Sequence[int] = ()
    ) -> None:
        self.keys = keys
        self.values = values
        self.states = {block: BlockState() for block in with_state}
        self.kept: KeptStates | None = None
        """States to begin a later text with."""
        self.rotary = rotary
        self.limit = limit
        self.length = 0
        self.block_inputs: Tensor | None = None
        """What each block is given of a token besides its state, [limit, blocks, numbers], in families that have such inputs."""
        self.rows: Rows | None = None
        self.addresses: Any = None
        """Where the buffers are, for compiled code (`native_buffers.Addresses`)."""

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    def keep_states(self, length: int) -> None:
        """Keep copies of the states after the first `length` tokens, whose pass was the last one."""
        self.kept = KeptStates(length, {block: state.kept_at(length) for block, state in self.states.items()})

    def begin_with(self, kept: KeptStates) -> None:
        """Continue from states that another text kept."""
        self.kept = kept
        self.states = {block: state.kept_at(kept.length) for block, state in kept.states.items()}

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
