"""The exact argmax: equal to the full product's on real text, on ties, and where the bound helps nothing."""

import pytest
import torch
import torch.nn.functional as F

from early_exit_cli.runtime import exact_argmax as lm_head
from early_exit_cli.runtime.exact_argmax import ExactArgmax, full_argmax, usable


def normed_states(backbone, text):
    ids = torch.tensor([backbone.encode_prompt(text)])
    return backbone.hidden_states_at(ids, torch.ones_like(ids), [1])[-1][0]


@pytest.fixture(scope="module")
def states(smollm2):
    texts = [
        "List the first ten prime numbers, and say for each why it is prime. " * 3,
        "Translate into French: the old sailor told stories of storms and far harbours. " * 3,
        "def fibonacci(n):\n    a, b = 0, 1\n    while a < n:\n        print(a)\n        a, b = b, a + b\n" * 3,
    ]
    return torch.cat([normed_states(smollm2, text) for text in texts])


def test_the_exact_argmax_is_the_full_products_on_real_text(smollm2, states):
    weight = smollm2.lm_head.weight
    assert usable(weight)
    exact = ExactArgmax(weight)
    ties = 0
    for width in (1, 2, 3, 4, 8):
        for rows in states.split(width):
            choices, best = full_argmax(weight, rows)
            assert torch.equal(exact(rows)[0], choices)
            ties += int(((F.linear(rows, weight) == best[:, None]).sum(-1) > 1).sum())
    assert ties > 0  # bfloat16 logits tie on real text; the lowest id must win there too


def test_few_rows_decide(smollm2, states, monkeypatch):
    """On real text the bound leaves few candidates: the full product must not be what gives the answer."""
    exact = ExactArgmax(smollm2.lm_head.weight)

    def forbidden(*_):
        raise AssertionError("fell back to the full product")

    monkeypatch.setattr(lm_head, "full_argmax", forbidden)
    for rows in states.split(2):
        exact(rows)


def test_the_error_bound_holds_for_every_token(smollm2, states):
    weight = smollm2.lm_head.weight
    exact = ExactArgmax(weight)
    for rows in states[:64].split(4):
        approximate = torch._weight_int8pack_mm(rows, exact.quantized, exact.scales).double()
        full = F.linear(rows, weight).double()
        norm = rows.double().norm(dim=-1, keepdim=True)
        bound = exact.row_bound.double() * norm + lm_head.SLACK * approximate.abs()
        assert ((approximate - full).abs() <= bound).all()


def test_hard_cases_fall_back_to_the_full_product():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=generator).to(torch.bfloat16)
    weight[100] = weight[4000]  # an exact tie
    exact = ExactArgmax(weight)
    rows = torch.cat((torch.zeros(1, 64), weight[100:101].float(), torch.randn(2, 64, generator=generator) * 1e-3))
    rows = rows.to(torch.bfloat16)
    assert torch.equal(exact(rows)[0], full_argmax(weight, rows)[0])
    assert exact(rows)[0].tolist()[:2] == [0, 100]


def test_nan_states_are_seen():
    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    rows = torch.full((2, 64), float("nan"), dtype=torch.bfloat16)
    assert not torch.isfinite(ExactArgmax(weight)(rows)[1]).any()


def test_unsuitable_weights_keep_the_full_product():
    assert not usable(torch.randn(5000, 64))
    assert not usable(torch.randn(300, 64).to(torch.bfloat16))


@pytest.mark.slow
def test_a_quarter_of_a_million_positions(smollm2):
    """Normed states around real ones: 250,000 positions, exact argmax against the full product."""
    weight = smollm2.lm_head.weight
    exact = ExactArgmax(weight)
    base = normed_states(smollm2, "The history of the lighthouse is the history of trade by sea. " * 30)
    generator = torch.Generator().manual_seed(0)
    wrong = seen = 0
    while seen < 250_000:
        noise = torch.randn(base.shape, generator=generator) * base.float().std() * torch.rand(1, generator=generator)
        for rows in (base.float() + noise).to(torch.bfloat16).split(64):
            wrong += int((exact(rows)[0] != full_argmax(weight, rows)[0]).sum())
            seen += rows.shape[0]
    assert wrong == 0
