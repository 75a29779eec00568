"""Held-out text read once, for all that calibration fits on it: the passes of the backbone are the larger part of the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit_cli.calibration.head_outputs import BackboneReading, read_backbone
from early_exit_cli.calibration.thresholds import Sample
from early_exit_cli.config_training import UncertaintyMetric
from early_exit_cli.data.packing import Batch
from early_exit_cli.engine import Engine
from early_exit_cli.errors import DataError
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.uncertainty import entropy, uncertainty
from early_exit_cli.hidden_states.states import Prediction
from early_exit_cli.numerics import bfloat16_products

STEPS = 7
"""Draft positions that are told apart."""
ROWS_AT_ONCE = 128
"""Positions whose logits are looked at together: a few megabytes, which stay in a CPU's caches."""
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
TEMPERATURE_POSITIONS = 2000
"""Positions that are looked at for the temperature, evenly over the text: each needs the backbone's whole distribution."""
Rolled = tuple[Tensor, Tensor]
"""Of a draft position, entropies [samples] in nats and whether the backbone agreed, [samples] bool."""


@dataclass(frozen=True)
class HeldOutSample:
    """What was said of held-out text, on the CPU.

    exits: by the exit heads; none where there are none. rolled: by the EAGLE head from every place before an answer token,
    the text's own tokens in between, for each draft position that the text reaches; empty without such a head. overlaps:
    by kind of head, `overlap` at some positions, [positions, TEMPERATURES].
    """

    exits: Sample | None
    rolled: list[Rolled]
    overlaps: dict[str, Tensor]


def read_held_out(
    engine: Engine,
    batches: Sequence[Batch],
    metric: UncertaintyMetric = "entropy",
    on_texts: Callable[[int], None] | None = None,
) -> HeldOutSample:
    """Read the heads of both kinds over batches of texts, fastest where these stand apart (`packing.apart`).

    Args:
        metric: of the exit heads.
        on_texts: called with the number of rows that are done.

    Raises:
        DataError: not one position to read.
        NumericsError: NaN or infinite logits of the backbone.
    """
    heads, eagle = engine.heads, engine.eagle
    layers = [layer for part in (heads, eagle) if part is not None for layer in part.exit_layers]
    count = sum(int(batch.measured.sum()) for batch in batches)
    if count == 0:
        raise DataError("the calibration text holds no position to calibrate on")
    some = slice(0, None, -(-count // TEMPERATURE_POSITIONS))
    exits: list[Sample] = []
    rolled: list[list[Rolled]] = [[] for _ in range(STEPS)]
    overlaps: dict[str, list[Tensor]] = {}
    texts = 0
    with torch.inference_mode():
        for batch in batches:
            read = read_backbone(engine, batch, layers)
            if heads is not None:
                logits = heads(read.after(heads.exit_layers), read.positions)
                exits.append(_sample(heads, read, logits, metric))
                expected = engine.backbone.logit_map(read.products[some])
                overlaps.setdefault("exit", []).extend(
                    overlap(expected, one[some], heads.draft_vocab) for one in logits
                )
            if eagle is not None:
                with bfloat16_products(engine.backbone.device, engine.backbone.dtype):
                    steps = eagle(read.after(eagle.exit_layers), STEPS, only_measured=True)
                for said, found in zip(steps, rolled, strict=True):
                    found.append(_rolled(eagle, read, said))
                expected = engine.backbone.logit_map(read.products[read.rows_of(steps[0].positions[some])])
                overlaps.setdefault("eagle", []).append(overlap(expected, steps[0].logits[some], eagle.draft_vocab))
            texts += len(batch.input_ids)
            if on_texts:
                on_texts(texts)
    joined = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in rolled if parts]
    return HeldOutSample(
        None if heads is None else _joined(exits),
        [(entropies, agreed) for entropies, agreed in joined if agreed.numel()],
        {kind: torch.cat(found).cpu() for kind, found in overlaps.items()},
    )


def _sample(heads: ExitHeads, read: BackboneReading, logits: list[Tensor], metric: UncertaintyMetric) -> Sample:
    """Of one batch, from the logits of each head, [positions, draft vocab]."""
    found = [(in_parts(lambda part: uncertainty(part, metric), one), one.argmax(-1)) for one in logits]
    uncertainties, best = (torch.stack(parts) for parts in zip(*found, strict=True))
    batch = read.states.batch
    return Sample(
        uncertainties.cpu(), (heads.token_ids(best) == read.choices).cpu(), batch.documents[batch.measured].cpu()
    )


def _joined(samples: list[Sample]) -> Sample:
    return Sample(
        torch.cat([sample.uncertainties for sample in samples], 1),
        torch.cat([sample.correct for sample in samples], 1),
        torch.cat([sample.documents for sample in samples]),
    )


def _rolled(eagle: EagleHead, read: BackboneReading, said: Prediction) -> Rolled:
    """Of one step in one batch."""
    agreed = eagle.token_ids(said.logits.argmax(-1)) == read.choices[read.rows_of(said.positions)]
    return in_parts(entropy, said.logits).cpu(), agreed.cpu()


def in_parts(look: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """`look` at [positions, vocab], some rows at a time -> [positions]."""
    return torch.cat([look(part) for part in logits.split(ROWS_AT_ONCE)])


def overlap(backbone: Tensor, head: Tensor, draft_vocab: Tensor | None) -> Tensor:
    """How often a draft sampled from the head survives, at each temperature of its distribution q, where the text is sampled
    at temperature 1: sum of min(p, q) over the tokens (Leviathan et al. 2023, section 3.2).

    Args:
        backbone: logits [positions, vocab]. head: logits [positions, draft vocab].

    Returns:
        [positions, TEMPERATURES].
    """
    log_p = backbone.float().log_softmax(-1)
    p = (log_p if draft_vocab is None else log_p[:, draft_vocab]).exp()
    return torch.stack(
        [torch.minimum(p, (head.float() / temperature).softmax(-1)).sum(-1) for temperature in TEMPERATURES], -1
    )
