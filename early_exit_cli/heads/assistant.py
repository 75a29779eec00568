"""A model's assistant over one text: steps of its own, over the keys and values that the backbone keeps of the text.

It keeps nothing of the text itself: rolling back is the length of the backbone's KV cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from early_exit_cli.backbone.assistant import Assistant, Keys
from early_exit_cli.heads.head_runner import HeadRunner
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.sampling import GREEDY, Chooser


@dataclass(frozen=True)
class AssistantHead:
    """The assistant, ready to run beside its backbone's blocks.

    keys_of: kind of block -> the backbone's block whose keys and values are read. exit_layers: the last block, whose state
    comes with the final normed one, which is read. embed: tokens -> [rows, backbone's hidden]. said: [1, hidden] -> logits
    [1, tokens], and the token of each [tokens] int64, None where they are the vocabulary's.
    """

    assistant: Assistant
    keys_of: Mapping[str | None, int]
    exit_layers: list[int]
    embed: Callable[[list[int]], Tensor]
    said: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    kind: ClassVar[str] = "assistant"

    @property
    def identity(self) -> dict[str, str]:
        """What measurements of it are named by, besides the backbone."""
        return {"assistant": self.assistant.content}


class AssistantRunner(HeadRunner):
    """The assistant over one text."""

    reads_keys = True
    cache: KVCache
    """The backbone's."""

    def __init__(self, head: AssistantHead) -> None:
        self.head = head
        self.rotary: Keys = {}
        self.keys: Keys = {}

    def follow(self, text: KVCache) -> None:
        self.cache = text

    def rewind(self, length: int = 0) -> None:
        """Nothing: the text's length says it."""

    def fork(self) -> AssistantRunner:
        return copy.copy(self)

    def read(self, tokens: list[int], states: list[Tensor]) -> Tensor:
        """`HeadRunner.read`, from the length of the text's KV cache; of tokens and states, the last final normed one is read."""
        cache, assistant = self.cache, self.head.assistant
        self.rotary, self.keys = assistant.rotary_at(cache.length), {}
        for kind in {*assistant.kinds}:
            block, seen = self.head.keys_of[kind], assistant.seen(kind, cache.length)
            self.keys[kind] = cache.keys[block][None, :, seen], cache.values[block][None, :, seen]
        return self._run(tokens[-1], states[-1][-1:])

    def step(self, token: int, hidden: Tensor, ahead: int) -> Tensor:
        return self._run(token, self.head.assistant.leave(hidden))

    def choose(
        self, hidden: Tensor, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[int, float]:
        logits, tokens = self.head.said(hidden)
        return chooser.draft(logits, tokens, list(drafted), temperature), float(entropy(logits))

    def _run(self, token: int, state: Tensor) -> Tensor:
        return self.head.assistant.run(self.head.embed([token]), state, self.rotary, self.keys)
