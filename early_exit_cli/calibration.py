"""Entropy thresholds per head for each target accuracy, on held-out text.

Correct means that a head's argmax equals the backbone's. The rules stand in `threshold_for`; calibration.json holds
what DSSD's loader reads, and nothing else; coverage, agreement and curves go into eexit.json.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.artifacts import read_json, write_json
from early_exit_cli.config import CalibrationConfig
from early_exit_cli.data import Batch
from early_exit_cli.engine import CONFIG_FILE, RECORD_FILE, EarlyExitModel, read_batch
from early_exit_cli.errors import DataError
from early_exit_cli.gating import level_key

CURVE_POINTS = 50


@dataclass(frozen=True)
class Cell:
    """One head at one level: its threshold (nats), the share of tokens below it, and their agreement."""

    threshold: float
    coverage: float
    agreement: float | None
    reachable: bool


@dataclass(frozen=True)
class HeadCalibration:
    """One head on the held-out text. `curve` holds (coverage, agreement) pairs along rising entropy."""

    exit_layer: int
    mean_entropy: float
    std_entropy: float
    agreement: float
    samples: int
    cells: dict[str, Cell]
    curve: list[tuple[float, float]]


@dataclass(frozen=True)
class Calibration:
    """Thresholds of all heads."""

    levels: list[float]
    heads: list[HeadCalibration]
    dataset: str
    sequences: int
    strategy: str
    head_sets: dict[str, list[dict[str, list[Any]]]]
    """level -> for every set of heads: how often each exits when the heads before it declined, and how often rightly."""


def threshold_for(entropies: Tensor, correct: Tensor, level: float, strategy: str) -> float:
    """The entropy threshold of one head for one target accuracy.

    Args:
        entropies: [samples] float32, ascending. correct: [samples] bool in the same order.

    Returns:
        The entropy (nats) at the last position whose cumulative accuracy reaches `level` (max_coverage), at the first
        one (min_coverage), half way from the last one to its successor (midpoint), or where a logistic
        P(correct | entropy) equals the level, clipped to what was seen (platt_scaling; Platt 1999). Where no position
        reaches the level, the smallest entropy seen: no token is strictly below it, so the head never exits.
    """
    if strategy == "platt_scaling":
        return _platt_threshold(entropies, correct, level)
    valid = reaching(correct, level)
    if valid.numel() == 0:
        return float(entropies[0])
    if strategy == "min_coverage":
        return float(entropies[valid[0]])
    last = int(valid[-1])
    if strategy == "midpoint" and last + 1 < entropies.numel():
        return float((entropies[last] + entropies[last + 1]) / 2)
    return float(entropies[last])


def reaching(correct: Tensor, level: float) -> Tensor:
    """Positions, in rising entropy, at which the share of correct tokens so far is at least `level`."""
    counts = torch.arange(1, correct.numel() + 1, dtype=torch.float64)
    return (correct.double().cumsum(0) / counts >= level).nonzero()[:, 0]


def _platt_threshold(entropies: Tensor, correct: Tensor, level: float) -> float:
    """Newton's method on the two parameters of sigmoid(a + b * entropy), with a little ridge for separable data."""
    x = torch.stack((torch.ones_like(entropies), entropies), 1).double()  # [samples, 2]
    y = correct.double()
    weights = torch.zeros(2, dtype=torch.float64)
    ridge = 1e-6 * x.shape[0] * torch.eye(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) + ridge @ weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step
        if float(step.abs().max()) < 1e-9:
            break
    intercept, slope = weights.tolist()
    low, high = float(entropies[0]), float(entropies[-1])
    if slope >= 0:  # entropy says nothing here: all exit, or none
        return high if float(y.mean()) >= level else low
    return min(max((math.log(level / (1 - level)) - intercept) / slope, low), high)


def calibrate(
    model: EarlyExitModel,
    batches: Iterable[Batch],
    config: CalibrationConfig,
    dataset: str,
    on_batch: Callable[[int], None] | None = None,
) -> Calibration:
    """Read every head over the batches and fit the thresholds.

    Raises:
        DataError: not one position to calibrate on.
    """
    entropies, correct = [], []
    sequences = 0
    for batch in batches:
        readings = read_batch(model, batch)
        entropies.append(readings.entropies)
        correct.append(readings.tokens == readings.choices)
        sequences += batch.input_ids.shape[0]
        if on_batch:
            on_batch(sequences)
    if not entropies or sum(part.shape[1] for part in entropies) == 0:
        raise DataError("the calibration text holds no position to calibrate on")
    all_entropies, all_correct = torch.cat(entropies, 1), torch.cat(correct, 1)
    heads = [
        _calibrate_head(exit_layer, all_entropies[head], all_correct[head], config)
        for head, exit_layer in enumerate(model.heads.exit_layers if model.heads is not None else [])
    ]
    sets = {
        level_key(level): count_head_sets(
            all_entropies, all_correct, [head.cells[level_key(level)].threshold for head in heads]
        )
        for level in config.accuracy_levels
    }
    return Calibration(config.accuracy_levels, heads, dataset, sequences, config.threshold_strategy, sets)


def count_head_sets(entropies: Tensor, correct: Tensor, thresholds: list[float]) -> list[dict[str, list[Any]]]:
    """For every set of at most four heads: the share of tokens that exits at each, in order, and their agreement.

    Args:
        entropies, correct: [heads, samples].
    """
    counted: list[dict[str, list[Any]]] = []
    for size in range(1, min(len(thresholds), 4) + 1):
        for heads in itertools.combinations(range(len(thresholds)), size):
            left = torch.ones(entropies.shape[1], dtype=torch.bool)
            shares, agreements = [], []
            for head in heads:
                exits = left & (entropies[head] < thresholds[head])
                count = int(exits.sum())
                shares.append(count / entropies.shape[1])
                agreements.append(int((exits & correct[head]).sum()) / count if count else 0.0)
                left &= ~exits
            counted.append({"heads": list(heads), "exit_share": shares, "agreement": agreements})
    return counted


def _calibrate_head(exit_layer: int, entropies: Tensor, correct: Tensor, config: CalibrationConfig) -> HeadCalibration:
    order = entropies.argsort(stable=True)
    entropies, correct = entropies[order], correct[order]
    cells = {}
    for level in config.accuracy_levels:
        threshold = threshold_for(entropies, correct, level, config.threshold_strategy)
        exits = entropies < threshold
        count = int(exits.sum())
        cells[level_key(level)] = Cell(
            threshold,
            count / entropies.numel(),
            float(correct[exits].double().mean()) if count else None,
            bool(reaching(correct, level).numel()),
        )
    cumulative = correct.double().cumsum(0)
    places = sorted({max(1, round(entropies.numel() * point / CURVE_POINTS)) for point in range(1, CURVE_POINTS + 1)})
    return HeadCalibration(
        exit_layer,
        float(entropies.mean()),
        float(entropies.std(correction=0)),
        float(correct.double().mean()),
        entropies.numel(),
        cells,
        [(place / entropies.numel(), float(cumulative[place - 1]) / place) for place in places],
    )


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """What calibration.json holds: exactly the keys that DSSD's loader takes."""
    return {
        "model_config_path": CONFIG_FILE,
        "calibration_dataset": calibration.dataset,
        "calibration_samples": calibration.sequences,
        "uncertainty_metric": "entropy",
        "accuracy_levels": calibration.levels,
        "thresholds": {
            level_key(level): {
                str(i): head.cells[level_key(level)].threshold for i, head in enumerate(calibration.heads)
            }
            for level in calibration.levels
        },
        "statistics": {
            str(i): {
                "mean_uncertainty": head.mean_entropy,
                "std_uncertainty": head.std_entropy,
                "overall_accuracy": head.agreement,
                "num_samples": head.samples,
            }
            for i, head in enumerate(calibration.heads)
        },
    }


def save_calibration(calibration: Calibration, folder: Path, output_path: Path) -> None:
    """Write calibration.json to `output_path` and the rest into the bundle's eexit.json."""
    write_json(output_path, calibration_json(calibration))
    record = read_json(folder / RECORD_FILE) if (folder / RECORD_FILE).exists() else {}
    record["calibration"] = {
        "dataset": calibration.dataset,
        "sequences": calibration.sequences,
        "strategy": calibration.strategy,
        "head_sets": calibration.head_sets,
        "heads": [
            {
                "exit_layer": head.exit_layer,
                "agreement": head.agreement,
                "samples": head.samples,
                "coverage": {key: cell.coverage for key, cell in head.cells.items()},
                "agreement_at": {key: cell.agreement for key, cell in head.cells.items()},
                "curve": head.curve,
            }
            for head in calibration.heads
        ],
    }
    write_json(folder / RECORD_FILE, record)
