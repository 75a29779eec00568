"""What backbone and exit heads say over packed text, for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from early_exit_cli.config_training import UncertaintyMetric
from early_exit_cli.data.packing import Batch
from early_exit_cli.engine import Engine, require_heads
from early_exit_cli.errors import DataError
from early_exit_cli.heads.uncertainty import uncertainty
from early_exit_cli.hidden_states.live import run_states
from early_exit_cli.hidden_states.states import States
from early_exit_cli.numerics import require_finite


@dataclass(frozen=True)
class BackboneReading:
    """A batch as the backbone reads it, once for all that is asked of it.

    states: after all of `exit_layers`. positions: [positions] int64, those of `states` that count (`Batch.measured`).
    products: [positions, vocab], the LM head's there. choices: [positions] int64, their argmax.
    """

    states: States
    exit_layers: list[int]
    positions: Tensor
    products: Tensor
    choices: Tensor

    def after(self, exit_layers: Sequence[int]) -> States:
        """With the states after some of the exit layers only."""
        return replace(self.states, exits=[self.states.exits[self.exit_layers.index(layer)] for layer in exit_layers])

    def rows_of(self, positions: Tensor) -> Tensor:
        """Where some of `positions` stand among them."""
        return torch.searchsorted(self.positions, positions.contiguous())


def read_backbone(engine: Engine, batch: Batch, exit_layers: Iterable[int]) -> BackboneReading:
    """Run a packed batch; within `torch.inference_mode`.

    Raises:
        NumericsError: NaN or infinite logits.
    """
    layers = sorted(set(exit_layers))
    states = run_states(engine.backbone, batch, layers)
    positions = states.measured.nonzero()[:, 0]
    products = engine.backbone.lm_head(states.final[positions])
    best, choices = products.max(-1)
    require_finite(best)
    return BackboneReading(states, layers, positions, products, choices)


@dataclass(frozen=True)
class HeadOutputs:
    """What backbone and heads say at the positions of a batch where the next token is known.

    All on the CPU. choices, targets: [positions] int64, the backbone's argmax and the text's next token. documents,
    places: [positions] int64, which document that next token is of, and where in its answer (0 is the first).
    backbone_top5: [positions, 5]. tokens, uncertainties: [heads, positions]; top5: [heads, positions, 5], token ids.
    """

    choices: Tensor
    targets: Tensor
    documents: Tensor
    places: Tensor
    backbone_top5: Tensor
    tokens: Tensor
    uncertainties: Tensor
    top5: Tensor


def read_batch(engine: Engine, batch: Batch, metric: UncertaintyMetric = "entropy") -> HeadOutputs:
    """Run a packed batch and read every head at the positions that count (`Batch.measured`).

    Raises:
        NumericsError: NaN or infinite logits of the backbone.
    """
    heads = require_heads(engine)
    with torch.inference_mode():
        read = read_backbone(engine, batch, heads.exit_layers)
        batch, valid = read.states.batch, read.states.batch.measured
        tokens, uncertainties, top5 = [], [], []
        for logits in heads(read.after(heads.exit_layers), read.positions):
            uncertainties.append(uncertainty(logits, metric))
            best = heads.token_ids(logits.topk(min(5, logits.shape[-1]), -1).indices)
            top5.append(best)
            tokens.append(best[:, 0])
        return HeadOutputs(
            read.choices.cpu(),
            batch.input_ids.roll(-1, 1)[valid].cpu(),
            batch.documents[valid].cpu(),
            batch.places.roll(-1, 1)[valid].cpu(),
            read.products.topk(5, -1).indices.cpu(),
            torch.stack(tokens).cpu(),
            torch.stack(uncertainties).cpu(),
            torch.stack(top5).cpu(),
        )


def read_batches(
    engine: Engine,
    batches: Iterable[Batch],
    metric: UncertaintyMetric,
    nothing: str,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[HeadOutputs, int]:
    """`read_batch` over all batches, one after another; and the number of sequences.

    Args:
        nothing: what to say of a text without a position to read.

    Raises:
        DataError: `nothing`.
    """
    parts: list[HeadOutputs] = []
    sequences = 0
    for batch in batches:
        parts.append(read_batch(engine, batch, metric))
        sequences += batch.input_ids.shape[0]
        if on_batch:
            on_batch(sequences)
    if sum(part.choices.numel() for part in parts) == 0:
        raise DataError(nothing)
    return join_head_outputs(parts), sequences


def join_head_outputs(parts: list[HeadOutputs]) -> HeadOutputs:
    """Readings of several batches, one after another."""
    along = {field.name: int(field.name in ("tokens", "uncertainties", "top5")) for field in fields(HeadOutputs)}
    return HeadOutputs(**{name: torch.cat([getattr(part, name) for part in parts], dim) for name, dim in along.items()})
