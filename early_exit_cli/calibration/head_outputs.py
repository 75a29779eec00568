"""What backbone and exit heads say over packed text, for calibration and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from early_exit_cli.config import UncertaintyMetric
from early_exit_cli.data.packing import Batch
from early_exit_cli.engine import Engine, require_heads
from early_exit_cli.errors import DataError
from early_exit_cli.heads.uncertainty import uncertainty
from early_exit_cli.hidden_states.live import run_states
from early_exit_cli.numerics import require_finite


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
    batch = batch.to(engine.backbone.device)
    with torch.inference_mode():
        states = run_states(engine.backbone, batch, heads.exit_layers)
        valid = batch.measured
        targets = batch.input_ids.roll(-1, 1)[valid]
        positions = states.measured.nonzero()[:, 0]
        backbone_logits = engine.backbone.lm_head(states.final[positions])
        highest, choices = backbone_logits.max(-1)
        require_finite(highest)
        tokens, uncertainties, top5 = [], [], []
        for logits in heads(states, positions):
            uncertainties.append(uncertainty(logits, metric))
            best = heads.token_ids(logits.topk(min(5, logits.shape[-1]), -1).indices)
            top5.append(best)
            tokens.append(best[:, 0])
        return HeadOutputs(
            choices.cpu(),
            targets.cpu(),
            batch.documents[valid].cpu(),
            batch.places.roll(-1, 1)[valid].cpu(),
            backbone_logits.topk(5, -1).indices.cpu(),
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
