"""The suffix automaton against a search by hand, and the drafter that uses it."""

import random
from collections import Counter

import pytest

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import Draft, NoDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.drafting.suffix_automaton import SuffixAutomaton


def longest_earlier(tokens):
    """Length of the longest suffix that also ends before the end."""
    for length in range(len(tokens) - 1, 0, -1):
        suffix = tokens[-length:]
        if any(tokens[end - length : end] == suffix for end in range(length, len(tokens))):
            return length
    return 0


@pytest.mark.parametrize("letters", [1, 2, 3, 6])
def test_the_match_is_the_longest_suffix_seen_before(letters):
    dice = random.Random(letters)
    for _ in range(40):
        automaton, tokens = SuffixAutomaton(), []
        for _ in range(60):
            tokens.append(dice.randrange(letters))
            automaton.extend(tokens[-1:])
            length = longest_earlier(tokens)
            assert automaton.match_length == length
            if length:  # and what is proposed did follow an earlier occurrence of that suffix
                end = automaton.continuation
                assert tokens[end - length : end] == tokens[-length:]
                assert end < len(tokens)
                assert automaton.predict(1) == [tokens[end]]


def test_a_proposal_runs_on_into_itself():
    automaton = SuffixAutomaton()
    automaton.extend([9, 1, 2, 1, 2])
    assert automaton.predict(5) == [1, 2, 1, 2, 1]
    automaton.extend([7])
    assert automaton.predict(3) == []


def test_a_long_text_takes_time_in_proportion():
    automaton = SuffixAutomaton()
    dice = random.Random(0)
    automaton.extend([dice.randrange(50) for _ in range(100_000)])
    assert len(automaton.longest) <= 2 * 100_000  # Blumer et al.: at most 2n - 1 states


def test_drafts_grow_with_the_chance_and_stop_where_they_cost_more():
    def length(chance, pass_cost):
        drafter = LookupDrafter(pass_cost, [chance] * 6)
        drafter.begin([1, 1])
        return len(drafter.draft(None, None, 1, 15, ()).tokens)

    lengths = [length(chance, lambda rows: 10.0 + rows) for chance in (0.01, 0.3, 0.6, 0.9, 0.99)]
    assert lengths == sorted(lengths)
    assert lengths[0] == 0
    assert lengths[-1] == 15
    assert length(0.9, lambda rows: 10.0 * rows) == 0


def test_what_was_wrong_before_is_drafted_less(tiny_model):
    drafter = LookupDrafter(lambda rows: 10.0 + rows)
    drafter.begin([1, 2, 3, 4, 1, 2])
    first = drafter.draft(None, None, 2, 15, ())
    for _ in range(12):
        drafter.accept(first, [], 0)
    assert len(drafter.draft(None, None, 2, 15, ()).tokens) < len(first.tokens)
    drafter.begin([5, 6, 7, 8, 5, 6])  # another text is another matter
    assert len(drafter.draft(None, None, 6, 15, ()).tokens) == len(first.tokens)
    assert drafter.draft(None, None, 6, 15, {8}).tokens == [7, 8]  # nothing is drafted after the end


CHANCE = 0.8
"""Of the next token, whatever the match."""


def best_of_all(pass_cost, limit, batch_size=1):
    """Of all draft lengths the one with the most tokens per millisecond, and that rate, the simpler one where two tie."""

    def rate(length):
        shared = pass_cost(batch_size) * (1 / batch_size - 1) if batch_size > 1 else 0.0
        return sum(CHANCE**place for place in range(length + 1)) / (pass_cost(length + batch_size) + shared)

    best = max(range(limit + 1), key=rate)
    return best, pytest.approx(rate(best))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("per_row", [0.0, 0.3, 1.0, 2.5, 6.0])
def test_a_draft_is_as_long_as_all_lengths_tried_one_by_one_say(per_row, batch_size):
    drafter = LookupDrafter(lambda rows: 3.0 + per_row * rows, [CHANCE] * 6)
    drafter.begin([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])
    drafter.resize_batch(batch_size)
    for limit in (1, 2, 5, 15):
        length, rate = best_of_all(lambda rows: 3.0 + per_row * rows, limit, batch_size)
        assert drafter.expected_rate(limit) == rate
        draft = drafter.draft(None, None, 2, limit, ())
        assert draft.tokens == [3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8][:length]
        assert {reason.length for reason in draft.reasons} <= {2}
        assert len(draft.reasons) == length
    assert drafter.expected_rate(0) == 0.0


def test_nothing_is_drafted_behind_the_end_or_without_a_match():
    drafter = LookupDrafter(lambda rows: 10.0, [CHANCE] * 6)
    drafter.begin([1, 2, 3, 4, 5, 1, 2])
    assert drafter.draft(None, None, 2, 5, {4}).tokens == [3, 4]
    drafter.begin([1, 2, 3, 4, 5])
    assert drafter.expected_rate(5) == 0.0
    assert not drafter.draft(None, None, 5, 5, ()).tokens


def test_what_this_text_has_shown_counts_beside_six_tokens_of_the_prior():
    drafter = LookupDrafter(lambda rows: 10.0, [CHANCE] * 6)
    drafter.begin([1, 2, 3, 4, 5, 1, 2])
    draft = drafter.draft(None, None, 2, 3, ())
    assert draft.tokens == [3, 4, 5]
    (source,) = drafter.sources
    assert source.chance == pytest.approx(0.8)
    drafter.accept(draft, [3, 9], 1)  # one right, one wrong, and of the third nothing is known
    drafter.accept(Draft(), [1, 2], 0)  # the same kind of match again
    assert source.chance == pytest.approx((6 * 0.8 + 1) / (6 + 2))
    draft = drafter.draft(None, None, 2, 3, ())
    drafter.accept(draft, [*draft.tokens, 9], 3)  # all right: no wrong one ended it
    drafter.accept(Draft(), [1, 2], 0)
    assert source.chance == pytest.approx((6 * 0.8 + 1 + 3) / (6 + 2 + 3))
    drafter.begin([1, 2, 3, 4, 5, 1, 2])
    assert drafter.sources[0].chance == pytest.approx(0.8)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "qwen3"])
def test_lookup_gives_the_words_of_plain_decoding(tiny_model, family):
    model = tiny_model(family)
    accepted = partly = 0
    for seed in range(6):
        dice = random.Random(seed)
        phrase = [dice.randrange(250) for _ in range(9)]
        prompt = phrase * 3 + phrase[:4]
        plain = generate(model, Request(prompt, 40), NoDrafter(), mode="full", keep_states=True)
        drafter = LookupDrafter(lambda rows: 10.0 + 0.1 * rows)
        drafted = generate(model, Request(prompt, 40), drafter, mode="lookup", width=16, keep_states=True)
        assert drafted.token_ids == plain.token_ids
        assert (drafted.states - plain.states).abs().max() < 1e-4
        accepted += drafted.stats.tokens_accepted
        partly += drafted.stats.partly_rejected_drafts
        assert drafted.stats.exit_distribution.get("lookup", 0) == drafted.stats.tokens_accepted
    assert accepted > 0
    assert partly > 0


def test_lookup_is_bit_exact_in_four_bit(smollm2):
    from early_exit_cli.engine import Engine
    from early_exit_cli.runtime.select import make_blocks

    model = Engine(smollm2, make_blocks(smollm2))
    prompt = smollm2.encode_prompt("Repeat this list three times: apple, pear, plum, fig, grape, lemon.")
    for room in (48, 600):  # a short request and a long one: both forms of attention
        plain = generate(model, Request(prompt, room), NoDrafter(), mode="full", keep_states=True)
        drafted = generate(
            model,
            Request(prompt, room),
            LookupDrafter(lambda rows: 10.0 + rows),
            mode="lookup",
            width=16,
            keep_states=True,
        )
        assert drafted.token_ids == plain.token_ids
        assert drafted.states.equal(plain.states)
        assert drafted.stats.tokens_accepted > 5


def test_auto_asks_the_heads_where_the_text_does_not_repeat(tiny_model):
    from early_exit_cli.drafting.auto import AutoDrafter
    from early_exit_cli.drafting.exit import ExitDrafter

    model = tiny_model("llama")
    decided = Counter()
    for seed in range(6):
        dice = random.Random(seed)
        phrase = [dice.randrange(250) for _ in range(9)]
        prompt = phrase * 3 + phrase[:4]
        plain = generate(model, Request(prompt, 40), NoDrafter(), mode="full")
        lookup, exits = LookupDrafter(lambda rows: 10.0 + 0.1 * rows), ExitDrafter([0.0, 0.0, 9.0])
        run = generate(model, Request(prompt, 40), AutoDrafter([(lookup, 15), (exits, 3)]), mode="auto", width=16)
        assert run.token_ids == plain.token_ids
        decided.update(run.stats.exit_distribution)
    assert decided["lookup"] > 0
    assert decided["2"] > 0
