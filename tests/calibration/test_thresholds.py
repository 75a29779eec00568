import pytest
import torch

from early_exit_cli.calibration.thresholds import Sample, exits_in_order, fit_thresholds, threshold_for
from early_exit_cli.config import CalibrationConfig

ENTROPIES = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
#            cumulative accuracy   1    1/2  2/3  3/4  3/5  1/2
CORRECT = torch.tensor([True, False, True, True, False, False])


@pytest.mark.parametrize(
    ("strategy", "level", "expected"),
    [
        ("max_coverage", 0.75, 0.4),
        ("max_coverage", 0.6, 0.5),
        ("max_coverage", 0.5, 0.6),
        ("max_coverage", 0.9, 0.1),
        ("min_coverage", 0.6, 0.1),
        ("midpoint", 0.75, 0.45),
        ("midpoint", 0.5, 0.6),
    ],
)
def test_thresholds_follow_the_rules_on_numbers_worked_by_hand(strategy, level, expected):
    assert threshold_for(ENTROPIES, CORRECT, level, strategy) == pytest.approx(expected)


@pytest.mark.parametrize("strategy", ["max_coverage", "min_coverage", "midpoint"])
def test_an_unreachable_level_never_exits(strategy):
    threshold = threshold_for(ENTROPIES, torch.zeros(6, dtype=torch.bool), 0.6, strategy)
    assert threshold == pytest.approx(0.1)
    assert not (threshold > ENTROPIES).any()


def test_platt_scaling_finds_the_level_of_a_known_logistic():
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand(60_000, generator=generator).mul(6).sort().values
    chance = torch.sigmoid(3 - 1.5 * entropies)
    correct = torch.rand(60_000, generator=generator) < chance
    # sigmoid(3 - 1.5 x) = 0.8  at  x = (3 - ln 4) / 1.5
    assert threshold_for(entropies, correct, 0.8, "platt_scaling") == pytest.approx((3 - 1.3863) / 1.5, abs=0.06)
    assert threshold_for(entropies, correct, 0.99, "platt_scaling") == pytest.approx(float(entropies[0]))


def sample(uncertainties, correct, documents=None):
    correct = torch.tensor(correct).bool()
    owners = torch.arange(correct.shape[1]) if documents is None else torch.tensor(documents)
    return Sample(torch.tensor(uncertainties), correct, owners)


def test_a_token_exits_at_the_first_head_that_is_sure():
    uncertainties = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.1, 0.1, 0.1, 0.9]])
    assert exits_in_order(uncertainties, [0.5, 0.2]).tolist() == [
        [True, False, False, False],  # 0.5 is not strictly below 0.5
        [False, True, True, False],
    ]


def test_a_conditional_head_meets_what_the_heads_before_it_left():
    """The second head is right wherever the first one is sure, and wrong elsewhere: alone it reaches any level, on the
    tokens that are left none."""
    both = sample([[0.1, 0.2, 0.3, 0.8, 0.9], [0.1, 0.2, 0.3, 0.4, 0.5]], [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    config = CalibrationConfig()
    alone = fit_thresholds(both, 0.75, "independent", config)
    left = fit_thresholds(both, 0.75, "conditional", config)
    assert [found.threshold for found in alone] == pytest.approx([0.8, 0.4])
    assert [found.reachable for found in alone] == [True, True]
    assert [found.threshold for found in left] == pytest.approx([0.8, 0.4])
    assert [found.reachable for found in left] == [True, False]
    assert exits_in_order(both.uncertainties, [found.threshold for found in left])[1].sum() == 0


@pytest.mark.parametrize("strategy", ["max_coverage", "min_coverage", "midpoint", "platt_scaling"])
def test_some_tokens_are_left_for_every_head(strategy):
    """Even a head that is always right leaves the token it is least sure of."""
    sure = sample([[0.1, 0.2, 0.3]] * 3, [[1, 1, 1]] * 3)
    config = CalibrationConfig(threshold_strategy=strategy)
    thresholds = [found.threshold for found in fit_thresholds(sure, 0.6, "conditional", config)]
    assert not exits_in_order(sure.uncertainties, thresholds).all(0).any()
    assert all(threshold <= torch.tensor(0.3) for threshold in thresholds)


def test_assurance_asks_for_more_than_the_average():
    """100 tokens of 9 right in 10: on average that is 0.9; to be sure of 0.8 takes about 0.86, of 0.9 more than this."""
    entropies = [[step / 100 for step in range(100)]]
    most = sample(entropies, [[step % 10 != 9 for step in range(100)]])
    assert fit_thresholds(most, 0.9, "independent", CalibrationConfig())[0].threshold == pytest.approx(0.99)
    assured = CalibrationConfig(assurance=0.95)
    assert fit_thresholds(most, 0.8, "independent", assured)[0].threshold == pytest.approx(0.99)
    assert not fit_thresholds(most, 0.9, "independent", assured)[0].reachable
    #  the same tokens from two texts only, one of them always right, are worth fewer
    half = [[1] * 50 + [1, 1, 1, 0] * 12 + [1, 0]]
    apart = fit_thresholds(sample(entropies, half), 0.8, "independent", assured)[0].threshold
    alike = fit_thresholds(sample(entropies, half, [0] * 50 + [1] * 50), 0.8, "independent", assured)[0].threshold
    assert alike < apart == pytest.approx(0.99)
