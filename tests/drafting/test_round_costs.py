"""What rounds take beyond their parts is learned as they run, and drafts that it makes dearer than plain decoding end."""

import pytest

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.drafter import Draft, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.drafting.reasons import Match
from early_exit_cli.runtime.round_times import RoundTimes

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6]


def times_of(plain=(), **drafted):
    times = RoundTimes()
    for kind, beyond in {"": plain, **drafted}.items():
        for milliseconds in beyond:
            times.observe(kind, 10.0 + milliseconds, 10.0)
    return times


def test_nothing_is_added_until_both_kinds_of_rounds_are_known():
    assert times_of().extra("lookup") == 0.0
    assert times_of(lookup=[1.0] * 9).extra("lookup") == 0.0
    assert times_of([0.2] * 3, lookup=[1.0] * 2).extra("lookup") == 0.0
    assert times_of([0.2] * 2, lookup=[1.0] * 3).extra("lookup") == 0.0
    assert times_of([0.2] * 3, lookup=[1.0] * 3).extra("lookup") == pytest.approx(0.8)


def test_a_moment_in_which_the_machine_did_something_else_changes_nothing():
    assert times_of([0.2, 0.2, 50.0, 0.2], lookup=[0.5, 0.5, 0.5, 90.0]).extra("lookup") == pytest.approx(0.3)


def test_old_rounds_are_forgotten_and_quicker_ones_add_nothing():
    times = times_of([0.2] * 3, lookup=[5.0] * 9 + [0.7] * 9)
    assert times.extra("lookup") == pytest.approx(0.5)
    assert times_of([0.9] * 3, lookup=[0.1] * 3).extra("lookup") == 0.0


def a_lookup(times):
    drafter = LookupDrafter(lambda rows: 1.0)
    drafter.times = times
    drafter.begin(PROMPT)
    return drafter


def test_lookup_ends_where_its_rounds_are_too_long():
    assert a_lookup(None).draft(None, None, 6, 5, ()).tokens == [7, 8, 1, 2, 3]
    assert a_lookup(times_of([0.0] * 3, lookup=[0.1] * 3)).draft(None, None, 6, 5, ()).tokens
    assert not a_lookup(times_of([0.0] * 3, lookup=[9.0] * 3)).draft(None, None, 6, 5, ()).tokens


def test_auto_begins_plainly_where_it_learns_and_counts_rounds_by_who_drafted():
    times = RoundTimes()
    drafter = AutoDrafter([(a_lookup(times), 15)], plain_cost=1.0)
    drafter.times = times
    for _ in range(RoundTimes.NEEDED):
        assert not drafter.draft(None, None, 6, 5, ()).tokens
        assert not drafter.timed(Draft(), 1.5)
    draft = drafter.draft(None, None, 6, 5, ())
    assert draft.tokens == [7, 8, 1, 2, 3]
    assert drafter.timed(draft, 3.0)
    assert list(times.beyond[""]) == [0.5] * RoundTimes.NEEDED
    assert list(times.beyond["lookup"]) == [2.0]


def test_the_eagle_head_pays_for_a_chain_that_was_not_worth_verifying(monkeypatch):
    monkeypatch.setattr("early_exit_cli.drafting.eagle.eagle_runner", lambda head: None)

    class Head:
        exit_layers = (1,)

    drafter = EagleDrafter(Head(), [Survival(intercept=0, slope=0, mean=0.8)], lambda rows: 1.0 + rows, 0.5, 0.1)
    drafter.times = times_of([0.0] * 3)
    assert not drafter.timed(Draft(), 9.0)
    for _ in range(3):
        drafter.spent = 0.7
        assert drafter.timed(Draft(), 4.0)  # a pass of one row costs 2
    assert drafter.times.extra("eagle") == pytest.approx(1.3)
    drafter.waiting = [([1], [])]
    dear = drafter.expected_rate(8)
    drafter.times = times_of([0.0] * 3)
    assert drafter.expected_rate(8) > dear


def test_a_match_of_somebody_else_is_not_timed():
    drafter = a_lookup(RoundTimes())
    assert not drafter.timed(Draft(), 1.0)
    assert drafter.timed(Draft([7], [Match(3)]), 1.0)
    assert "" not in drafter.times.beyond


def test_every_round_of_an_answer_is_timed(tiny_model):
    class Watching(NoDrafter):
        def __init__(self):
            self.seen = []

        def timed(self, draft, milliseconds):
            self.seen.append(milliseconds)
            return False

    drafter = Watching()
    answer = generate(tiny_model("llama"), Request(PROMPT, 6), drafter, mode="")
    assert len(drafter.seen) == len(answer.rounds)
    assert all(milliseconds > 0 for milliseconds in drafter.seen)
    assert drafter.times is None  # on a CPU the parts are what a round takes
