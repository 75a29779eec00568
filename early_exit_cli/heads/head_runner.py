"""What rolls a head out over one text: read what was verified, then step by step what may follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.sampling import GREEDY, Chooser


class HasLength(Protocol):
    """A KV cache of whatever kind."""

    length: int


class HeadRunner(ABC):
    """A head over one text. `cache` holds what it keeps of the text itself: true states first, its own steps behind them until
    they are verified."""

    most_steps: ClassVar[int] = 0
    """Steps that can be run at once (`chain`); 0: only one after another."""
    reads_keys: ClassVar[bool] = False
    """Whether it reads the backbone's keys and values (`follow`), and of the verified states only the last."""
    cache: HasLength

    def follow(self, text: KVCache) -> None:  # noqa: B027
        """What the backbone keeps of the text, up to the position that is drafted from; told before `read`."""

    def rewind(self, length: int = 0) -> None:
        """Forget what was read behind the first `length` positions."""
        self.cache.length = length

    @abstractmethod
    def fork(self) -> HeadRunner:
        """The same weights over another text."""

    @abstractmethod
    def read(self, tokens: list[int], states: list[Tensor]) -> Tensor:
        """Take in verified positions, at least one -> the state [1, hidden] that says the token after the last of `tokens`.

        Args:
            tokens: the one that follows each position.
            states: after the head's exit layers and the final normed one, [rows, hidden] each.
        """

    @abstractmethod
    def step(self, token: int, hidden: Tensor, ahead: int) -> Tensor:
        """Roll forward from its own state: a token, [1, hidden], the steps before this one + 1 -> [1, hidden]."""

    def chain(self, tokens: list[int], states: Sequence[Tensor], count: int) -> tuple[list[int], list[float]]:
        """`read`, then `count` greedy steps at once: their tokens and entropies (nats)."""
        raise NotImplementedError

    @abstractmethod
    def choose(
        self, hidden: Tensor, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[int, float]:
        """[1, hidden] -> its token (`Chooser.draft`), and its entropy (nats)."""
