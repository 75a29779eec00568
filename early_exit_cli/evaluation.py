"""How good the heads are on text, and how two ways of decoding compare on prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from early_exit_cli.data import Batch
from early_exit_cli.decoding import Generation, accepted_length, generate
from early_exit_cli.drafters import Drafter, NoDrafter
from early_exit_cli.engine import EarlyExitModel, read_batch, require_heads
from early_exit_cli.errors import DataError


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


@dataclass(frozen=True)
class Evaluation:
    """Scores of backbone and heads over the same positions; padding never counts."""

    model_name: str
    num_samples: int
    total_tokens: int
    main_head: dict[str, float]
    auxiliary_heads: list[HeadScore]

    def record(self) -> dict[str, Any]:
        """The evaluation as JSON."""
        return asdict(self)


def evaluate(
    model: EarlyExitModel, batches: Iterable[Batch], on_batch: Callable[[int], None] | None = None
) -> Evaluation:
    """Score every head.

    Raises:
        DataError: not one position with a next token.
    """
    heads = require_heads(model)
    hits = torch.zeros(len(heads), 4, dtype=torch.int64)  # text, text in top 5, backbone, backbone in top 5
    main = torch.zeros(2, dtype=torch.int64)
    total = sequences = 0
    for batch in batches:
        readings = read_batch(model, batch)
        targets, choices = readings.targets, readings.choices
        total += targets.numel()
        sequences += batch.input_ids.shape[0]
        main[0] += (choices == targets).sum()
        main[1] += (readings.backbone_top5 == targets[:, None]).any(-1).sum()
        hits[:, 0] += (readings.tokens == targets).sum(-1)
        hits[:, 1] += (readings.top5 == targets[None, :, None]).any(-1).sum(-1)
        hits[:, 2] += (readings.tokens == choices).sum(-1)
        hits[:, 3] += (readings.top5 == choices[None, :, None]).any(-1).sum(-1)
        if on_batch:
            on_batch(sequences)
    if total == 0:
        raise DataError("the text holds no position to evaluate on")
    scores = [
        HeadScore(index, layer, row[0], total, *(count / total for count in row))
        for index, (layer, row) in enumerate(zip(heads.layers, hits.tolist(), strict=True))
    ]
    return Evaluation(
        model.backbone.name,
        sequences,
        total,
        {"accuracy": int(main[0]) / total, "top5_accuracy": int(main[1]) / total},
        scores,
    )


@dataclass(frozen=True)
class Comparison:
    """Plain decoding of one prompt, and decoding with drafts, side by side.

    identical: all tokens equal. bit_exact: the final hidden state that decided each committed token is equal bit for
    bit. speedup: tokens/s of drafted over full, medians of alternating repeats. first_difference: the position where
    the two part, with the backbone's gap between its best two logits there, when they do.
    """

    full: Generation
    drafted: Generation
    identical: bool
    bit_exact: bool
    speedup: float
    first_difference: dict[str, Any] | None

    def record(self) -> dict[str, Any]:
        """The comparison as JSON."""
        result: dict[str, Any] = {
            self.full.stats.mode: self.full.record(),
            self.drafted.stats.mode: self.drafted.record(),
            "identical": self.identical,
            "bit_exact": self.bit_exact,
            "speedup": self.speedup,
        }
        if self.first_difference:
            result["first_difference"] = self.first_difference
        return result


def compare(
    model: EarlyExitModel,
    prompt_ids: list[int],
    drafter: Drafter,
    max_new_tokens: int,
    *,
    width: int,
    repeats: int,
) -> Comparison:
    """Decode a prompt with and without drafts, in turns, `repeats` times each, with no warm-up of its own."""
    methods = (NoDrafter(), drafter)
    runs: dict[str, list[Generation]] = {method.name: [] for method in methods}
    for _ in range(repeats):
        for method in methods:
            runs[method.name].append(
                generate(model, prompt_ids, method, max_new_tokens, mode=method.name, width=width, keep_states=True)
            )
    full, drafted = (median_run(runs[method.name]) for method in methods)
    identical = all(run.token_ids == full.token_ids for run in runs[drafter.name])
    bit_exact = identical and all(torch.equal(_states(run), _states(full)) for run in runs[drafter.name])
    return Comparison(
        full,
        drafted,
        identical,
        bit_exact,
        drafted.stats.tokens_per_second / full.stats.tokens_per_second,
        None if identical else _first_difference(model, full, drafted),
    )


def _states(run: Generation) -> torch.Tensor:
    if run.states is None:
        raise ValueError("compared runs keep their states")
    return run.states


def median_run(runs: list[Generation]) -> Generation:
    """The run whose speed is the (lower) median."""
    median = statistics.median_low(run.stats.tokens_per_second for run in runs)
    return next(run for run in runs if run.stats.tokens_per_second == median)


def _first_difference(model: EarlyExitModel, full: Generation, drafted: Generation) -> dict[str, Any]:
    shorter = min(len(full.token_ids), len(drafted.token_ids))
    place = min(accepted_length(full.token_ids, drafted.token_ids), shorter - 1)
    with torch.inference_mode():
        best = model.blocks.logits(_states(full)[place : place + 1])[0].float().topk(2).values
    return {"index": place, "top2_gap": float(best[0] - best[1])}
