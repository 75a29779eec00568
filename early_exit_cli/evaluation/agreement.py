"""How good the heads are on text, and how two ways of decoding compare on prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.calibration.head_outputs import HeadOutputs, read_batches
from early_exit_cli.data.packing import Batch
from early_exit_cli.engine import Engine, default_width, require_heads
from early_exit_cli.evaluation.acceptance import Acceptance, explain_acceptance
from early_exit_cli.files.forms import to_block_numbers


@dataclass(frozen=True)
class HeadScore:
    """One head: against the text's next token, and against the backbone's choice."""

    head_idx: int
    layer_idx: int
    correct: int
    total: int
    accuracy: float
    top5_accuracy: float
    accuracy_vs_lm_head: float
    top5_accuracy_vs_lm_head: float

    @property
    def exit_layer(self) -> int:
        """Number of blocks run before it."""
        return self.layer_idx + 1


@dataclass(frozen=True)
class Group:
    """Positions that have something in common, and each head's agreement with the backbone on them."""

    name: str
    tokens: int
    agreement: list[float]


@dataclass(frozen=True)
class Evaluation:
    """Scores of backbone and heads over the same positions; padding never counts.

    agreement_by: position, frequency or source -> groups, which together hold every position once. position: where in
    its answer (or text) the predicted token stands, 1 is the first. frequency: how often the backbone chooses that token
    over all the positions evaluated. source: of the document. acceptance: none without thresholds.
    """

    model_name: str
    num_samples: int
    total_tokens: int
    main_head: dict[str, float]
    auxiliary_heads: list[HeadScore]
    agreement_by: dict[str, list[Group]]
    acceptance: Acceptance | None

    def record(self) -> dict[str, Any]:
        """The evaluation as JSON."""
        return {**asdict(self), "acceptance": self.acceptance and self.acceptance.record()}


def evaluate(
    engine: Engine,
    batches: Iterable[Batch],
    sources: list[str],
    level: float,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score every head, and follow the drafts at one level where the model has thresholds.

    Args:
        sources: of the documents, by their numbers in the batches.

    Raises:
        ConfigError: a level that was not calibrated.
        DataError: not one position with a next token.
    """
    heads = require_heads(engine)
    thresholds = engine.thresholds.at(level) if engine.thresholds is not None else None
    metric = engine.thresholds.metric if engine.thresholds is not None else "entropy"
    all_of, sequences = read_batches(engine, batches, metric, "the text holds no position to evaluate on", on_batch)
    targets, choices = all_of.targets, all_of.choices
    hits = torch.stack(
        (
            (all_of.tokens == targets).sum(-1),
            (all_of.top5 == targets[None, :, None]).any(-1).sum(-1),
            (all_of.tokens == choices).sum(-1),
            (all_of.top5 == choices[None, :, None]).any(-1).sum(-1),
        ),
        1,
    )
    total = choices.numel()
    return Evaluation(
        model_name=engine.backbone.name,
        num_samples=sequences,
        total_tokens=total,
        main_head={
            "accuracy": int((choices == targets).sum()) / total,
            "top5_accuracy": int((all_of.backbone_top5 == targets[:, None]).any(-1).sum()) / total,
        },
        auxiliary_heads=[
            HeadScore(index, block, row[0], total, *(count / total for count in row))
            for index, (block, row) in enumerate(zip(to_block_numbers(heads.exit_layers), hits.tolist(), strict=True))
        ],
        agreement_by=agreement_by(all_of, sources),
        acceptance=None
        if thresholds is None
        else explain_acceptance(all_of, thresholds, heads.draft_vocab, level, default_width(engine) - 1),
    )


def agreement_by(head_outputs: HeadOutputs, sources: list[str]) -> dict[str, list[Group]]:
    """Agreement by position in the answer, by frequency of the backbone's choice, and by source; empty groups left out."""
    correct = head_outputs.tokens == head_outputs.choices
    share = head_outputs.choices.bincount()[head_outputs.choices] / head_outputs.choices.numel()
    place = head_outputs.places + 1

    def group(name: str, chosen: Tensor) -> Group:
        return Group(name, int(chosen.sum()), correct[:, chosen].double().mean(-1).tolist())

    positions = [
        group(name, (place >= low) & (place <= high))
        for name, low, high in (
            ("1", 1, 1),
            ("2-4", 2, 4),
            ("5-16", 5, 16),
            ("17-64", 17, 64),
            ("65-256", 65, 256),
            ("later", 257, place.max()),
        )
    ]
    frequencies = [
        group(name, (share >= low) & (share < high))
        for name, low, high in (
            ("1 % or more", 0.01, 2.0),
            ("0.1 % to 1 %", 0.001, 0.01),
            ("0.01 % to 0.1 %", 0.0001, 0.001),
            ("less", 0.0, 0.0001),
        )
    ]
    names = sorted(set(sources))
    of_source = torch.tensor([names.index(source) for source in sources])[head_outputs.documents]
    return {
        title: [found for found in groups if found.tokens]
        for title, groups in {
            "position": positions,
            "frequency": frequencies,
            "source": [group(name, of_source == number) for number, name in enumerate(names)],
        }.items()
    }
