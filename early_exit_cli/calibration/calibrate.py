"""Thresholds per head for each target accuracy: fitted on one held-out text, checked on a second, recorded.

`thresholds` holds the rules and `reliability` the intervals. Both ways of fitting are always computed and checked as
decoding would use them, every head read in order; a setting says which one is written. calibration.json holds what DSSD's
loader reads, and nothing else; all the rest goes into eexit.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from early_exit_cli.bundle.files import CONFIG_FILE, record_json
from early_exit_cli.bundle.load import calibration_record_path
from early_exit_cli.calibration.intervals import independent_tokens, lower_bound, tokens_missing
from early_exit_cli.calibration.thresholds import (
    Fitted,
    Sample,
    count_head_sets,
    cumulative_agreement,
    exits_in_order,
    fit_thresholds,
)
from early_exit_cli.config import CalibrationConfig
from early_exit_cli.config_training import ThresholdRule, UncertaintyMetric
from early_exit_cli.files.atomic import write_json
from early_exit_cli.files.schemas import CalibrationForm, HeadSet, Statistics
from early_exit_cli.heads.uncertainty import level_key

CURVE_POINTS = 50
HISTOGRAM_BINS = 30
ENOUGH_CHECKED = 1000
"""A promise is judged where more tokens than this exit on the second text."""
RULES: tuple[ThresholdRule, ...] = get_args(ThresholdRule)


@dataclass(frozen=True)
class Cell:
    """One head at one level.

    tokens: how many exit below the threshold on the text it was fitted on, of those the rule gave the head; coverage:
    their share of all tokens; agreement: the share of them that is right, at least `at_least` (reliability.SURE).
    missing: how many more such tokens it takes to be sure of the level within the margin. checked_tokens, reached: how
    many exit there on the second text with every head read in order, and the share that is right.
    """

    threshold: float
    reachable: bool
    tokens: int
    coverage: float
    agreement: float | None
    at_least: float | None
    missing: int
    checked_tokens: int
    reached: float | None


@dataclass(frozen=True)
class HeadCalibration:
    """One head on the first text.

    cells: rule -> level -> Cell. curve: (coverage, agreement) pairs along rising uncertainty, all tokens. right, wrong:
    how many tokens stand between each two of the calibration's `edges`.
    """

    exit_layer: int
    mean_uncertainty: float
    std_uncertainty: float
    agreement: float
    samples: int
    cells: dict[ThresholdRule, dict[str, Cell]]
    curve: list[tuple[float, float]]
    right: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Calibration:
    """Thresholds of all heads. `rule` is the one that is written; both stand in the heads' cells."""

    levels: list[float]
    heads: list[HeadCalibration]
    dataset: str
    sequences: int
    strategy: str
    metric: UncertaintyMetric
    rule: ThresholdRule
    margin: float
    assurance: float | None
    checked_tokens: int
    edges: list[float]
    head_sets: dict[str, list[HeadSet]]
    """level -> every set of heads."""

    def cells(self, rule: ThresholdRule | None = None) -> list[tuple[float, int, Cell]]:
        """(level, head, cell) of a rule, by default of the one that is written."""
        return [
            (level, index, head.cells[rule or self.rule][level_key(level)])
            for level in self.levels
            for index, head in enumerate(self.heads)
        ]

    def kept(self, rule: ThresholdRule) -> tuple[int, int]:
        """How many promises a rule kept within the margin on the second text, of how many that could be judged."""
        judged = [self._is_kept(level, cell) for level, _, cell in self.cells(rule) if _is_judged(cell)]
        return sum(judged), len(judged)

    def _is_kept(self, level: float, cell: Cell) -> bool:
        return cell.reached is not None and cell.reached >= level - self.margin

    def faults(self) -> list[str]:
        """The cells of the written rule that are unreachable, missed on the second text, or fitted on too few tokens."""
        found = []
        for level, head, cell in self.cells():
            where = f"level {level_key(level)}, head {head}"
            if not cell.reachable:
                found.append(f"{where}: unreachable, the head never exits")
            elif cell.missing:
                found.append(f"{where}: {cell.tokens:,} exiting tokens are too few, by {cell.missing:,}")
            if _is_judged(cell) and not self._is_kept(level, cell):
                found.append(
                    f"{where}: {cell.reached:.1%} reached on {cell.checked_tokens:,} tokens of the second text"
                )
        return found


def _is_judged(cell: Cell) -> bool:
    return cell.checked_tokens > ENOUGH_CHECKED


def calibrate(
    sample: Sample, second: Sample, exit_layers: list[int], config: CalibrationConfig, dataset: str, sequences: int
) -> Calibration:
    """Fit on one sample, check on the other."""
    cells: list[dict[ThresholdRule, dict[str, Cell]]] = [{rule: {} for rule in RULES} for _ in exit_layers]
    head_sets = {}
    for rule in RULES:
        for level in config.accuracy_levels:
            fitted = fit_thresholds(sample, level, rule, config)
            thresholds = [found.threshold for found in fitted]
            fitted_exits = _exits(sample, thresholds, rule)
            checked_exits = exits_in_order(second.uncertainties, thresholds)
            for head, found in enumerate(fitted):
                cells[head][rule][level_key(level)] = _cell(
                    head, found, level, config.margin, sample, fitted_exits[head], second, checked_exits[head]
                )
            if rule == config.threshold_rule:
                head_sets[level_key(level)] = count_head_sets(sample.uncertainties, sample.correct, thresholds)
    low, high = float(sample.uncertainties.min()), float(sample.uncertainties.max())
    edges = torch.linspace(low, max(high, low + 1e-6), HISTOGRAM_BINS + 1)
    return Calibration(
        levels=config.accuracy_levels,
        heads=[
            _head(layer, sample.uncertainties[head], sample.correct[head], cells[head], edges)
            for head, layer in enumerate(exit_layers)
        ],
        dataset=dataset,
        sequences=sequences,
        strategy=config.threshold_strategy,
        metric=config.uncertainty_metric,
        rule=config.threshold_rule,
        margin=config.margin,
        assurance=config.assurance,
        checked_tokens=second.tokens,
        edges=edges.tolist(),
        head_sets=head_sets,
    )


def _exits(sample: Sample, thresholds: list[float], rule: ThresholdRule) -> Tensor:
    """[heads, tokens] bool: the tokens below each threshold, of those that the rule gave the head."""
    if rule == "conditional":
        return exits_in_order(sample.uncertainties, thresholds)
    return sample.uncertainties < torch.tensor(thresholds, dtype=torch.float64)[:, None]


def _cell(
    head: int,
    fitted: Fitted,
    level: float,
    margin: float,
    sample: Sample,
    exits: Tensor,
    second: Sample,
    checked: Tensor,
) -> Cell:
    """exits, checked: [tokens] bool, the tokens of `sample` and of `second` that exit at the head."""
    right, owners = sample.correct[head][exits], sample.documents[exits]
    tokens, checked_tokens = right.numel(), int(checked.sum())
    agreement = at_least = None
    independent = float(tokens)
    if tokens:
        agreement = float(right.double().mean())
        worth = independent_tokens(right, owners)[-1]
        independent = float(worth)
        at_least = float(lower_bound(torch.tensor(agreement, dtype=torch.float64), worth))
    return Cell(
        threshold=fitted.threshold,
        reachable=fitted.reachable,
        tokens=tokens,
        coverage=tokens / sample.tokens,
        agreement=agreement,
        at_least=at_least,
        missing=tokens_missing(agreement or 0.0, tokens, independent, level, margin),
        checked_tokens=checked_tokens,
        reached=float(second.correct[head][checked].double().mean()) if checked_tokens else None,
    )


def _head(
    exit_layer: int,
    uncertainties: Tensor,
    correct: Tensor,
    cells: dict[ThresholdRule, dict[str, Cell]],
    edges: Tensor,
) -> HeadCalibration:
    tokens = uncertainties.numel()
    along = cumulative_agreement(correct[uncertainties.argsort(stable=True)])
    places = sorted({max(1, round(tokens * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS + 1)})
    right, wrong = (
        torch.histogram(uncertainties[chosen], edges).hist.to(torch.int64).tolist() for chosen in (correct, ~correct)
    )
    return HeadCalibration(
        exit_layer=exit_layer,
        mean_uncertainty=float(uncertainties.mean()),
        std_uncertainty=float(uncertainties.std(correction=0)),
        agreement=float(correct.double().mean()),
        samples=tokens,
        cells=cells,
        curve=[(place / tokens, float(along[place - 1])) for place in places],
        right=right,
        wrong=wrong,
    )


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """What calibration.json holds."""
    thresholds: dict[str, dict[str, float]] = {level_key(level): {} for level in calibration.levels}
    for level, head, cell in calibration.cells():
        thresholds[level_key(level)][str(head)] = cell.threshold
    return CalibrationForm(
        model_config_path=CONFIG_FILE,
        calibration_dataset=calibration.dataset,
        calibration_samples=calibration.sequences,
        uncertainty_metric=calibration.metric,
        accuracy_levels=calibration.levels,
        thresholds=thresholds,
        statistics={
            str(i): Statistics(
                mean_uncertainty=head.mean_uncertainty,
                std_uncertainty=head.std_uncertainty,
                overall_accuracy=head.agreement,
                num_samples=head.samples,
            )
            for i, head in enumerate(calibration.heads)
        },
    ).model_dump()


def calibration_record(calibration: Calibration) -> dict[str, Any]:
    """What eexit.json holds of a calibration. `coverage` and `agreement_at` are those of the written rule."""
    return {
        "dataset": calibration.dataset,
        "sequences": calibration.sequences,
        "strategy": calibration.strategy,
        "uncertainty_metric": calibration.metric,
        "threshold_rule": calibration.rule,
        "levels": calibration.levels,
        "margin": calibration.margin,
        "assurance": calibration.assurance,
        "checked_tokens": calibration.checked_tokens,
        "enough_tokens": ENOUGH_CHECKED,
        "promises_kept": {rule: dict(zip(("kept", "of"), calibration.kept(rule), strict=True)) for rule in RULES},
        "head_sets": {level: [heads.model_dump() for heads in sets] for level, sets in calibration.head_sets.items()},
        "edges": calibration.edges,
        "heads": [
            {
                "exit_layer": head.exit_layer,
                "agreement": head.agreement,
                "samples": head.samples,
                "coverage": {key: cell.coverage for key, cell in head.cells[calibration.rule].items()},
                "agreement_at": {key: cell.agreement for key, cell in head.cells[calibration.rule].items()},
                "curve": head.curve,
                "right": head.right,
                "wrong": head.wrong,
                "rules": {
                    rule: {key: asdict(cell) for key, cell in cells.items()} for rule, cells in head.cells.items()
                },
            }
            for head in calibration.heads
        ],
    }


def save_calibration(calibration: Calibration, folder: Path, output_path: Path) -> None:
    """Write calibration.json to `output_path` and the rest beside it: into eexit.json where it is the bundle's own."""
    write_json(output_path, calibration_json(calibration))
    path = calibration_record_path(folder, output_path)
    record = record_json(path) if path.exists() else {}
    record["calibration"] = calibration_record(calibration)
    write_json(path, record)
