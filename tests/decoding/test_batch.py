"""Several texts in one pass: each is what it would be alone, token for token and bit for bit."""

import pytest
import torch
from drafters import ScriptedDrafter, make_drafter, tokens_of

from early_exit_cli.config import SamplingConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import decode_batch, generate_batch
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.round_costs import share_of_pass
from early_exit_cli.errors import ConfigError
from early_exit_cli.runtime.kv_cache import Part
from early_exit_cli.sampling import make_chooser

PROMPTS = [
    list(b"Hello Hello "),
    list(b"A"),
    list(b"one two one two one "),
    list(b"xyz xyz"),
    list(b"The end of it all."),
]
TOKENS = 20


def choosers(temperature):
    return lambda number: make_chooser(SamplingConfig(temperature=temperature, seed=number))


def alone(model, drafter, width, make_chooser, stops):
    """Tokens and states of each prompt by itself."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        request = Request(prompt, TOKENS, make_chooser(number), stops)
        rounds = list(decode(model, request, drafter, width=width, keep_states=True))
        found.append((tokens_of(rounds), torch.cat([step.states for step in rounds])))
    return found


def together(model, drafter, width, make_chooser, stops, batch):
    rounds = [[] for _ in PROMPTS]
    requests = [Request(prompt, TOKENS, make_chooser(number), stops) for number, prompt in enumerate(PROMPTS)]
    options = dict(batch=batch, width=width, keep_states=True)
    ended = []
    for number, step, is_last in decode_batch(model, requests, drafter, **options):
        rounds[number].append(step)
        ended += [number] * is_last
    assert sorted(ended) == list(range(len(PROMPTS)))
    return [(tokens_of(own), torch.cat([step.states for step in own])) for own in rounds], rounds


def assert_equal(ours, theirs):
    for (tokens, states), (expected, expected_states) in zip(ours, theirs, strict=True):
        assert tokens == expected
        assert torch.equal(states, expected_states)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("batch", [2, 5, 20])
@pytest.mark.parametrize("who", ["none", "exit", "lookup", "eagle", "auto"])
def test_every_text_is_what_it_is_alone(tiny_model, who, batch, temperature):
    model = tiny_model("llama")
    drafter = NoDrafter() if who == "none" else make_drafter(who, model)
    make = choosers(temperature)
    expected = alone(model, NoDrafter(), 8, make, ())
    found, rounds = together(model, drafter, 4, make, (), batch)
    assert_equal(found, expected)
    if who in ("exit", "eagle"):
        steps = [step for own in rounds for step in own]
        assert any(step.accepted for step in steps) or who == "eagle"
        assert any(step.drafted > step.accepted for step in steps)


@pytest.mark.parametrize("family", ["mistral-window", "qwen2", "qwen3", "smollm"])
@pytest.mark.parametrize("runner", ["fused", "hf"])
def test_every_family_and_runner_keeps_texts_apart(tiny_model, family, runner):
    model = tiny_model(family, runner)
    make = choosers(0.0)
    expected = alone(model, NoDrafter(), 8, make, ())
    assert_equal(together(model, make_drafter("exit", model), 3, make, (), 3)[0], expected)
    assert_equal(together(model, NoDrafter(), 3, make, (), 5)[0], expected)


def test_texts_that_end_make_room_and_change_nothing_for_the_others(tiny_model):
    model = tiny_model("llama")
    make = choosers(0.0)
    free = alone(model, NoDrafter(), 8, make, ())
    stops = {free[0][0][3], free[2][0][7]}  # inside the first and the third answer
    expected = alone(model, NoDrafter(), 8, make, stops)
    assert len({len(tokens) for tokens, _ in expected}) > 1
    found, _ = together(model, make_drafter("exit", model), 6, make, stops, 2)
    assert_equal(found, expected)


def test_one_pass_holds_the_rows_of_all_texts(tiny_model, monkeypatch):
    model = tiny_model("llama")
    seen = []
    original = model.blocks.run_batch

    def spy(hidden, parts, stops):
        seen.append((hidden.shape[0], [part.width for part in parts]))
        return original(hidden, parts, stops)

    monkeypatch.setattr(model.blocks, "run_batch", spy)
    together(model, NoDrafter(), 8, choosers(0.0), (), 5)
    assert len(seen) == TOKENS  # a pass for each new token of all five texts
    most = model.blocks.widths[-1] // model.blocks.pass_width(1)  # what rows have to be padded to takes room too
    assert {len(widths) for _, widths in seen} == {min(5, most)}
    assert all(width in model.blocks.widths for width, _ in seen)


def test_padding_rows_of_a_pass_are_nobodys(tiny_model):
    """Behind the texts' rows stand some that belong to none: the bits of each alone, and nothing written for them."""
    model = tiny_model("llama")
    width, prompts = model.blocks.pass_width(1), PROMPTS[:2]
    caches, others = ([model.prefill(prompt, 8) for prompt in prompts] for _ in range(2))
    rows = [model.embed(prompt[-1:]).expand(width, -1) for prompt in prompts]
    padding = 9 * rows[0][:1].expand(model.blocks.widths[-1] - 2 * width, -1)
    parts = [Part(cache, cache.length, width) for cache in caches]
    with torch.inference_mode():
        (joined,) = model.blocks.run_batch(torch.cat((*rows, padding)), parts, [6])
        alone = [model.run(own, cache, cache.length, 0, 6) for own, cache in zip(rows, others, strict=True)]
    assert len(padding)
    assert torch.equal(joined, torch.cat(alone))
    for cache in caches:
        assert cache.keys[0][:, cache.length : cache.length + width].any()
        assert not cache.keys[0][:, cache.length + width :].any()


class Watching(ScriptedDrafter):
    """Drafts nothing but what is known, and keeps what it is shown."""

    exit_layers = (2, 4)

    def __init__(self, continuations):
        self.forks, self.continuations = [], continuations

    def fork(self):
        number = len(self.forks)
        made = ScriptedDrafter(self.continuations[number], lambda index: index % 3 == 2, PROMPTS[number])
        made.exit_layers, made.seen = self.exit_layers, []
        made.process = lambda tokens, states: made.seen.append((tokens, [state.clone() for state in states]))
        self.forks.append(made)
        return made


def test_a_drafter_is_shown_the_same_states_in_a_batch_as_alone(tiny_model):
    """Wrong ones would change no token: only fewer drafts would be accepted."""
    model = tiny_model("llama")
    requests = [Request(prompt, TOKENS, stop_ids=()) for prompt in PROMPTS]
    known = [tokens_of(decode(model, request, NoDrafter())) for request in requests]
    alone, together = Watching(known), Watching(known)
    for request in requests:
        for _ in decode(model, request, alone.fork(), width=4):
            pass
    for _ in decode_batch(model, requests, together, batch=2, width=4):
        pass
    for ours, theirs in zip(together.forks, alone.forks, strict=True):
        assert [tokens for tokens, _ in ours.seen] == [tokens for tokens, _ in theirs.seen]
        for (_, states), (_, expected) in zip(ours.seen, theirs.seen, strict=True):
            assert len(states) == len(expected) == 3
            assert all(map(torch.equal, states, expected))


def test_answers_in_a_batch_are_counted_and_timed_by_themselves(tiny_model):
    model = tiny_model("llama")
    drafter = make_drafter("fixed", model)
    requests = [Request(prompt, tokens, stop_ids=()) for prompt, tokens in zip(PROMPTS, (3, 9, 5, 20, 1), strict=True)]
    ended = []
    texts = generate_batch(
        model,
        requests,
        drafter,
        mode="fixed",
        batch=2,
        width=4,
        on_end=lambda number, text: ended.append((number, text)),
    )
    assert sorted(number for number, _ in ended) == list(range(5))
    assert all(texts[number] is text for number, text in ended)
    waited = []
    for request, text in zip(requests, texts, strict=True):
        lone = generate(model, request, drafter, mode="fixed", width=4)
        assert (text.text, text.token_ids) == (lone.text, lone.token_ids)
        for ours, theirs in zip(text.rounds, lone.rounds, strict=True):
            assert (ours.tokens, ours.pieces) == (theirs.tokens, theirs.pieces)
        ours, theirs = text.stats, lone.stats
        for name in ("mode", "total_tokens_generated", "tokens_drafted", "tokens_accepted", "exit_distribution"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert 0 < ours.time_to_first_token_seconds <= ours.total_time_seconds
        assert ours.prefill_tokens_per_second is None  # it would count the wait
        waited.append(ours.time_to_first_token_seconds)
        if len(text.rounds) > 1:
            assert ours.time_to_first_token_seconds < ours.total_time_seconds
    assert max(waited[:2]) < min(waited[2:])  # seconds hold the wait for room in the batch
    assert len(generate_batch(model, requests[:1], drafter, mode="fixed", batch=2, width=4)) == 1


def test_a_bad_prompt_is_refused(tiny_model):
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="empty"):
        list(decode_batch(model, [Request([65], 4), Request([], 4)], NoDrafter(), batch=2, width=4))


def test_the_share_of_a_pass_adds_up():
    """With one row each, the shares are the pass; a further row costs what it adds."""

    def cost(rows):
        return 10 + rows**1.5

    assert share_of_pass(cost, 3, 1) == cost(3)
    assert 4 * share_of_pass(cost, 1, 4) == pytest.approx(cost(4))
    assert share_of_pass(cost, 3, 4) - share_of_pass(cost, 1, 4) == pytest.approx(cost(6) - cost(4))


def test_the_shipped_model_answers_together_as_alone(smollm2):
    """NF4 in bfloat16, with its heads: bits do not depend on who else is in the pass."""
    from early_exit_cli.bundle.load import load_engine
    from early_exit_cli.config import BackboneConfig, BundleConfig
    from early_exit_cli.drafting.choose import auto_drafter

    model = load_engine(BackboneConfig(device="cpu"), BundleConfig())
    prompts = [
        smollm2.encode_prompt(text)
        for text in ("Name three colours.", "What is 12 times 12?", "Repeat: one two three one two three one two")
    ]
    expected = [list(decode(model, Request(ids, 24), NoDrafter(), keep_states=True)) for ids in prompts]
    rounds = [[] for _ in prompts]
    drafter = auto_drafter(model, 0.9, 8, "auto")
    requests = [Request(ids, 24) for ids in prompts]
    for number, step, _ in decode_batch(model, requests, drafter, batch=3, width=8, keep_states=True):
        rounds[number].append(step)
    texts = generate_batch(model, requests, drafter, mode="auto", batch=2, width=8)
    assert [text.token_ids for text in texts] == [tokens_of(plain) for plain in expected]
    assert [text.text for text in texts] == [
        smollm2.tokenizer.decode(t.token_ids, skip_special_tokens=True) for t in texts
    ]
    assert all(0 < text.stats.time_to_first_token_seconds < text.stats.total_time_seconds for text in texts)
    for own, plain in zip(rounds, expected, strict=True):
        assert tokens_of(own) == tokens_of(plain)
        assert torch.equal(torch.cat([s.states for s in own]), torch.cat([s.states for s in plain]))
