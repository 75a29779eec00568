"""How far an EAGLE head drafts: against all draft lengths tried one by one, with a head whose steps are known."""

import math
import random

import pytest
import torch

from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.drafter import Draft
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.reasons import Match, Step
from early_exit_cli.drafting.round_costs import NEED
from early_exit_cli.heads.head_runner import HeadRunner
from early_exit_cli.sampling import GREEDY, Sampler

SURVIVAL = [
    Survival(intercept=3.0, slope=-1.0, mean=0.9),
    Survival(intercept=2.0, slope=-1.5, mean=0.7),
    Survival(intercept=1.0, slope=-0.5, mean=0.6),
]
READ, STEP = 0.5, 0.2


def pass_cost(rows):
    return 9.0 + 0.4 * rows


class Runner(HeadRunner):
    """Says these tokens with these entropies; with `most_steps`, all at once."""

    def __init__(self, tokens, entropies, most_steps=0):
        self.tokens, self.entropies, self.most_steps = tokens, entropies, most_steps
        self.read_rows, self.asked = [], []

    def rewind(self, length=0):
        pass

    def fork(self):
        return self

    def read(self, tokens, states):
        self.read_rows.append((tokens, [state.tolist() for state in states]))
        return 0

    def step(self, token, hidden, ahead):
        assert (token, ahead) == (self.tokens[hidden], hidden + 1)
        return hidden + 1

    def choose(self, hidden, chooser, drafted, temperature):
        assert drafted == self.tokens[:hidden]
        self.asked.append(temperature)
        return self.tokens[hidden], self.entropies[hidden]

    def chain(self, tokens, states, count):
        self.read(tokens, states)
        self.asked.append(count)
        return self.tokens[:count], self.entropies[:count]


@pytest.fixture
def make(monkeypatch):
    def made(tokens, entropies, survival=SURVIVAL, most_steps=0, cost=pass_cost, temperature=1.0, **costs):
        runner = Runner(tokens, entropies, most_steps)
        monkeypatch.setattr("early_exit_cli.drafting.eagle.eagle_runner", lambda head: runner)

        class Head:
            exit_layers = (1,)

        costs = {"read_cost": READ, "step_cost": STEP} | costs
        drafter = EagleDrafter(Head(), survival, cost, temperature=temperature, **costs)
        drafter.begin([1, 2])
        drafter.process([3], [torch.zeros(1, 2)])
        return drafter, runner

    return made


def chance(place, entropy=None, survival=SURVIVAL):
    at = survival[min(place, len(survival) - 1)]
    return min(at.mean if entropy is None else at.at(entropy), 0.995)


def best_length(chances, made, limit, cost=pass_cost):
    """Of all draft lengths the one with the most tokens per millisecond; one with a draft must be NEED times better."""

    def rate(length):
        products = [1.0]
        for place in range(length):
            known = chances[place] if place < len(chances) else chance(place)
            products.append(products[-1] * known)
        return sum(products) / (cost(length + 1) + READ + STEP * (max(made, length) - 1))

    best, to_beat = 0, NEED * rate(0)
    for length in range(1, limit + 1):
        if rate(length) > to_beat:
            best, to_beat = length, rate(length)
    return best


def expected_draft(entropies, limit):
    """Step by step, as long as a longer draft promises more."""
    for made in range(1, limit + 1):
        chances = [chance(place, entropies[place]) for place in range(made)]
        best = best_length(chances, made, limit)
        if best <= made:
            return best
    return limit


SURE, UNSURE = 0.05, 6.0
ENTROPIES = [
    [SURE] * 12,
    [SURE, SURE, UNSURE, *[SURE] * 9],
    [SURE, 2.0, 1.0, 2.0, 1.0, *[3.0] * 7],
    [2.5, *[SURE] * 11],
    [UNSURE, *[SURE] * 11],
    [1.0, 1.4, 1.0, 1.0, 2.0, *[SURE] * 7],
]


@pytest.mark.parametrize("limit", [1, 2, 5, 11])
@pytest.mark.parametrize("entropies", ENTROPIES, ids=range(len(ENTROPIES)))
def test_a_draft_is_as_long_as_all_lengths_tried_one_by_one_say(make, entropies, limit):
    tokens = list(range(10, 22))
    drafter, runner = make(tokens, entropies, temperature=0.7)
    draft = drafter.draft(None, None, 3, limit, ())
    length = expected_draft(entropies, limit)
    assert draft.tokens == tokens[:length]
    assert set(runner.asked) == {0.7}
    for place, reason in enumerate(draft.reasons):
        assert (reason.number, reason.entropy) == (place + 1, entropies[place])
        assert reason.chance == pytest.approx(chance(place, entropies[place]))
    assert len(draft.reasons) == length
    first = (tokens[0], pytest.approx(chance(0, entropies[0])))
    assert drafter.guess == (None if length else first)


def test_these_cases_have_drafts_of_every_kind():
    lengths = {expected_draft(entropies, 11) for entropies in ENTROPIES}
    assert 0 in lengths
    assert len(lengths) >= 4


def test_nothing_is_drafted_behind_the_end(make):
    drafter, _ = make([10, 11, 12, 13], [SURE] * 4)
    assert drafter.draft(None, None, 3, 4, {12}).tokens == [10, 11, 12]


def test_all_that_was_verified_since_the_last_time_is_read_at_once(make):
    drafter, runner = make([10, 11], [SURE] * 2)
    drafter.process([4, 5], [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    drafter.draft(None, None, 5, 2, ())
    assert runner.read_rows == [([3, 4, 5], [[[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]])]
    assert drafter.waiting == []
    assert drafter.expected_rate(2) == 0.0  # nothing to read
    assert not drafter.draft(None, None, 5, 2, ()).tokens


def test_the_promise_is_the_mean_of_tokens_over_the_mean_of_times(make):
    known = SURVIVAL[0].model_copy(update={"entropies": (SURE, 3.0, UNSURE)})
    drafter, _ = make([10] * 9, [SURE] * 9, [known, *SURVIVAL[1:]])
    tokens = milliseconds = 0.0
    for entropy in known.entropies:
        first = chance(0, entropy)
        length = best_length([first], 1, 6)
        survives = [1.0, first]
        for place in range(1, length):
            survives.append(survives[-1] * chance(place))
        tokens += sum(survives[: length + 1])
        milliseconds += pass_cost(length + 1) + READ + STEP * (max(1, length) - 1)
    assert drafter.expected_rate(6) == pytest.approx(tokens / milliseconds)
    assert drafter.expected_rate(0) == 0.0


def test_promises_are_not_kept_for_ever(make, monkeypatch):
    monkeypatch.setattr("early_exit_cli.drafting.eagle.MOST_PROMISES", 5)
    drafter, _ = make([10] * 9, [SURE] * 9)
    first = drafter.expected_rate(6)
    for number in range(1, 12):
        drafter.read_cost = READ + number
        assert drafter.expected_rate(6) < first
    assert len(drafter.promises) <= 5
    drafter.read_cost = READ
    assert drafter.expected_rate(6) == first


def test_a_head_that_promises_less_than_plain_decoding_is_not_asked_and_tried_again_later(make):
    hopeless = [Survival(intercept=0.0, slope=0.0, mean=0.02)]
    drafter, runner = make([10] * 9, [SURE] * 9, hopeless, cost=lambda rows: 9.0 + rows)
    drafter.hits, drafter.expected = 1.0, 8.0
    for _ in range(3):
        assert not drafter.draft(None, None, 3, 4, ()).tokens
    assert runner.asked == []
    assert drafter.guess is None
    assert (drafter.hits, drafter.expected) == pytest.approx((0.97**3, 8 * 0.97**3))


def test_text_adapted_chances_are_counts_over_what_was_expected(make):
    drafter, _ = make([10] * 9, [SURE] * 9)
    draft = Draft([10, 11, 12], [Step(1, SURE, 0.9), Step(2, SURE, 0.8), Step(3, SURE, 0.7)])
    drafter.accept(draft, [10, 9], 1)  # the second was wrong: of the third nothing is known
    assert (drafter.hits, drafter.expected) == pytest.approx((1.0, 1.7))
    drafter.guess = (5, 0.4)
    drafter.accept(Draft(), [5], 0)
    drafter.guess = (6, 0.25)
    drafter.accept(Draft(), [5], 0)
    assert (drafter.hits, drafter.expected) == pytest.approx((2.0, 2.35))
    assert drafter._chance(1) == pytest.approx(0.7 * 6.0 / 6.35)
    assert drafter._chance(7) == pytest.approx(0.6 * 6.0 / 6.35)  # the last position stands for all later ones
    drafter.begin([1, 2])
    assert (drafter.hits, drafter.expected, drafter.guess) == (0.0, 0.0, None)
    assert drafter._chance(0) == pytest.approx(0.9)


@pytest.mark.parametrize("most_steps", [0, 4])
def test_a_round_in_which_another_one_drafts_is_not_counted_or_timed(make, most_steps):
    drafter, _ = make([10] * 4, [UNSURE] * 4, most_steps=most_steps)
    matched = Draft([7], [Match(3)])
    assert not drafter.draft(None, None, 3, 4, ()).tokens
    drafter.accept(Draft(), [10], 0)
    counted = drafter.hits, drafter.expected
    assert counted == (1.0, pytest.approx(chance(0, UNSURE)))
    assert drafter.timed(Draft(), 9.0) == bool(most_steps)
    drafter.accept(matched, [7, 8], 1)
    assert (drafter.hits, drafter.expected) == counted
    assert not drafter.timed(matched, 9.0)
    drafter.process([10], [torch.zeros(1, 2)])
    drafter.resize_batch(2)
    drafter.draft(None, None, 3, 4, ())
    drafter.accept(Draft(), [10], 0)  # nobody tells what a round of two texts took
    assert not drafter.timed(matched, 9.0)


@pytest.mark.parametrize("most_steps", [0, 4])
@pytest.mark.parametrize("known", [0, 2])
def test_what_a_head_says_beyond_its_numbers_is_not_drafted_and_counts_against_it(make, known, most_steps):
    tokens = [10, 11, 12, 13]
    drafter, _ = make(tokens, [SURE] * known + [math.nan] * (4 - known), most_steps=most_steps)
    draft = drafter.draft(None, None, 3, 4, ())
    assert draft.tokens == tokens[:known]
    drafter.accept(draft, [*draft.tokens, 0], known)
    assert (drafter.hits, drafter.expected) == (
        known,
        pytest.approx(2 * chance(0, SURE) if known else chance(0), abs=0.2),
    )
    assert sum(drafter.met) == pytest.approx(sum(drafter.prior) + bool(known))
    drafter.process([10], [torch.zeros(1, 2)])
    assert math.isfinite(drafter.expected_rate(4))


@pytest.mark.parametrize("limit", [1, 3, 8])
@pytest.mark.parametrize("entropies", ENTROPIES, ids=range(len(ENTROPIES)))
def test_a_chain_is_as_long_as_the_mean_chances_say_and_cut_where_it_stops_paying(make, entropies, limit):
    tokens, most = list(range(10, 22)), 6
    drafter, runner = make(tokens, entropies, most_steps=most)
    draft = drafter.draft(None, None, 3, limit, ())

    def rate(count):
        survives = [1.0]
        for place in range(count):
            survives.append(survives[-1] * chance(place))
        return sum(survives) / (pass_cost(count + 1) + READ + STEP * (count - 1))

    count = max(range(1, min(limit, most) + 1), key=rate)
    assert runner.asked == [count]
    assert drafter.spent == pytest.approx(READ + STEP * (count - 1))
    chances = [chance(place, entropies[place]) for place in range(count)]
    length = best_length(chances, count, count)
    assert draft.tokens == tokens[:length]
    assert [reason.number for reason in draft.reasons] == list(range(1, length + 1))
    assert [reason.entropy for reason in draft.reasons] == entropies[:length]
    assert [reason.chance for reason in draft.reasons] == pytest.approx(chances[:length])
    assert drafter.guess == (None if length else (tokens[0], pytest.approx(chances[0])))


@pytest.mark.parametrize("seed", range(30))
def test_the_length_of_a_chain_is_the_best_of_all_whatever_it_costs(make, seed):
    dice = random.Random(seed)
    means = [dice.uniform(0.2, 0.99) for _ in range(dice.randint(1, 8))]
    survival = [Survival(intercept=0.0, slope=0.0, mean=mean) for mean in means]
    read, step, row = dice.uniform(0.1, 6.0), dice.uniform(0.0, 3.0), dice.uniform(0.0, 1.0)
    drafter, _ = make([], [], survival, cost=lambda rows: 5.0 + row * rows, read_cost=read, step_cost=step)

    def rate(count):
        survives = [1.0]
        for place in range(count):
            survives.append(survives[-1] * means[min(place, len(means) - 1)])
        return sum(survives) / (5.0 + row * (count + 1) + read + step * (count - 1))

    for limit in (1, 3, 8, 15):
        assert drafter._chain_length(limit) == max(range(1, limit + 1), key=rate)


def test_a_chain_ends_with_the_text_and_where_tokens_are_sampled_steps_go_one_by_one(make):
    drafter, runner = make([10, 11, 12, 13], [SURE] * 4, most_steps=4)
    assert drafter.draft(None, None, 3, 4, {11}).tokens == [10, 11]
    assert runner.asked == [4]
    drafter, runner = make([10, 11, 12, 13], [SURE] * 4, most_steps=4)
    drafter.begin([1, 2], Sampler.__new__(Sampler))
    drafter.process([3], [torch.zeros(1, 2)])
    assert drafter.draft(None, None, 3, 4, ()).tokens == [10, 11, 12, 13]
    assert runner.asked == [1.0] * 4
    assert GREEDY.reads_logits is False


def test_texts_in_one_pass_share_its_cost(make):
    """With eight texts a further row costs much: less is drafted than alone."""

    def steep(rows):
        return 9.0 + 0.2 * max(0, rows - 8) ** 1.5

    drafter, _ = make(list(range(10, 22)), [1.0] * 12, cost=steep)
    alone = len(drafter.draft(None, None, 3, 11, ()).tokens)
    drafter, _ = make(list(range(10, 22)), [1.0] * 12, cost=steep)
    drafter.resize_batch(8)
    assert len(drafter.draft(None, None, 3, 11, ()).tokens) < alone
