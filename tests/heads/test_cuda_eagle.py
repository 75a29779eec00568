"""The EAGLE head's chain on a device, in PyTorch's double precision where there is no card."""

import functools

import pytest
import torch
import torch.nn.functional as F
from nf4_models import hold_in_nf4, nf4_backbone, on_reference  # noqa: F401 (a fixture)
from runs import answer, ids_of
from tiny_models import VOCAB

from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.heads.cuda_eagle import MOST_STEPS, CudaEagle
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.runtime.reference_kernels import ReferenceKernels


@pytest.fixture(scope="module")
def head(backbone):
    """A head that drafts half the vocabulary, whose weights are numbers that NF4 holds as they are."""
    torch.manual_seed(3)
    made = EagleHead(backbone(), [1, 3], torch.arange(0, VOCAB, 2)).requires_grad_(False).to(torch.bfloat16)
    made.start_from(backbone())
    for name, weight in made.named_parameters():
        if weight.ndim == 2:
            weight.add_(torch.randn_like(weight), alpha=0.05)
        elif "norm" in name:
            weight.add_(torch.randn_like(weight), alpha=0.2)
    hold_in_nf4(made)
    return made


def states_of(head, count, seed):
    torch.manual_seed(seed)
    return [torch.randn(count, head.fc.weight.shape[0]).to(torch.bfloat16) for _ in range(3)]


@pytest.mark.parametrize("rows", [1, 8, 13, 40, 150])
def test_a_chain_is_reading_and_single_steps(head, rows, monkeypatch):
    whole = "early_exit_cli.heads.eagle_runner.draft_linear"  # in int8 on a CPU, where this is about the chain
    monkeypatch.setattr(whole, lambda weights: functools.partial(F.linear, weight=torch.cat(weights)))
    chained, single = CudaEagle(head, ReferenceKernels(), lambda step: step), EagleRunner(head)
    with torch.inference_mode():
        for seed in (1, 2, 3):  # each behind what was read before
            tokens, states = ids_of(rows, seed, VOCAB).tolist(), states_of(head, rows, seed)
            found, entropies = chained.chain(tokens, states, MOST_STEPS)
            hidden = single.read(tokens, states)
            for ahead in range(MOST_STEPS):
                logits = single.lm_head(hidden)[0].float()
                column = (head.draft_vocab == found[ahead]).nonzero().item()
                assert logits[column] > logits.max() - 0.7  # the best, but for eight steps of rounding
                assert entropies[ahead] == pytest.approx(single.choose(hidden)[1], abs=0.15)
                hidden = single.step(found[ahead], hidden, ahead + 1)
            assert chained.cache.length == single.cache.length == seed * rows


def test_texts_do_not_share_what_they_have_read(head):
    first = CudaEagle(head, ReferenceKernels(), lambda step: step)
    second = first.fork()
    with torch.inference_mode():
        expected = first.chain([1, 2, 3], states_of(head, 3, 1), 4)
        second.chain([9] * 8, states_of(head, 8, 2), 4)
        first.cache.length = 0
        assert first.chain([1, 2, 3], states_of(head, 3, 1), 4) == expected


def test_a_chain_ends_at_what_is_not_finite(head):
    runner = CudaEagle(head, ReferenceKernels(), lambda step: step)
    states = states_of(head, 2, 1)
    states[-1][1, 0] = float("nan")
    with torch.inference_mode():
        assert runner.chain([1, 2], states, 4) == ([], [])


def test_drafting_in_chains_leaves_the_words(head, backbone):
    model = Engine(backbone(), on_reference(backbone()), eagle=head)
    head.on_device = CudaEagle(head, ReferenceKernels(), lambda step: step)
    plain = answer(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("early_exit_cli.drafting.eagle.eagle_runner", lambda head: head.on_device.fork())
        for chance in (0.9, 0.5):
            survival = Survival(intercept=2.0, slope=-0.5, mean=chance)
            drafter = EagleDrafter(head, [survival], lambda rows: 1.0 + 0.01 * rows, 0.05, 0.02)
            drafted = answer(model, drafter)
            assert drafted.stats.tokens_drafted > 0
            assert drafted.token_ids == plain.token_ids
            assert torch.equal(drafted.states, plain.states)


def test_a_chain_is_as_long_as_its_chances_pay_for(head):
    head.on_device = CudaEagle(head, ReferenceKernels(), lambda step: step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("early_exit_cli.drafting.eagle.eagle_runner", lambda head: head.on_device.fork())
        lengths = [
            EagleDrafter(
                head, [Survival(intercept=0, slope=0, mean=chance)], lambda rows: 1.0, 0.05, step
            )._chain_length(MOST_STEPS)
            for chance, step in ((0.95, 0.02), (0.7, 0.02), (0.7, 0.2), (0.3, 0.2))
        ]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == MOST_STEPS
    assert lengths[-1] <= 2
