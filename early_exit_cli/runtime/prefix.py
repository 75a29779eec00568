"""What a text leaves for a later one that begins with the same tokens: keys, values, and the states drafters looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from early_exit_cli.runtime.blocks import GROWTH, KEY_STEP, Blocks
from early_exit_cli.runtime.kv_cache import KeptStates, KVCache

FINAL = -1
"""In the place of an exit layer: after the last block, with the final norm applied."""


@dataclass(frozen=True)
class Prefix:
    """Copies, so that the text's own buffers are free.

    tokens: one for each position. prefilled: how many of them the prefill read; the others were decoded. keys, values:
    [kv_heads, len(tokens) or somewhat more, head_dim] each block: whole steps of keys, since a runner may lay out a step in an
    order of its own. states: exit layer, or FINAL -> [len(tokens), hidden], of those that were
    looked at. kept: the states after all of `tokens`, of blocks that fold them into one: these tokens are taken over
    together or not at all.
    """

    tokens: list[int]
    prefilled: int
    keys: list[Tensor]
    values: list[Tensor]
    states: dict[int, Tensor]
    kept: KeptStates | None = None

    @property
    def bytes(self) -> int:
        """What it takes, tokens aside."""
        held = sum(held.numel() * held.element_size() for held in (*self.keys, *self.values, *self.states.values()))
        return held + (self.kept.bytes if self.kept else 0)

    def reusable(self, blocks: Blocks, prompt_ids: Sequence[int], exit_layers: Sequence[int]) -> int:
        """How many positions of a prompt's prefill are here with the bits that it would compute.

        Args:
            exit_layers: after which somebody wants to see the states.
        """
        if exit_layers and not {*exit_layers, FINAL} <= {*self.states}:
            return 0
        length = len(prompt_ids) - 1  # the last token is decoded
        same = 0
        while same < min(len(self.tokens), length) and self.tokens[same] == prompt_ids[same]:
            same += 1
        shared = blocks.shared_positions(self.prefilled, same, length)
        if self.kept is None:
            return shared
        return self.kept.length if shared >= self.kept.length else 0

    def copy_to(self, cache: KVCache, length: int) -> None:
        """The first `length` positions, into a KV cache that is empty."""
        if cache.capacity < length:
            cache.grow(min(_whole(length, GROWTH), cache.limit))
        whole = _whole(length, KEY_STEP)
        for ours, theirs in ((self.keys, cache.keys), (self.values, cache.values)):
            for block, kept in enumerate(ours):
                theirs[block][:, :whole].copy_(kept[:, :whole])
        if self.kept is not None:
            cache.begin_with(self.kept)

    def states_of(self, exit_layers: Sequence[int], length: int) -> list[Tensor]:
        """What `Engine.prefill` shows of the first `length` positions."""
        return [self.states[layer][:length] for layer in (*exit_layers, FINAL)]


def kept_of(cache: KVCache, tokens: list[int], prefilled: int, states: dict[int, Tensor]) -> Prefix:
    """Copies of what a KV cache holds for `tokens`, the first of its positions.

    Where blocks have a state, only for those whose states it has kept.
    """
    if cache.states:
        tokens = tokens[: cache.kept.length if cache.kept else 0]
    length = len(tokens)
    whole = _whole(length, KEY_STEP)
    keys, values = ([held[:, :whole].clone() for held in buffers] for buffers in (cache.keys, cache.values))
    seen = {layer: kept if len(kept) == length else kept[:length].clone() for layer, kept in states.items()}
    return Prefix(tokens, prefilled, keys, values, seen, cache.kept)


def _whole(length: int, step: int) -> int:
    return -(-length // step) * step
