"""Lookup in a corpus: matches against a search by hand, drafts from it, and a file that cannot be read."""

import itertools
import random

import pytest

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.corpus import LONGEST, Corpus, CorpusCursor
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.lookup import LookupDrafter


def longest_end(text, corpus):
    """Length of the longest end of the text, LONGEST at most, that stands in the corpus."""
    for length in range(min(len(text), LONGEST), 0, -1):
        if any(corpus[start : start + length] == text[-length:] for start in range(len(corpus) - length + 1)):
            return length
    return 0


@pytest.mark.parametrize("letters", [1, 2, 4, 9])
def test_the_match_is_the_longest_end_that_stands_in_the_corpus(letters):
    dice = random.Random(letters)
    for size in (0, 1, 40, 300):
        tokens = [dice.randrange(letters) for _ in range(size)]
        cursor, text = CorpusCursor(Corpus(tokens)), []
        for _ in range(60):
            step = [dice.randrange(letters + 1) for _ in range(dice.choice((1, 1, 2, 5)))]
            if tokens and dice.random() < 0.3:  # a passage of the corpus
                start = dice.randrange(len(tokens))
                step = tokens[start : start + 12]
            text += step
            cursor.extend(step)
            length = longest_end(text, tokens)
            assert cursor.match_length == length
            if length:
                assert tokens[cursor.continuation - length : cursor.continuation] == text[-length:]
                assert cursor.predict(7) == tokens[cursor.continuation : cursor.continuation + 7]
            else:
                assert cursor.predict(7) == []


def test_all_short_texts_have_their_suffixes_in_order():
    for size in range(6):
        for tokens in itertools.product(range(3), repeat=size):
            assert Corpus(tokens).order == sorted(range(size), key=lambda start, tokens=tokens: tokens[start:])


def test_of_several_places_the_one_that_most_share_is_taken():
    cursor = CorpusCursor(Corpus([1, 2, 3, 1, 2, 9, 1, 2, 3, 1, 2, 3, 1, 2, 4]))
    cursor.extend([1, 2])
    assert cursor.predict(1) == [3]


def test_passages_of_the_corpus_are_drafted_and_the_answer_is_the_plain_one(tiny_model):
    model = tiny_model("llama")
    prompt = [5, 77, 3]
    plain = generate(model, Request(prompt, 60), NoDrafter(), mode="full").token_ids
    alone = LookupDrafter(lambda rows: 10.0 + rows)
    helped = LookupDrafter(lambda rows: 10.0 + rows, corpus=Corpus([8, 9, *prompt[-2:], *plain, 7]))
    without, with_corpus = (
        generate(model, Request(prompt, 60), made, mode="lookup", width=8) for made in (alone, helped)
    )
    assert without.token_ids == with_corpus.token_ids == plain
    assert with_corpus.stats.accept_length > without.stats.accept_length + 1
    again = generate(model, Request(prompt, 60), helped.fork(), mode="lookup", width=8)
    assert again.rounds == with_corpus.rounds


def test_a_corpus_that_misleads_is_soon_left_alone(tiny_model):
    model = tiny_model("llama")
    prompt = [5, 77, 3]
    plain = generate(model, Request(prompt, 60), NoDrafter(), mode="full").token_ids
    wrong = [token for known in plain for token in (known, 300)]
    misled = generate(
        model, Request(prompt, 60), LookupDrafter(lambda rows: 10.0 + rows, corpus=Corpus(wrong)), mode="lookup"
    )
    assert misled.token_ids == plain
    assert misled.stats.tokens_drafted < 60
