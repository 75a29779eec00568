"""What every exit head says of a text's tokens, for a trace: in the heads' own weights, whoever drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from early_exit_cli.engine import Engine, Row, catch_up
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.exit_runner import ExitRunner
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.runtime.kv_cache import KVCache


@dataclass(frozen=True)
class TracedHead:
    """What one head said for a token: its choice and its entropy (nats)."""

    head: int
    token_id: int
    entropy: float


class HeadViews:
    """All heads over one text."""

    def __init__(self, engine: Engine, heads: ExitHeads) -> None:
        self.engine, self.heads, self.layers = engine, heads, heads.exit_layers
        self.reader = ExitRunner(heads)
        self.watched = self.reader.watched(range(len(heads)))

    @property
    def exit_layers(self) -> list[int]:
        """Layers after which it must see the states of verified tokens."""
        return [self.layers[head] for head in self.watched]

    def process(self, layers: Sequence[int], states: Sequence[Tensor]) -> None:
        """States of verified positions after `layers`, its own among them, [rows, hidden] each."""
        for head in self.watched:
            self.reader.process(head, states[layers.index(self.layers[head])])

    def read(self, cache: KVCache, rows: list[Row], stops: Sequence[int] = ()) -> list[list[TracedHead]]:
        """What every head says for the rows of a round, a list a row; they go as deep as the deepest head.

        Args:
            stops: layers whose states the rows should keep too.
        """
        traced: list[list[TracedHead]] = [[] for _ in rows]
        heads = {layer: head for head, layer in enumerate(self.layers)}
        for layer in sorted({*heads, *stops}):
            catch_up(self.engine, cache, rows, layer)
            if layer not in heads:
                continue
            logits = self.reader.logits_of(heads[layer], [row[layer] for row in rows], len(rows))
            chosen = self.heads.token_ids(logits.argmax(-1)).tolist()
            for own, token, uncertainty in zip(traced, chosen, entropy(logits).tolist(), strict=True):
                own.append(TracedHead(heads[layer], token, uncertainty))
        return traced
