"""A text that begins like an earlier one takes over what that computed, and is the same, bit for bit."""

import pytest
import torch
from drafters import PROMPT, make_drafter, some_head
from tiny_models import OTHER_FAMILIES

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import BackboneConfig, BundleConfig
from early_exit_cli.decoding.answer import Interrupted, generate
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import Request, Text
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.runtime.native_blocks import NativeBlocks

LONG = [(7 * place) % 250 for place in range(200)]
PLENTY = 10**9


def answer(engine, prompt, drafter, prefixes=None, tokens=12, **more):
    request = Request(prompt, tokens, stop_ids=())
    return generate(engine, request, drafter, mode="x", keep_states=True, prefixes=prefixes, **more)


def read_by(engine, monkeypatch):
    """Rows that prefills and passes run, in a list that grows."""
    rows = []
    run = engine.blocks.run_tokens
    monkeypatch.setattr(
        engine.blocks, "run_tokens", lambda tokens, *rest: rows.append(len(tokens)) or run(tokens, *rest)
    )
    return rows


def same(one, other):
    return one.token_ids == other.token_ids and torch.equal(one.states, other.states)


@pytest.mark.parametrize("runner", ["fused", "hf"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen2-window", "lfm2", "qwen3_5"])
def test_a_second_turn_is_what_a_fresh_request_gives(tiny_model, family, runner, monkeypatch):
    if runner == "fused" and family in OTHER_FAMILIES:
        pytest.skip("of the Llama shape only")
    engine = tiny_model(family, runner)
    prefixes = Prefixes(PLENTY)
    first = answer(engine, LONG, NoDrafter(), prefixes)
    second = [*LONG, *first.token_ids, *PROMPT]
    fresh = answer(engine, second, NoDrafter())
    rows = read_by(engine, monkeypatch)
    assert same(answer(engine, second, NoDrafter(), prefixes), fresh)
    assert sum(rows) <= len(second) - 192 + 12 * engine.blocks.widths[0]  # three whole pieces of the first prompt
    other = [*LONG[:130], 3, *LONG[131:]]
    assert same(answer(engine, other, NoDrafter(), prefixes), answer(engine, other, NoDrafter()))


@pytest.mark.parametrize("name", ["exit", "eagle", "lookup", "auto"])
def test_drafters_see_what_they_would_have_seen(tiny_model, name):
    """The states of the positions that are taken over are shown to them: the same rounds come of it."""
    engine = tiny_model("llama")
    engine.eagle = some_head(engine.backbone)
    prefixes = Prefixes(PLENTY)
    first = answer(engine, LONG, make_drafter(name, engine), prefixes)
    second = [*LONG, *first.token_ids, *PROMPT]
    with_prefix, fresh = (answer(engine, second, make_drafter(name, engine), kept) for kept in (prefixes, None))
    assert same(with_prefix, fresh)
    assert [step.drafted for step in with_prefix.rounds] == [step.drafted for step in fresh.rounds]


def test_who_wants_to_see_other_layers_reads_the_prompt_itself(tiny_model, monkeypatch):
    engine = tiny_model("llama")
    engine.eagle = some_head(engine.backbone)
    prefixes = Prefixes(PLENTY)
    answer(engine, LONG, NoDrafter(), prefixes)
    rows = read_by(engine, monkeypatch)
    drafted = answer(engine, LONG, make_drafter("eagle", engine), prefixes)
    assert sum(rows) >= len(LONG)
    assert same(drafted, answer(engine, LONG, make_drafter("eagle", engine)))


def test_what_was_interrupted_is_left_to_the_next_too(tiny_model):
    engine = tiny_model("llama")
    prefixes = Prefixes(PLENTY)

    def interrupt(token, seen=[]):  # noqa: B006 (remembers)
        seen.append(token)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        answer(engine, LONG, NoDrafter(), prefixes, on_token=interrupt)
    (kept,) = prefixes.kept
    assert kept.tokens[: len(LONG)] == LONG
    second = [*LONG, *caught.value.generation.token_ids, *PROMPT]
    assert same(answer(engine, second, NoDrafter(), prefixes), answer(engine, second, NoDrafter()))


def test_the_newest_stay_and_continuations_replace_what_they_continue(tiny_model):
    engine = tiny_model("llama")
    prefixes = Prefixes(PLENTY)
    first = answer(engine, LONG, NoDrafter(), prefixes)
    answer(engine, [*LONG, *first.token_ids, *PROMPT], NoDrafter(), prefixes)
    assert len(prefixes.kept) == 1
    one = prefixes.bytes
    others = [[start, *LONG] for start in range(1, 5)]
    small = Prefixes(3 * one)
    for prompt in others:
        answer(engine, prompt, NoDrafter(), small)
    assert small.bytes <= 3 * one
    assert [kept.tokens[0] for kept in small.kept] == [2, 3, 4][-len(small.kept) :]
    less = Prefixes(one)
    for prompt in (LONG, LONG * 2):  # the second is too large: the first stays
        answer(engine, prompt, NoDrafter(), less)
    assert [kept.prefilled for kept in less.kept] == [len(LONG) - 1]


def test_what_is_kept_of_blocks_with_a_state_takes_what_it_says(tiny_model):
    """No more than the tokens whose states were kept, and nothing of a prompt that is too short for that."""
    engine, prefixes, looking = tiny_model("lfm2", "hf"), Prefixes(PLENTY), NoDrafter()
    looking.exit_layers = [2]
    answer(engine, PROMPT, looking, prefixes)
    assert prefixes.kept == []
    answer(engine, LONG, looking, prefixes)
    (kept,) = prefixes.kept
    held = [*kept.keys, *kept.values, *kept.states.values()]
    assert sum(each.untyped_storage().nbytes() for each in held) + kept.kept.bytes == kept.bytes


def test_an_answer_is_not_lost_where_no_memory_is_left_to_keep_it(tiny_model, monkeypatch):
    engine, prefixes = tiny_model("llama"), Prefixes(PLENTY)
    first = answer(engine, LONG, NoDrafter(), prefixes)
    assert prefixes.kept

    def full(text):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Text, "prefix", full)
    assert same(answer(engine, LONG, NoDrafter(), prefixes), first)
    assert prefixes.kept == []


@pytest.mark.parametrize("drafting", [False, True], ids=["plain", "eagle"])
def test_compiled_passes_take_over_answers_too(drafting, monkeypatch):
    engine = load_engine(BackboneConfig(device="cpu"), BundleConfig(), with_thresholds=False)
    if not isinstance(engine.blocks, NativeBlocks):
        pytest.skip("no compiled passes here")

    def drafter():
        from early_exit_cli.drafting.choose import eagle_drafter

        return eagle_drafter(engine) if drafting else NoDrafter()

    prefixes = Prefixes(PLENTY)
    prompt = engine.backbone.tokenizer("The lighthouse keeper climbed the stairs, and counted them again. " * 12)[
        "input_ids"
    ]
    first = answer(engine, prompt, drafter(), prefixes)
    second = [*prompt, *first.token_ids, *prompt[5:9]]
    fresh = answer(engine, second, drafter())
    rows = read_by(engine, monkeypatch)
    assert same(answer(engine, second, drafter(), prefixes), fresh)
    assert rows[0] <= 6  # the last token of the first answer, and what is new
    assert isinstance(drafter(), EagleDrafter) == drafting
