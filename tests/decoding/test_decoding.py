"""The decoding loop: exact tokens with drafters that are right, wrong and half right, on small real models."""

import pytest
import torch
from drafters import PROMPT, ScriptedDrafter, thresholds_between, tokens_of
from tiny_models import END, FAMILIES

from early_exit_cli.decoding.answer import Interrupted, generate
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.records import trace_records
from early_exit_cli.decoding.text import Request, accepted_length, cut_at_stop
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.errors import ConfigError, NumericsError


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plain(model):
    return tokens_of(decode(model, Request(PROMPT, 40, stop_ids=()), NoDrafter()))


def test_plain_decoding_commits_one_token_a_round(model, plain):
    rounds = list(decode(model, Request(PROMPT, 40, stop_ids=()), NoDrafter()))
    assert [len(step.tokens) for step in rounds] == [1] * 40
    assert all(step.drafted == 0 for step in rounds)
    assert len(set(plain)) > 5  # a text, not one token over and over


def test_right_drafts_are_all_accepted(model, plain):
    rounds = list(decode(model, Request(PROMPT, 40, stop_ids=()), ScriptedDrafter(plain), width=8))
    assert tokens_of(rounds) == plain
    assert [len(step.tokens) for step in rounds] == [8] * 5
    assert [step.accepted for step in rounds] == [7] * 5


def test_wrong_drafts_are_never_accepted(model, plain):
    rounds = list(decode(model, Request(PROMPT, 40, stop_ids=()), ScriptedDrafter(plain, lambda _: True), width=8))
    assert tokens_of(rounds) == plain
    assert [step.accepted for step in rounds] == [0] * 40


def test_half_right_drafts_are_accepted_up_to_the_first_error(model, plain):
    rounds = list(
        decode(model, Request(PROMPT, 40, stop_ids=()), ScriptedDrafter(plain, lambda i: i % 3 == 2), width=8)
    )
    assert tokens_of(rounds) == plain
    assert [step.accepted for step in rounds[:4]] == [2, 2, 2, 2]
    assert all(len(step.tokens) == step.accepted + 1 for step in rounds)


@pytest.mark.parametrize("place", [0, 1, 5, 7, 8, 12])
@pytest.mark.parametrize("wrong", [lambda _: False, lambda i: i % 4 == 3], ids=["right", "partly"])
def test_the_end_token_inside_a_draft_ends_the_text_there(model, plain, place, wrong):
    end = plain[place]
    expected = plain[: plain.index(end) + 1]
    rounds = list(decode(model, Request(PROMPT, 40, stop_ids={end}), ScriptedDrafter(plain, wrong), width=8))
    assert tokens_of(rounds) == expected


@pytest.mark.parametrize("cap", [1, 2, 3, 7, 8, 9, 15, 16, 17])
def test_the_token_cap_inside_a_draft_is_kept(model, plain, cap):
    rounds = list(decode(model, Request(PROMPT, cap, stop_ids=()), ScriptedDrafter(plain), width=8))
    assert tokens_of(rounds) == plain[:cap]
    assert all(step.accepted <= len(step.tokens) for step in rounds)


def test_a_drafter_that_overshoots_the_cap_changes_nothing(model, plain):
    class Eager(ScriptedDrafter):
        def draft(self, model, cache, pending, limit, stop_ids):
            return super().draft(model, cache, pending, 7, stop_ids)

    rounds = list(decode(model, Request(PROMPT, 10, stop_ids=()), Eager(plain), width=8))
    assert tokens_of(rounds) == plain[:10]


@pytest.mark.parametrize("runner", ["fused", "hf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_adaptive_decoding_equals_transformers_generate(tiny_model, family, runner):
    """Every supported family in float32, over widths, thresholds and prompts: the same tokens, one by one."""
    model = tiny_model(family, runner)
    accepted = partly = rounds = 0
    for prompt in (PROMPT, [10], list(range(60, 130))):
        ids = torch.tensor([prompt])
        expected = model.backbone.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False
        )[0, len(prompt) :].tolist()
        assert tokens_of(decode(model, Request(prompt, 48), NoDrafter())) == expected
        for width in (2, 3, 8, 16) if runner == "fused" else (8,):
            for share in (0.0, 0.3, 0.7, 1.0) if width == 8 else (0.5,):
                thresholds = [1e9] * 3 if share == 1.0 else thresholds_between(model, share)
                run = generate(model, Request(prompt, 48), ExitDrafter(thresholds), mode="adaptive", width=width)
                assert run.token_ids == expected, (prompt, width, share)
                accepted += run.stats.tokens_accepted
                partly += run.stats.partly_rejected_drafts
                rounds += len(run.rounds)
    assert accepted > 0
    assert rounds > 50
    assert partly > 0 or family == "smollm"


def test_states_of_adaptive_decoding_are_the_plain_ones_bit_for_bit(smollm2_model):
    model = smollm2_model
    prompt = model.backbone.encode_prompt("Tell me three facts about the sea.")
    plain = generate(model, Request(prompt, 48), NoDrafter(), mode="full", keep_states=True)
    entropies = torch.tensor(
        [
            [reading.entropy for reading in token]
            for step in generate(model, Request(prompt, 48), NoDrafter(), mode="full", trace=True).rounds
            for token in step.traced
        ]
    )
    partly = accepted = 0
    some = entropies.quantile(0.5, 0).tolist()
    mixed = [entropies.quantile(0.1, 0).tolist()[0], some[1], 1e9]  # rows of one draft stop at different depths
    for drafter in (
        *(ExitDrafter(entropies.quantile(share, 0).tolist()) for share in (0.2, 0.5, 0.9)),
        ExitDrafter(mixed),
        ExitDrafter(some, active=[2]),
        ExitDrafter(some, active=[0, 2]),
    ):
        for width in (4, 8, 16):
            run = generate(model, Request(prompt, 48), drafter, mode="adaptive", width=width, keep_states=True)
            assert run.token_ids == plain.token_ids
            assert torch.equal(run.states, plain.states)
            partly += run.stats.partly_rejected_drafts
            accepted += run.stats.tokens_accepted
    assert accepted > 0
    assert partly > 0


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    from early_exit_cli.engine import Engine
    from early_exit_cli.heads.exit_heads import ExitHeads
    from early_exit_cli.runtime.select import make_blocks

    torch.manual_seed(0)
    heads = ExitHeads(smollm2, "adapter", [8, 16, 23], 16, torch.arange(8192))
    return Engine(smollm2, make_blocks(smollm2), heads.to(smollm2.dtype).requires_grad_(False))


def test_statistics_count_committed_tokens_only(model, plain):
    end = plain[12]
    run = generate(model, Request(PROMPT, 40), ExitDrafter([1e9] * 3), mode="adaptive")
    assert run.stats.total_tokens_generated == len(run.token_ids) == sum(run.stats.exit_distribution.values())
    assert run.stats.tokens_accepted == sum(n for name, n in run.stats.exit_distribution.items() if name != "full")
    assert run.stats.acceptance_rate == run.stats.tokens_accepted / run.stats.tokens_drafted
    assert run.stats.accept_length == len(run.token_ids) / len(run.rounds)
    assert end in plain
    full = generate(model, Request(PROMPT, 5), NoDrafter(), mode="full")
    assert full.stats.acceptance_rate is None
    assert full.stats.exit_distribution == {"0": 0, "1": 0, "2": 0, "full": 5}
    assert full.stats.average_exit_layer == model.blocks.num_blocks


@pytest.mark.parametrize("drafter", [NoDrafter(), ExitDrafter([1e9] * 3)], ids=["plain", "drafted"])
def test_an_answer_says_why_it_ends_and_ends_before_a_stop_text(model, drafter, monkeypatch):
    ended = generate(model, Request(PROMPT, 40), drafter, mode="x")
    whole = generate(model, Request(PROMPT, len(ended.token_ids) - 1), drafter, mode="x")
    assert (ended.finish_reason, whole.finish_reason) == ("stop", "length")
    word = whole.text[len(whole.text) // 2 :][:3]
    place = whole.text.index(word)
    pieces, decoded = [], []
    push = TextStream.push
    monkeypatch.setattr(TextStream, "push", lambda stream, tokens: decoded.extend(tokens) or push(stream, tokens))
    request = Request(PROMPT, len(whole.token_ids), stop=("never in there", word))
    cut = generate(model, request, drafter, mode="x", on_text=lambda piece, decider: pieces.append(piece))
    assert (cut.finish_reason, cut.text, "".join(pieces)) == ("stop", whole.text[:place], whole.text[:place])
    assert cut.token_ids == decoded == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(whole.token_ids)
    assert "".join(record["text"] for record in trace_records(model, cut, len(PROMPT))) == cut.text
    assert cut.record()["finish_reason"] == "stop"


def test_rates_of_prefill_and_decoding_add_up_to_the_whole(model):
    stats = generate(model, Request(PROMPT, 10), NoDrafter(), mode="full").stats
    assert stats.prompt_tokens == len(PROMPT)
    assert stats.prefill_tokens_per_second * stats.time_to_first_token_seconds == pytest.approx(len(PROMPT))
    later = stats.total_time_seconds - stats.time_to_first_token_seconds
    assert stats.decode_tokens_per_second * later == pytest.approx(9)
    assert generate(model, Request(PROMPT, 1), NoDrafter(), mode="full").stats.decode_tokens_per_second is None


def test_an_interrupted_answer_keeps_what_there_is(model):
    def interrupt(token, seen=[]):  # noqa: B006 (remembers)
        seen.append(token)
        if len(seen) == 7:
            raise KeyboardInterrupt

    whole = generate(model, Request(PROMPT, 40), NoDrafter(), mode="full")
    with pytest.raises(Interrupted) as caught:
        generate(model, Request(PROMPT, 40), NoDrafter(), mode="full", on_token=interrupt)
    found = caught.value.generation
    assert found.token_ids == whole.token_ids[:7]
    assert whole.text.startswith(found.text)
    assert found.finish_reason is None
    assert found.stats.total_tokens_generated == 7


def test_the_trace_names_every_heads_view_of_every_token(model):
    run = generate(model, Request(PROMPT, 20), ExitDrafter(thresholds_between(model, 0.6)), mode="adaptive", trace=True)
    records = trace_records(model, run, len(PROMPT))
    assert [record["position"] for record in records] == list(range(len(PROMPT), len(PROMPT) + len(run.token_ids)))
    assert [record["token_id"] for record in records] == run.token_ids
    exited = [record for record in records if record["head"] is not None]
    assert exited
    for record in records:
        assert [reading["head"] for reading in record["heads"]] == [0, 1, 2]
    for record in exited:
        reading = record["heads"][record["head"]]
        assert record["entropy"] < record["threshold"]
        assert reading["token_id"] == record["token_id"]
        assert reading["entropy"] == pytest.approx(record["entropy"], abs=1e-4)


def test_nothing_exits_at_thresholds_that_no_entropy_is_below(model, plain):
    run = generate(model, Request(PROMPT, 40), ExitDrafter([float("-inf")] * 3), mode="adaptive")
    assert run.stats.tokens_drafted == 0
    assert run.token_ids == generate(model, Request(PROMPT, 40), NoDrafter(), mode="full").token_ids


def test_accepted_length_stops_at_the_first_difference():
    assert accepted_length([1, 2, 3], [1, 2, 3, 4]) == 3
    assert accepted_length([1, 9, 3], [1, 2, 3, 4]) == 1
    assert accepted_length([9], [1, 2]) == 0
    assert accepted_length([1, 2, END], [1, 2, END]) == 3
    assert accepted_length([], [5]) == 0


def test_the_stop_rule_cuts_at_the_first_end_token_and_the_cap():
    assert cut_at_stop([1, 2, END, 3], {END}, 10) == ([1, 2, END], "stop")
    assert cut_at_stop([1, 2, END], {END}, 3) == ([1, 2, END], "stop")
    assert cut_at_stop([1, 2, 3], {END}, 3) == ([1, 2, 3], "length")
    assert cut_at_stop([1, 2, 3], {END}, 2) == ([1, 2], "length")
    assert cut_at_stop([1, 2, END], {END}, 2) == ([1, 2], "length")
    assert cut_at_stop([1, 2], {END}, 3) == ([1, 2], None)


def test_a_stream_never_shows_half_a_character(model):
    text = "naïve – 日本語 🙂 end"
    ids = model.backbone.tokenizer(text)["input_ids"]
    stream = TextStream(model)
    pieces = [stream.push([token]) for token in ids]
    pieces.append(stream.finish())
    assert "".join(pieces) == text == stream.text
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) < len(ids)  # some tokens waited for their character


def test_a_character_cut_by_the_cap_is_dropped(model):
    ids = model.backbone.tokenizer("ab🙂")["input_ids"][:-1]
    stream = TextStream(model)
    assert stream.push(ids) + stream.finish() == "ab" == stream.text


def test_refuses_an_empty_prompt_and_one_beyond_the_context(model):
    with pytest.raises(ConfigError, match="empty"):
        list(decode(model, Request([], 4), NoDrafter()))
    with pytest.raises(ConfigError, match="500 tokens and 13 new ones exceed the context of 512"):
        list(decode(model, Request([1] * 500, 13), NoDrafter()))


def test_nan_logits_stop_the_run(tiny_model):
    model = tiny_model("qwen3")
    weight = model.backbone.norm.weight
    kept = weight.clone()
    try:
        with torch.no_grad():
            weight[3] = float("nan")
        with pytest.raises(NumericsError, match="NaN or infinite"):
            list(decode(model, Request(PROMPT, 4), NoDrafter()))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
