"""The rules that turn held-out readings of the heads into thresholds, as pure tensor functions.

Correct means that a head's argmax equals the backbone's. `threshold_for` is the rule for one head and one level,
`fit_thresholds` applies it to all heads: to each on all tokens (independent, the rule of DSSD), or to each on the tokens
that the heads before it left at that level (conditional), which are the ones it will meet.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit_cli.calibration.intervals import independent_tokens, lower_bound
from early_exit_cli.config import CalibrationConfig
from early_exit_cli.config_training import ThresholdRule
from early_exit_cli.files.schemas import HeadSet


@dataclass(frozen=True)
class Sample:
    """What the heads said of held-out tokens. uncertainties, correct: [heads, tokens]; documents: [tokens]."""

    uncertainties: Tensor
    correct: Tensor
    documents: Tensor

    @property
    def tokens(self) -> int:
        return self.documents.numel()


@dataclass(frozen=True)
class Fitted:
    """A threshold, and whether any token reached the level: if not, it is the lowest uncertainty seen."""

    threshold: float
    reachable: bool


def cumulative_agreement(correct: Tensor) -> Tensor:
    """The share of correct ones among the first 1, 2, ... n, [n] float64."""
    return correct.double().cumsum(0) / torch.arange(1, correct.numel() + 1, dtype=torch.float64)


def threshold_for(
    uncertainties: Tensor, correct: Tensor, level: float, strategy: str, agreement: Tensor | None = None
) -> float:
    """The threshold of one head for one target accuracy.

    Args:
        uncertainties: [samples] float32, ascending. correct: [samples] bool in the same order.
        agreement: [samples], what must reach the level at a position; default: `cumulative_agreement(correct)`.

    Returns:
        The uncertainty at the last position whose cumulative agreement reaches `level` (max_coverage), at the first
        one (min_coverage), half way from the last one to its successor (midpoint), or where a logistic
        P(correct | uncertainty) equals the level, clipped to what was seen (platt_scaling; Platt 1999). Where no
        position reaches the level, the smallest uncertainty seen: no token is strictly below it, so the head never
        exits.
    """
    if strategy == "platt_scaling":
        return _platt_threshold(uncertainties, correct, level)
    valid = reaching(cumulative_agreement(correct) if agreement is None else agreement, level)
    if valid.numel() == 0:
        return float(uncertainties[0])
    if strategy == "min_coverage":
        return float(uncertainties[valid[0]])
    last = int(valid[-1])
    if strategy == "midpoint" and last + 1 < uncertainties.numel():
        return float((uncertainties[last] + uncertainties[last + 1]) / 2)
    return float(uncertainties[last])


def reaching(agreement: Tensor, level: float) -> Tensor:
    """Positions at which a cumulative agreement is at least `level`."""
    return (agreement >= level).nonzero()[:, 0]


def fit_logistic(values: Tensor, outcomes: Tensor, ridge: float) -> tuple[float, float]:
    """(intercept, slope) of P(outcome | value) = sigmoid(intercept + slope * value), by Newton's method.

    Args:
        values: [samples]. outcomes: [samples] bool. ridge: weight of the squared parameters, for separable data.
    """
    x = torch.stack((torch.ones_like(values), values), 1).double()  # [samples, 2]
    y = outcomes.double()
    weights = torch.zeros(2, dtype=torch.float64)
    penalty = ridge * torch.eye(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(x @ weights)
        gradient = x.T @ (p - y) + penalty @ weights
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty
        step = torch.linalg.solve(hessian, gradient)
        weights = weights - step
        if float(step.abs().max()) < 1e-9:
            break
    intercept, slope = weights.tolist()
    return intercept, slope


def _platt_threshold(uncertainties: Tensor, correct: Tensor, level: float) -> float:
    """Where the logistic P(correct | uncertainty) equals the level, with a little ridge for separable data."""
    intercept, slope = fit_logistic(uncertainties, correct, 1e-6 * uncertainties.numel())
    low, high = float(uncertainties[0]), float(uncertainties[-1])
    if slope >= 0:  # uncertainty says nothing here: all exit, or none
        return high if float(correct.double().mean()) >= level else low
    return min(max((math.log(level / (1 - level)) - intercept) / slope, low), high)


def fit_thresholds(sample: Sample, level: float, rule: ThresholdRule, config: CalibrationConfig) -> list[Fitted]:
    """A threshold for every head at one level, shallow heads first.

    With `config.assurance` the lower bound of the cumulative agreement must reach the level, not the agreement itself.
    No threshold is above the highest uncertainty seen, and none is below itself: some tokens are left for every head.
    """
    left = torch.ones(sample.tokens, dtype=torch.bool)
    fitted = []
    for uncertainties, correct in zip(sample.uncertainties, sample.correct, strict=True):
        seen = left if rule == "conditional" else torch.ones_like(left)
        order = uncertainties[seen].argsort(stable=True)
        rising, right = uncertainties[seen][order], correct[seen][order]
        agreement = cumulative_agreement(right)
        if config.assurance is not None:
            worth = independent_tokens(right, sample.documents[seen][order])
            agreement = lower_bound(agreement, worth, config.assurance)
        threshold = threshold_for(rising, right, level, config.threshold_strategy, agreement)
        fitted.append(Fitted(threshold, bool(reaching(agreement, level).numel())))
        left = left & ~(uncertainties.double() < threshold)
    return fitted


def exits_in_order(uncertainties: Tensor, thresholds: list[float]) -> Tensor:
    """Which head each token exits at when all are read in order, [heads, tokens] bool, at most one a token."""
    below = uncertainties < torch.tensor(thresholds, dtype=torch.float64)[:, None]
    return below & (below.cumsum(0) == 1)


def count_head_sets(uncertainties: Tensor, correct: Tensor, thresholds: list[float]) -> list[HeadSet]:
    """For every set of at most four heads: the share of tokens that exits at each, in order, and their agreement.

    Args:
        uncertainties, correct: [heads, tokens].
    """
    counted = []
    for size in range(1, min(len(thresholds), 4) + 1):
        for heads in map(list, itertools.combinations(range(len(thresholds)), size)):
            exits = exits_in_order(uncertainties[heads], [thresholds[head] for head in heads])
            counts = exits.sum(-1).tolist()
            hits = (exits & correct[heads]).sum(-1).tolist()
            counted.append(
                HeadSet(
                    heads=heads,
                    exit_share=[count / uncertainties.shape[1] for count in counts],
                    agreement=[hit / count if count else 0.0 for hit, count in zip(hits, counts, strict=True)],
                )
            )
    return counted
