"""What calibration fits and counts, on numbers that can be worked out."""

import math

import pytest
import torch

from early_exit_cli.calibration.thresholds import (
    Sample,
    count_head_sets,
    exits_in_order,
    fit_logistic,
    fit_thresholds,
    threshold_for,
)
from early_exit_cli.config import CalibrationConfig
from early_exit_cli.heads.uncertainty import may_exit

VALUES = torch.tensor([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0])


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 5.0])
@pytest.mark.parametrize("outcomes", [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 1]], ids=["balanced", "mostly right"])
def test_a_fitted_logistic_is_where_its_loss_is_flat(outcomes, ridge):
    """The derivative of the penalized likelihood by both parameters, by hand, is zero there."""
    intercept, slope = fit_logistic(VALUES, torch.tensor(outcomes).bool(), ridge)
    wrong = [
        1 / (1 + math.exp(-(intercept + slope * value))) - outcome
        for value, outcome in zip(VALUES.tolist(), outcomes, strict=True)
    ]
    assert sum(wrong) + ridge * intercept == pytest.approx(0, abs=1e-7)
    by_slope = sum(error * value for error, value in zip(wrong, VALUES.tolist(), strict=True))
    assert by_slope + ridge * slope == pytest.approx(0, abs=1e-7)


def test_ridge_holds_what_separable_data_would_send_to_infinity():
    outcomes = VALUES < 0
    slopes = [fit_logistic(VALUES, outcomes, ridge)[1] for ridge in (1e-3, 1e-1, 10.0)]
    assert slopes == sorted(slopes)
    assert -30 < slopes[0] < -5
    assert -0.5 < slopes[-1] < 0


def test_every_set_of_heads_counts_what_exits_at_each_in_order():
    uncertainties = torch.tensor([[0.1, 0.9, 0.1, 0.9], [0.1, 0.1, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]])
    correct = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    counted = {tuple(found.heads): found for found in count_head_sets(uncertainties, correct, [0.5, 0.5, 0.5])}
    assert list(counted) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert (counted[0,].exit_share, counted[0,].agreement) == ([0.5], [0.5])
    assert (counted[1,].exit_share, counted[1,].agreement) == ([0.5], [0.5])
    assert (counted[2,].exit_share, counted[2,].agreement) == ([0.0], [0.0])  # nothing exits there
    assert (counted[0, 1].exit_share, counted[0, 1].agreement) == ([0.5, 0.25], [0.5, 1.0])
    assert (counted[0, 1, 2].exit_share, counted[0, 1, 2].agreement) == ([0.5, 0.25, 0.0], [0.5, 1.0, 0.0])


def test_sets_of_more_than_four_heads_are_not_counted():
    uncertainties = torch.zeros(5, 3)
    counted = count_head_sets(uncertainties, torch.ones(5, 3).bool(), [1.0] * 5)
    assert max(len(found.heads) for found in counted) == 4
    assert len(counted) == 5 + 10 + 10 + 5


ENTROPIES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("correct", "level", "expected"),
    [
        ([0, 0, 0, 0, 1, 1, 1, 1], 0.4, 0.8),  # surer where it is wrong: all exit, or none
        ([0, 0, 0, 0, 1, 1, 1, 1], 0.5, 0.8),
        ([0, 0, 0, 0, 1, 1, 1, 1], 0.6, 0.1),
        ([0, 1, 1, 0, 0, 1, 1, 0], 0.5, 0.8),  # as sure of either: a slope of nothing
        ([1, 1, 1, 1, 1, 1, 1, 0], 0.01, 0.8),  # never above what was seen
    ],
)
def test_platt_scaling_stays_within_what_was_seen(correct, level, expected):
    found = threshold_for(ENTROPIES, torch.tensor(correct).bool(), level, "platt_scaling")
    assert found == pytest.approx(expected)


def of_one_head(correct):
    return Sample(ENTROPIES[None], torch.tensor([correct]).bool(), torch.arange(8))


@pytest.mark.parametrize(("strategy", "expected"), [("max_coverage", 0.5), ("min_coverage", 0.1), ("midpoint", 0.55)])
def test_the_strategy_of_the_settings_is_followed(strategy, expected):
    config = CalibrationConfig(threshold_strategy=strategy)
    (found,) = fit_thresholds(of_one_head([1, 0, 1, 1, 1, 0, 0, 0]), 0.8, "independent", config)
    assert found.threshold == pytest.approx(expected)
    assert found.reachable


def test_the_surer_one_wants_to_be_the_fewer_tokens_exit():
    sample = Sample(torch.arange(200)[None] / 200, (torch.arange(200) % 8 != 7)[None], torch.arange(200))
    thresholds = []
    for assurance in (0.51, 0.9, 0.999):
        sample.correct[0, 150:] = False
        (found,) = fit_thresholds(sample, 0.8, "independent", CalibrationConfig(assurance=assurance))
        thresholds.append(found.threshold)
    assert thresholds[0] > thresholds[1] > thresholds[2]


@pytest.mark.parametrize("threshold", [0.1, 0.1000000014, 0.1000000016, 0.3, math.inf, -math.inf])
def test_calibration_counts_an_exit_where_decoding_makes_one(threshold):
    """Between two neighbours in float32 a threshold is not rounded."""
    uncertainties = torch.tensor([[0.1, 0.3, 0.30000001, 0.05]])
    counted = exits_in_order(uncertainties, [threshold])[0].tolist()
    assert counted == [may_exit(found, threshold) for found in uncertainties[0].tolist()]
