"""The checkpoint's MTP layer over one text: a KV cache of its own, reading what was verified, and steps of its own.

As an EAGLE head it reads verified positions and rolls out from the last one. Where no state of the backbone is known yet, the
layer's own normed output of the step before stands in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from early_exit_cli.backbone.mtp import MtpLayer
from early_exit_cli.heads.head_runner import HeadRunner
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.runtime.blocks import PREFILL_WIDTH, Blocks
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.sampling import GREEDY, Chooser

ROOM = 1024
"""Positions of rotary tables that a text begins with."""


@dataclass(frozen=True)
class MtpHead:
    """The layer, ready to run beside its backbone's blocks.

    blocks: run the layer's block. exit_layers: the last block, whose state comes with the final normed one, which is read.
    lm_head: final states [rows, hidden] -> [rows, vocab].
    """

    layer: MtpLayer
    blocks: Blocks
    exit_layers: list[int]
    lm_head: Callable[[Tensor], Tensor]
    kind: ClassVar[str] = "MTP layer"
    identity: ClassVar[dict[str, str]] = {}
    """What measurements of it are named by, besides the backbone, which it belongs to."""


class MtpRunner(HeadRunner):
    """The layer over one text."""

    cache: KVCache

    def __init__(self, head: MtpHead) -> None:
        self.head = head
        self.cache = head.blocks.new_cache(ROOM)

    def fork(self) -> MtpRunner:
        other = copy.copy(self)
        other.cache = self.head.blocks.new_cache(ROOM)
        return other

    def read(self, tokens: list[int], states: list[Tensor]) -> Tensor:
        """`HeadRunner.read`; of the states, the final normed ones are read, which come last."""
        hidden = states[-1][:0]
        for start in range(0, len(tokens), PREFILL_WIDTH):
            piece = slice(start, start + PREFILL_WIDTH)
            hidden = self._run(tokens[piece], states[-1][piece], self.cache.length)
            self.cache.length += len(tokens[piece])
        return hidden

    def step(self, token: int, hidden: Tensor, ahead: int) -> Tensor:
        return self._run([token], hidden, self.cache.length + ahead - 1)

    def choose(
        self, hidden: Tensor, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[int, float]:
        logits = self.head.lm_head(hidden)
        return chooser.draft(logits, None, list(drafted), temperature), float(entropy(logits))

    def _run(self, tokens: list[int], states: Tensor, position: int) -> Tensor:
        """The layer over rows at `position`; the last one's state, [1, hidden]."""
        layer, blocks = self.head.layer, self.head.blocks
        end = position + len(tokens)
        if end > self.cache.limit:
            self.cache.limit = max(2 * self.cache.limit, -(-end // ROOM) * ROOM)
            self.cache.rotary = blocks.rotary_tables(self.cache.limit)
        read = (layer.embedding_norm(blocks.embed_tokens(tokens)), layer.state_norm(states))
        hidden = blocks.run(layer.join(torch.cat(read, -1)), self.cache, position, 0, 1)
        return blocks.final_norm(hidden[-1:])
