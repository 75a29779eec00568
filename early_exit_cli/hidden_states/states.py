"""Where training gets hidden states from: one interface, the running backbone behind it here, a cache in `cache.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from early_exit_cli.backbone.output import BackboneView
from early_exit_cli.data.packing import Batch


@dataclass(frozen=True)
class States:
    """Hidden states at positions of text, padding left out.

    exits: a tensor [positions, hidden] per head, after its exit layer. final: [positions, hidden], after the last
    block, final norm applied. measured: [positions] bool, the following token is of an answer (`Batch.measured`).
    batch: the text itself; its valid places, row by row, are the positions. normalizer: [positions] float32, logsumexp
    of the backbone's logits, where it is known already.
    """

    exits: list[Tensor]
    final: Tensor
    measured: Tensor
    batch: Batch
    normalizer: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """Logits [predictions, draft vocab] for what the backbone says at `positions`, [predictions] int64 of a `States`."""

    logits: Tensor
    positions: Tensor


class StateSource(Protocol):
    """Batches of states for training, the same ones for the same numbers, whatever happened in between."""

    exit_layers: list[int]
    """Numbers of blocks run before the states that the heads read."""

    @property
    def view(self) -> BackboneView:
        """The backbone, or what is known of it."""

    def token_counts(self) -> Tensor:
        """How often each token stands in the training text, [vocab] int64."""

    def sequences(self, rank: int, world: int) -> int:
        """Training sequences of one process."""

    def batch(self, number: int, rank: int, world: int) -> States:
        """The number-th training batch of one process, epochs of seeded shuffles."""

    def held_out(self) -> Iterator[States]:
        """The evaluation text, in order."""

    def identity(self) -> dict[str, Any]:
        """What must be equal when a run is resumed."""


def log_normalizer(logits: Tensor) -> Tensor:
    """logsumexp over the vocabulary, [positions, vocab] -> [positions] float32."""
    best = logits.amax(-1, keepdim=True)
    return (logits - best).float().exp_().sum(-1).log_() + best[:, 0].float()


def count_tokens(rows: list[Batch], vocab_size: int) -> Tensor:
    """Occurrences of each token, padding left out, [vocab] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for row in rows:
        counts += torch.bincount(row.input_ids[row.valid], minlength=vocab_size)
    return counts
