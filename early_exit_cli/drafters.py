"""What proposes tokens. A drafter is asked for at most `limit` tokens and says how sure it was of each.

`NoDrafter` never proposes, which makes the decoding loop plain decoding. `ExitDrafter` is early exit: it runs a token to
the first exit layer, reads its head, exits when the head's entropy is below its threshold, and otherwise goes on to the
next head; when no head exits, drafting ends and the round is verified.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from early_exit_cli.blocks import KVCache
from early_exit_cli.engine import EarlyExitModel
from early_exit_cli.gating import entropy, may_exit


@dataclass(frozen=True)
class Exit:
    """Why a token was drafted: which head (in depth order) exited after how many blocks, and how sure it was (nats)."""

    head: int
    exit_layer: int
    entropy: float
    threshold: float


@dataclass(frozen=True)
class Draft:
    """Proposed tokens and what was computed for them.

    tokens: the proposals, for the positions after the pending token. exits: one Exit per token.
    hidden: [rows, hidden] states of the pending token and the drafted ones after `layer` blocks, for verification to
    resume from; None when nothing was run. The last drafted token has no row when it ends the text.
    """

    tokens: list[int] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    hidden: Tensor | None = None
    layer: int = 0


class Drafter(Protocol):
    """Proposes tokens that follow `pending`, which stands at `cache.length` and has not been run yet."""

    def propose(
        self, model: EarlyExitModel, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]
    ) -> Draft: ...


class NoDrafter:
    """Plain decoding: never proposes."""

    def propose(
        self, model: EarlyExitModel, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]
    ) -> Draft:
        return Draft()


@dataclass
class ExitDrafter:
    """Early exit with the entropy thresholds of one target accuracy, one per head in depth order."""

    thresholds: list[float]

    def propose(
        self, model: EarlyExitModel, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]
    ) -> Draft:
        heads = model.heads
        if limit < 1 or heads is None:
            return Draft()
        first_layer = heads.exit_layers[0]
        tokens: list[int] = []
        exits: list[Exit] = []
        rows: list[Tensor] = []
        token = pending
        while True:
            position = cache.length + len(tokens)
            hidden = model.run(model.embed([token]), cache, position, 0, first_layer)
            rows.append(hidden)
            if len(tokens) == limit:
                break
            found = self._read_heads(model, cache, hidden, position)
            if found is None:
                break
            token, reason = found
            tokens.append(token)
            exits.append(reason)
            if token in stop_ids:
                break
        return Draft(tokens, exits, torch.cat(rows), first_layer)

    def _read_heads(
        self, model: EarlyExitModel, cache: KVCache, hidden: Tensor, position: int
    ) -> tuple[int, Exit] | None:
        """Go from head to head until one is sure; None when none is."""
        heads = model.heads
        if heads is None:
            return None
        layer = heads.exit_layers[0]
        for head, (exit_layer, threshold) in enumerate(zip(heads.exit_layers, self.thresholds, strict=True)):
            if exit_layer > layer:
                hidden = model.run(hidden, cache, position, layer, exit_layer)
                layer = exit_layer
            logits = heads.logits(head, hidden)
            uncertainty = float(entropy(logits))
            if may_exit(uncertainty, threshold):
                return int(heads.token_ids(logits.argmax(-1))), Exit(head, exit_layer, uncertainty, threshold)
        return None
