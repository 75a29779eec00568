"""Hidden states from the running backbone: online training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.output import BackboneView
from early_exit_cli.config import DataConfig, TrainingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import Batch, batches, pack
from early_exit_cli.hidden_states.states import States, count_tokens
from early_exit_cli.runtime.native_blocks import compiled_blocks


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


class BackboneStates:
    """States from the running backbone: online training."""

    def __init__(
        self,
        backbone: Backbone,
        exit_layers: list[int],
        train: list[Document],
        held_out: list[Document],
        data: DataConfig,
        training: TrainingConfig,
    ) -> None:
        self.view: BackboneView = backbone
        self.backbone = backbone
        self.exit_layers = exit_layers
        self.batch_size, self.seed = training.batch_size, training.seed
        pad = backbone.pad_token_id
        self.rows = pack(train, data.max_length, pad)
        self.held_out_rows = pack(held_out, data.max_length, pad)[: training.eval_batches * training.batch_size]
        self._epoch: tuple[tuple[int, int, int], list[Batch]] | None = None

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
        found = self.backbone
        return {"fingerprint": found.fingerprint, "content": found.content, "sequences": len(self.rows)}
