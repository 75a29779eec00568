"""The drafter that promises the most tokens per millisecond, asked anew each round."""

from __future__ import annotations

from collections.abc import Container

from torch import Tensor

from early_exit_cli.drafting.drafter import Draft, Drafter, show
from early_exit_cli.engine import Engine
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.sampling import GREEDY, Chooser


class AutoDrafter(Drafter):
    """Asks the drafter that promises the most tokens per millisecond, then the others in their order.

    Args:
        choices: drafters in order of preference, each with the most tokens it may draft.
        plain_cost: milliseconds of a pass without a draft.
    """

    name = "auto"

    def __init__(self, choices: list[tuple[Drafter, int]], plain_cost: float = 0.0) -> None:
        self.choices = choices
        self.plain_cost = plain_cost

    def bind(self, engine: Engine) -> None:
        super().bind(engine)
        for drafter, _ in self.choices:
            drafter.bind(engine)
        self.exit_layers = sorted({layer for drafter, _ in self.choices for layer in drafter.exit_layers})

    def begin(self, prompt_ids: list[int], chooser: Chooser = GREEDY) -> None:
        for drafter, _ in self.choices:
            drafter.begin(prompt_ids, chooser)

    def fork(self) -> Drafter:
        return AutoDrafter([(drafter.fork(), longest) for drafter, longest in self.choices], self.plain_cost)

    def resize_batch(self, batch_size: int) -> None:
        for drafter, _ in self.choices:
            drafter.resize_batch(batch_size)

    def process(self, tokens: list[int], states: list[Tensor]) -> None:
        for drafter, _ in self.choices:
            show(drafter, tokens, self.exit_layers, states)

    def draft(self, engine: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        draft = Draft()
        if self.times is not None and not self.times.knows_plain:
            return draft
        for drafter, longest in sorted(
            self.choices, key=lambda choice: -choice[0].expected_rate(min(limit, choice[1]))
        ):
            draft = drafter.draft(engine, cache, pending, min(limit, longest), stop_ids)
            if draft.tokens:
                break
        return draft

    def accept(self, draft: Draft, tokens: list[int], accepted: int) -> None:
        for drafter, _ in self.choices:
            drafter.accept(draft, tokens, accepted)

    def timed(self, draft: Draft, milliseconds: float) -> bool:
        claimed = [drafter.timed(draft, milliseconds) for drafter, _ in self.choices]
        if self.times is not None and not any(claimed) and not draft.tokens:
            self.times.observe("", milliseconds, self.plain_cost)
        return any(claimed)
