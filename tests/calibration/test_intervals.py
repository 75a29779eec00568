import pytest
import torch

from early_exit_cli.calibration.intervals import independent_tokens, lower_bound, tokens_missing


def share(right, tokens):
    return torch.tensor(right / tokens, dtype=torch.float64), torch.tensor(float(tokens), dtype=torch.float64)


@pytest.mark.parametrize(
    ("right", "tokens", "expected"), [(81, 263, 0.2553), (15, 148, 0.0624), (0, 20, 0.0), (1, 29, 0.0061)]
)
def test_the_bound_is_the_published_one(right, tokens, expected):
    """Lower limits of two-sided 95 % intervals in Newcombe (1998), table I, method 3."""
    assert float(lower_bound(*share(right, tokens), 0.975)) == pytest.approx(expected, abs=5e-5)


def test_tokens_of_different_texts_are_all_independent():
    correct = torch.tensor([1, 1, 0, 1, 0, 0, 1]).bool()
    assert independent_tokens(correct, torch.arange(7)).tolist() == pytest.approx([1, 2, 3, 4, 5, 6, 7])


def test_texts_that_are_all_right_or_all_wrong_count_once_each():
    correct = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    documents = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    assert float(independent_tokens(correct, documents)[-1]) == pytest.approx(2)


def test_every_prefix_is_counted_by_the_formula():
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(6, (60,), generator=generator)
    correct = torch.rand(60, generator=generator) < (documents + 1) / 7
    found = independent_tokens(correct, documents)
    for n in range(1, 61):
        r = float(correct[:n].double().mean())
        variance = (
            sum(
                (int(correct[:n][documents[:n] == d].sum()) - r * int((documents[:n] == d).sum())) ** 2
                for d in range(6)
            )
            / n**2
        )
        simple = r * (1 - r) / n
        expected = n if simple == 0 else n * simple / max(simple, variance)
        assert float(found[n - 1]) == pytest.approx(expected)
    assert float(found[-1]) < 40


def test_missing_tokens_are_just_enough():
    assert tokens_missing(0.9, 1000, 1000.0, 0.9, 0.01) == 2649 - 1000
    assert float(lower_bound(*share(0.9 * 2649, 2649))) >= 0.89 > float(lower_bound(*share(0.9 * 2648, 2648)))
    assert tokens_missing(0.9, 2649, 2649.0, 0.9, 0.01) == 0
    assert tokens_missing(0.9, 1000, 500.0, 0.9, 0.01) == 5298 - 1000  # alike tokens count half
    assert tokens_missing(0.5, 100, 100.0, 0.9, 0.01) == 2649 - 100  # what lies below the level never gets there
    assert tokens_missing(0.0, 0, 0.0, 0.9, 0.01) == 2649
