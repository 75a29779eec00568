"""Where training gets hidden states from: one interface, the running backbone behind it here, a cache in `cache.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from early_exit_cli.backbone import Backbone
from early_exit_cli.config import DataConfig, TrainingConfig
from early_exit_cli.data import Batch, Document, batches, pack, pad_token_id
from early_exit_cli.native_blocks import compiled_blocks
from early_exit_cli.readout import Readout


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

    layers: list[int]
    """0-based blocks whose output the heads read."""

    @property
    def readout(self) -> Readout:
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


def hidden_states(backbone: Backbone, batch: Batch, exit_layers: list[int]) -> list[Tensor]:
    """States of packed sequences, by compiled passes where these can be had: `Backbone.hidden_states_at` says of what."""
    blocks = compiled_blocks(backbone)
    if blocks is None:
        return backbone.hidden_states_at(batch.input_ids, batch.block_mask(), exit_layers)
    with torch.no_grad():
        return blocks.states_of(batch.input_ids, batch.documents, exit_layers)


def run_states(backbone: Backbone, batch: Batch, exit_layers: list[int]) -> States:
    """Run the backbone over packed sequences."""
    batch = batch.to(backbone.device)
    valid = batch.valid
    *exits, final = [state[valid] for state in hidden_states(backbone, batch, exit_layers)]
    return States(exits, final, batch.measured[valid], batch)


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


class BackboneStates:
    """States from the running backbone: online training."""

    def __init__(
        self,
        backbone: Backbone,
        layers: list[int],
        train: list[Document],
        held_out: list[Document],
        data: DataConfig,
        training: TrainingConfig,
    ) -> None:
        self.readout: Readout = backbone
        self.backbone = backbone
        self.layers = layers
        self.batch_size, self.seed = training.batch_size, training.seed
        pad = pad_token_id(backbone)
        self.rows = pack(train, data.max_length, pad)
        self.held_out_rows = pack(held_out, data.max_length, pad)[: training.eval_batches * training.batch_size]
        self._epoch: tuple[tuple[int, int, int], list[Batch]] | None = None

    @property
    def exit_layers(self) -> list[int]:
        return [layer + 1 for layer in self.layers]

    def token_counts(self) -> Tensor:
        return count_tokens(self.rows, self.backbone.vocab_size)

    def sequences(self, rank: int, world: int) -> int:
        return len(self.rows[rank::world])

    def batch(self, number: int, rank: int, world: int) -> States:
        rows = self.rows[rank::world]
        epoch, index = divmod(number, -(-len(rows) // self.batch_size))
        key = (epoch, rank, world)
        if self._epoch is None or self._epoch[0] != key:
            self._epoch = (key, list(batches(rows, self.batch_size, seed=self.seed * 1_000_003 + epoch)))
        return run_states(self.backbone, self._epoch[1][index], self.exit_layers)

    def held_out(self) -> Iterator[States]:
        for batch in batches(self.held_out_rows, self.batch_size):
            yield run_states(self.backbone, batch, self.exit_layers)

    def identity(self) -> dict[str, Any]:
        return {"fingerprint": self.backbone.fingerprint, "sequences": len(self.rows)}
