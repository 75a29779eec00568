"""What proposes tokens. A drafter is asked for at most `limit` tokens and says how sure it was of each.

`NoDrafter` never proposes, which makes the decoding loop plain decoding. `ExitDrafter` is early exit: it runs a token to
the first exit layer, reads its head, exits when the head's entropy is below its threshold, and otherwise goes on to the
next head; when no head exits, drafting ends and the round is verified. `FixedDrafter` lets one head draft everything.
`lookup.LookupDrafter` drafts from the text, `eagle.EagleDrafter` rolls forward from verified states.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from early_exit_cli.drafting.reasons import Reason
from early_exit_cli.engine import Engine, Row
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.runtime.round_times import RoundTimes
from early_exit_cli.sampling import GREEDY, Chooser


@dataclass(frozen=True)
class Draft:
    """Proposed tokens and what was computed for them.

    tokens: the proposals, for the positions after the pending token. reasons: why, one for each token.
    rows: the states of the pending token and of the drafted ones; empty when nothing was run. The last drafted token
    has no row when it ends the text.
    """

    tokens: list[int] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Drafter(ABC):
    """Proposes tokens that follow `pending`, which stands at `cache.length` and has not been run yet."""

    name: ClassVar[str]
    """Of the method, in records."""
    exit_layers: Sequence[int] = ()
    """Layers after which it wants to see the states of verified tokens."""
    chooser: Chooser = GREEDY
    """How the text's tokens are chosen, and so the drafted ones."""
    batch_size: int = 1
    """Texts that have a row in the same passes, this one among them."""

    times: RoundTimes | None = None
    """What rounds take here beyond their parts, where that is learned: on a GPU."""

    def bind(self, engine: Engine) -> None:
        """The model that the next text is decoded by; called before `exit_layers` is asked for."""
        if engine.backbone.device.type == "cuda":
            self.times = engine.round_times

    def begin(self, prompt_ids: list[int], chooser: Chooser = GREEDY) -> None:
        """A new text starts with these tokens."""
        self.chooser = chooser

    def fork(self) -> Drafter:
        """A drafter like this one for another text at the same time; what is learned is shared, the text is not."""
        return copy.copy(self)

    def resize_batch(self, batch_size: int) -> None:
        """From now on so many texts stand in the same passes, this one among them."""
        self.batch_size = batch_size

    def process(self, tokens: list[int], states: list[Tensor]) -> None:  # noqa: B027
        """States of verified positions, for a drafter with `exit_layers`; called for the prompt too.

        Args:
            tokens: the token that follows each of the positions.
            states: after each of `exit_layers`, and the final normed state, [len(tokens), hidden] each.
        """

    def expected_rate(self, limit: int) -> float:
        """Tokens per millisecond expected of a draft of at most `limit` tokens now; 0 where it has none to make."""
        return 0.0

    @abstractmethod
    def draft(self, engine: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        """At most `limit` tokens."""

    def accept(self, draft: Draft, tokens: list[int], accepted: int) -> None:  # noqa: B027
        """A round is over: `tokens` were committed, the first `accepted` of them from the draft."""

    def timed(self, draft: Draft, milliseconds: float) -> bool:
        """What the round took, drafting included, where one text was decoded; whether this one spent time on the draft."""
        return False


def show(drafter: Drafter, tokens: list[int], layers: Sequence[int], states: list[Tensor]) -> None:
    """Let a drafter see verified positions, if it wants to.

    Args:
        states: after `layers`, its own among them, and the final normed state (`Drafter.process`).
    """
    if drafter.exit_layers:
        drafter.process(tokens, [*(states[layers.index(layer)] for layer in drafter.exit_layers), states[-1]])


class NoDrafter(Drafter):
    """Plain decoding: never proposes."""

    name = "full"

    def draft(self, engine: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        return Draft()
