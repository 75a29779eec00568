"""Drafting with exit heads: gated by entropy, or one head for every token."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from early_exit_cli.config_training import UncertaintyMetric
from early_exit_cli.drafting.drafter import Draft, Drafter
from early_exit_cli.drafting.reasons import Exit
from early_exit_cli.engine import Engine, catch_up
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.exit_runner import ExitRunner
from early_exit_cli.heads.uncertainty import may_exit
from early_exit_cli.runtime.kv_cache import KVCache


@dataclass
class ExitDrafter(Drafter):
    """Early exit with the thresholds of one target accuracy.

    thresholds: in the units of metric, one per head in depth order. active: the heads that are read, ascending; all by
    default. temperature: of the heads' distributions, where tokens are sampled.
    """

    name: ClassVar[str] = "adaptive_early_exit"
    thresholds: list[float]
    active: list[int] | None = None
    metric: UncertaintyMetric = "entropy"
    temperature: float = 1.0
    reader: ExitRunner | None = field(default=None, init=False, repr=False)
    watched: list[int] = field(default_factory=list, init=False, repr=False)
    """The active heads whose attention looks at the text."""

    def bind(self, engine: Engine) -> None:
        super().bind(engine)
        if engine.heads is None or not self._active():
            return
        self.reader = engine.exit_runner.fork()
        self.watched = self.reader.watched(self._active())
        self.exit_layers = [engine.heads.exit_layers[head] for head in self.watched]
        engine.blocks.prepare_parts([engine.heads.exit_layers[head] for head in self._active()])

    def process(self, tokens: list[int], states: list[Tensor]) -> None:
        if self.reader is not None:
            for head, seen in zip(self.watched, states):  # noqa: B905 (the final state is the last one)
                self.reader.process(head, seen)

    def _active(self) -> list[int]:
        return list(range(len(self.thresholds))) if self.active is None else self.active

    def draft(self, engine: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        heads, reader, active = engine.heads, self.reader, self._active()
        if limit < 1 or heads is None or reader is None or not active:
            return Draft()
        first_layer = heads.exit_layers[active[0]]
        draft = Draft()
        token = pending
        while True:
            position = cache.length + len(draft.tokens)
            draft.rows.append({first_layer: engine.run(engine.embed([token]), cache, position, 0, first_layer)})
            if len(draft.tokens) == limit:
                return draft
            found = self._read_heads(engine, heads, reader, active, cache, draft)
            if found is None:
                return draft
            token, reason = found
            draft.tokens.append(token)
            draft.reasons.append(reason)
            if token in stop_ids:
                return draft

    def _read_heads(
        self, engine: Engine, heads: ExitHeads, reader: ExitRunner, active: list[int], cache: KVCache, draft: Draft
    ) -> tuple[int, Exit] | None:
        """Go from head to head with the last row until one is sure; None when none is.

        A deeper head needs the keys of the drafted tokens before it, so these go deeper too, in the same pass: blocks
        that verification would have to run anyway.
        """
        for head in active:
            exit_layer, threshold = heads.exit_layers[head], self.thresholds[head]
            catch_up(engine, cache, draft.rows, exit_layer)
            found = reader.read(head, [row[exit_layer] for row in draft.rows], self.metric)
            if may_exit(found, threshold):
                token = reader.token(self.chooser, draft.tokens, self.temperature)
                return token, Exit(head, exit_layer, found, threshold)
        return None


class FixedDrafter(ExitDrafter):
    """One head drafts every token, however sure it is: as many as the decoding loop asks for."""

    name = "fixed_layerskip"

    def __init__(self, head: int) -> None:
        super().__init__([float("inf")] * (head + 1), [head])


class DynamicDrafter(ExitDrafter):
    """DSSD's gated exits: every head is read, whatever that costs here."""

    name = "dynamic_early_exit"
