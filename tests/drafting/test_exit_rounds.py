"""What exits promise, what a text makes of it, and exits beside drafters that look at states below them."""

import random
from collections import Counter

import pytest
import torch
from drafters import PROMPT, some_head, thresholds_between

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import generate_batch
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.drafter import Draft, Drafter, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.exit import ROUNDS, ExitDrafter
from early_exit_cli.drafting.exit_rounds import ExitRounds
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.drafting.reasons import Exit, Match, Step
from early_exit_cli.drafting.round_costs import FORGETTING

PAYING = ExitRounds(chances=[0.5, 0.5], tokens=[1.0, 1.8], milliseconds=[8.0, 10.0], plain=10.0)
"""1.4 tokens in 9 milliseconds, where plain decoding makes 0.9."""


def exits_of(model, rounds=PAYING, share=0.7, active=(2,)):
    return ExitDrafter(thresholds_between(model, share), list(active), rounds=rounds)


class Watcher(Drafter):
    """Looks at the states below the exits and never drafts."""

    name, exit_layers = "watcher", (1, 2, 4)

    def __init__(self):
        self.seen = []

    def process(self, tokens, states):
        self.seen += zip(tokens, *states, strict=True)

    def draft(self, *_):
        return Draft()


def test_a_promise_is_of_calibration_and_of_this_text(tiny_model):
    model = tiny_model("llama")
    drafter = exits_of(model)
    assert drafter.expected_rate(4) == 0.0  # not bound
    drafter.bind(model)
    drafter.begin(PROMPT)
    assert PAYING.mean == pytest.approx((1.4, 9.0))
    assert drafter.expected_rate(4) == PAYING.rate == pytest.approx(1.4 / 9)
    assert drafter.expected_rate(0) == 0.0
    drafter.accept(Draft(tokens=[1], rows=[{4: torch.zeros(1)}]), [2], 0)
    assert drafter.expected_rate(4) == pytest.approx((ROUNDS * 1.4 + 1) / (ROUNDS * 9 + 10))
    drafter.accept(Draft(tokens=[1]), [1, 2], 1)  # somebody else's
    assert drafter.shown == (1.0, 10.0)
    drafter.resize_batch(2)
    assert drafter.expected_rate(4) == 0.0
    drafter.resize_batch(1)
    drafter.begin(PROMPT)
    assert drafter.expected_rate(4) == PAYING.rate
    assert ExitDrafter([9.0] * 3).expected_rate(4) == 0.0  # nothing is expected of them, and nothing held against them


def test_exits_that_a_text_shows_not_to_pay_stop_and_are_tried_again(tiny_model):
    model = tiny_model("llama")
    drafter = exits_of(model)
    drafter.bind(model)
    drafter.begin(PROMPT)
    drafter.shown = (100.0, 1100.0)  # slower than plain decoding
    cache = model.prefill(PROMPT, 8)
    tried = 0
    with torch.inference_mode():
        while not drafter.draft(model, cache, PROMPT[-1], 4, ()).rows:
            tried += 1
            assert drafter.shown[0] == pytest.approx(100 * FORGETTING**tried)
    assert 5 < tried < 100


def test_exits_that_do_not_pay_run_nothing(tiny_model):
    model = tiny_model("llama")
    idle = ExitRounds([1.0], [1.0], [10.0], 10.0)
    run = generate(model, Request(PROMPT, 30), exits_of(model, idle), mode="exits", width=8)
    assert run.stats.tokens_drafted == 0


def test_who_looks_below_the_exits_sees_what_plain_decoding_shows(tiny_model):
    model = tiny_model("llama")
    shown = []
    for exits in ([], [(exits_of(model), 7)], [(exits_of(model, active=(0, 2)), 7)]):
        watcher = Watcher()
        auto = AutoDrafter([(watcher, 7), *exits])
        run = generate(model, Request(PROMPT, 40), auto, mode="auto", width=8)
        assert (run.stats.tokens_drafted > 0) == bool(exits)
        shown.append(watcher.seen)
    plain, *drafted = shown
    for seen in drafted:
        assert len(seen) == len(plain) == len(PROMPT) - 1 + len(run.token_ids)
        for mine, theirs in zip(seen, plain, strict=True):
            assert mine[0] == theirs[0]
            assert all(torch.equal(a, b) for a, b in zip(mine[1:], theirs[1:], strict=True))


@pytest.mark.parametrize("batch", [1, 3])
def test_all_three_draft_side_by_side_and_change_nothing(tiny_model, batch):
    model = tiny_model("llama")

    def auto():
        lookup = LookupDrafter(lambda rows: 10.0 + 0.1 * rows)
        half = [Survival(intercept=0.0, slope=0.0, mean=0.5)]
        eagle = EagleDrafter(some_head(model.backbone), half, lambda rows: 10.0 + 0.1 * rows, 0.5, 0.5)
        return AutoDrafter([(lookup, 7), (eagle, 7), (exits_of(model, share=0.9), 7)])

    dice = random.Random(1)
    prompts = [[dice.randrange(250) for _ in range(9)] * times for times in (1, 2, 3, 4)]
    requests = [Request(ids, 40) for ids in prompts]
    plain = [generate(model, request, NoDrafter(), mode="full", keep_states=True) for request in requests]
    if batch == 1:
        found = [generate(model, request, auto(), mode="auto", width=8, keep_states=True) for request in requests]
        assert all(torch.equal(mine.states, theirs.states) for mine, theirs in zip(found, plain, strict=True))
    else:
        found = generate_batch(model, requests, auto(), mode="auto", batch=batch, width=8)
    assert [run.token_ids for run in found] == [run.token_ids for run in plain]
    drafted = Counter(
        type(reason)
        for run in found
        for step in run.rounds
        for reason in (*step.decided_by, *(reason for _, reason in step.rejected))
    )
    assert drafted[Match] > 0
    assert drafted[Step] > 0
    assert drafted[Exit] > 0
    assert sum(run.stats.partly_rejected_drafts for run in found) > 0
