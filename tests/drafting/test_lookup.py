"""The suffix automaton against a search by hand, and the drafter that uses it."""

import random
from collections import Counter

import pytest

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
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
