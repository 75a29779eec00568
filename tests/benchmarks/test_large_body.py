"""A model carried into a larger shape says what it said, and so do its heads."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from large_body import Shape, large_backbone, large_eagle, large_exits
from nf4_models import nf4_backbone  # noqa: F401 (a fixture)
from runs import distance, ids_of

from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.heads.exit_heads import ExitHeads

SHAPE = Shape(hidden=512, inner=320, blocks=6, query_heads=16, kv_heads=4, head_dim=128, vocab=384)


@pytest.fixture(scope="module")
def pair(backbone):
    """Both, the large one's weights as they were carried: quantized once more they would be others."""

    def linear(weight):
        made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        made.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("large_body._in_nf4", linear)
        return backbone(), large_backbone(backbone(), SHAPE)


def test_logits_and_states_are_those_of_the_small_model(pair):
    small, large = pair
    ids = ids_of(40, vocab=VOCAB)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        *deep, final = small.hidden_states_at(ids, mask, [2, 4])
        *wide, wide_final = large.hidden_states_at(ids, mask, [2, 4])
        for ours, theirs in zip(wide, deep, strict=True):
            assert distance(ours[..., : small.hidden_size], theirs) < 0.03
            assert not ours[..., small.hidden_size :].any()
        logits = large.lm_head(wide_final)
        assert distance(logits[..., :VOCAB], small.lm_head(final)) < 0.03
        assert not logits[..., VOCAB:].any()


def test_heads_say_what_they_said(pair):
    small, large = pair
    torch.manual_seed(2)
    exits = ExitHeads(small, "adapter", [2], 16, None).requires_grad_(False).to(torch.bfloat16)
    exits.heads[0].up.weight.normal_(std=0.1)
    head = EagleHead(small, [1, 3], None).requires_grad_(False).to(torch.bfloat16)
    head.start_from(small)
    for weight in head.parameters():
        weight.add_(torch.randn_like(weight), alpha=0.03)
    ids = ids_of(20, vocab=VOCAB)[None]
    found = []
    for model, own_exits, own_head in (
        (small, exits, head),
        (large, large_exits(exits, small, large, SHAPE), large_eagle(head, small, large, SHAPE)),
    ):
        with torch.no_grad():
            states = [state[0] for state in model.hidden_states_at(ids, torch.ones_like(ids), [1, 2, 3])]
            runner = EagleRunner(own_head)
            hidden = runner.read(ids[0].roll(-1).tolist(), [states[0], states[2], states[3]])
            again = runner.step(7, hidden, 1)
            logits = (own_exits.logits(0, states[1]), own_head.logits(hidden), own_head.logits(again))
            found.append([logit[..., :VOCAB] for logit in logits])
    for ours, theirs in zip(*found, strict=True):
        assert distance(ours, theirs) < 0.06
