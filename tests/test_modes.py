"""Fixed drafts, unverified exits and the comparison of all methods, on a tiny model with untrained heads."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import END, byte_tokenizer
from test_decoding import thresholds_between

from early_exit_cli.cli import show
from early_exit_cli.comprehensive import DRAFT_LENGTHS, all_methods, run_all
from early_exit_cli.decoding import decode, generate, round_records, trace_records
from early_exit_cli.drafters import FixedDrafter, NoDrafter, UnverifiedExits
from early_exit_cli.errors import BundleError
from early_exit_cli.gating import Thresholds, entropy

PROMPT = byte_tokenizer()("one two three")["input_ids"]
NEW = 40
INFINITE, NEVER = [math.inf] * 3, [-math.inf] * 3


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plain(model):
    return generate(model, PROMPT, NoDrafter(), NEW, mode="full", keep_states=True)


@pytest.mark.parametrize("head", [0, 1, 2])
def test_fixed_drafts_of_every_head_and_length_change_no_token(model, plain, head):
    accepted = partly = 0
    for length in (1, 2, 3, 5, 8, 10, 15):
        run = generate(model, PROMPT, FixedDrafter(head), NEW, mode="fixed", width=length + 1, keep_states=True)
        assert run.token_ids == plain.token_ids
        assert torch.equal(run.states, plain.states)
        assert run.lossless
        left = NEW
        for step in run.rounds:  # only the cap and a drafted end token make a draft shorter
            assert step.drafted == min(length, left - 1) or END in [token for token, _ in step.rejected]
            left -= len(step.tokens)
        assert {name for name, count in run.stats.exit_distribution.items() if count} <= {str(head), "full"}
        accepted += run.stats.tokens_accepted
        partly += run.stats.partly_rejected_drafts
    assert accepted > 0
    assert partly > 0


def reference(model, prompt, thresholds, new):
    """Unverified early exit by whole forward passes over the text so far, with the library's model."""
    ids, deciders = list(prompt), []
    while len(ids) < len(prompt) + new and END not in ids:
        text = torch.tensor([ids])
        *exits, final = model.backbone.hidden_states_at(text, torch.ones_like(text), model.heads.exit_layers)
        chosen = int(model.backbone.lm_head(final[0, -1:]).argmax(-1))
        decider = "backbone"
        for head, states in enumerate(exits):
            logits = model.heads.logits(head, states[0, -1:])
            if float(entropy(logits)) < thresholds[head]:
                chosen, decider = int(model.heads.token_ids(logits.argmax(-1))), head
                break
        ids.append(chosen)
        deciders.append(decider)
    return ids[len(prompt) :], deciders


@pytest.mark.parametrize("runner", ["fused", "hf"])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_unverified_exits_are_what_whole_forward_passes_decide(tiny_model, runner, share):
    model = tiny_model("llama", runner)
    thresholds = thresholds_between(model, share)
    expected, deciders = reference(model, PROMPT, thresholds, NEW)
    run = generate(model, PROMPT, UnverifiedExits(thresholds), NEW, mode="dynamic")
    assert run.token_ids == expected
    assert [reason.head if reason else "backbone" for step in run.rounds for reason in step.decided_by] == deciders
    assert len(set(deciders)) > 1
    assert not run.lossless
    assert run.record()["lossless"] is False
    assert run.stats.tokens_drafted == 0
    assert run.stats.acceptance_rate is None


def test_unverified_exits_that_never_happen_are_plain_decoding(model, plain):
    run = generate(model, PROMPT, UnverifiedExits(NEVER), NEW, mode="dynamic")
    assert run.token_ids == plain.token_ids
    assert run.stats.exit_distribution == {"0": 0, "1": 0, "2": 0, "full": NEW}


def test_unverified_exits_that_always_happen_run_no_block_above_the_first_head(model, plain, monkeypatch):
    deepest = []
    run_blocks = model.blocks.run

    def watch(hidden, cache, position, first, last):
        if position >= len(PROMPT) - 1:
            deepest.append(last)
        return run_blocks(hidden, cache, position, first, last)

    monkeypatch.setattr(model.blocks, "run", watch)
    run = generate(model, PROMPT, UnverifiedExits(INFINITE), NEW, mode="dynamic")
    assert run.stats.exit_distribution == {"0": NEW, "1": 0, "2": 0, "full": 0}
    assert run.stats.average_exit_layer == model.heads.exit_layers[0]
    assert set(deepest) == {model.heads.exit_layers[0]}
    assert run.token_ids == reference(model, PROMPT, INFINITE, NEW)[0]
    assert run.token_ids != plain.token_ids


def test_a_trace_changes_no_unverified_token_and_shows_every_head(model):
    thresholds = thresholds_between(model, 0.4)
    run = generate(model, PROMPT, UnverifiedExits(thresholds), NEW, mode="dynamic")
    traced = generate(model, PROMPT, UnverifiedExits(thresholds), NEW, mode="dynamic", trace=True)
    assert traced.token_ids == run.token_ids
    for record in trace_records(model, traced, len(PROMPT)):
        assert [view["head"] for view in record["heads"]] == [0, 1, 2]
        if record["head"] is not None:
            assert record["heads"][record["head"]]["token_id"] == record["token_id"]


def test_unverified_exits_stop_at_the_end_token(model):
    tokens = generate(model, PROMPT, UnverifiedExits(INFINITE), NEW, mode="dynamic").token_ids
    from early_exit_cli.decoding import decode_unverified

    rounds = decode_unverified(model, PROMPT, UnverifiedExits(INFINITE), NEW, stop_ids={tokens[7]})
    assert [step.tokens[0] for step in rounds] == tokens[: tokens.index(tokens[7]) + 1]


def test_unverified_exits_are_no_drafts(model):
    with pytest.raises(ValueError, match="decode_unverified"):
        next(decode(model, PROMPT, UnverifiedExits(INFINITE), NEW))


def test_a_round_keeps_what_was_rejected_and_why(model):
    rejected = 0
    run = generate(model, PROMPT, FixedDrafter(2), NEW, mode="fixed", width=6)
    for step, record in zip(run.rounds, round_records(model, run, len(PROMPT)), strict=True):
        assert len(step.rejected) + step.accepted == step.drafted
        assert all(reason.head == 2 for _, reason in step.rejected)
        assert not step.rejected or step.rejected[0][0] != step.tokens[-1]
        assert [token["token_id"] for token in record["rejected"]] == [token for token, _ in step.rejected]
        assert all(token["threshold"] is None for token in record["rejected"])  # no gate, and no infinity in JSON
        rejected += len(step.rejected)
    assert rejected > 0
    texts = [token["text"] for record in round_records(model, run, 0) for token in record["tokens"]]
    assert "".join(texts) == run.text


def test_text_is_told_with_who_decided_it(model):
    told = []
    drafter = FixedDrafter(2)
    run = generate(model, PROMPT, drafter, NEW, mode="fixed", width=6, on_text=lambda *piece: told.append(piece))
    assert "".join(piece for piece, _ in told) == run.text
    assert {decider for _, decider in told} == {"head 2", "backbone"}


def test_comprehensive_runs_every_method_and_all_texts_are_equal(model):
    levels = {"0.60": thresholds_between(model, 0.6), "0.90": thresholds_between(model, 0.2)}
    model = replace(model, thresholds=Thresholds(levels))
    methods = all_methods(model, 8, "all")
    done = []
    results = run_all(model, PROMPT, methods, NEW, 2, lambda number, name: done.append((number, name)))
    fixed = {f"layerskip_h{head}_d{length}" for head in range(3) for length in DRAFT_LENGTHS}
    assert set(results) == {"full", *fixed, "adaptive_acc0.60", "adaptive_acc0.90"}
    assert [number for number, _ in done] == list(range(1, 2 * 12 + 1))
    assert [name for _, name in done[:12]] == [name for _, name in done[12:]] == list(methods)  # in turns
    assert len({tuple(result.run.token_ids) for result in results.values()}) == 1
    assert all(result.identical and result.bit_exact for result in results.values())
    assert results["full"].speedup == 1.0
    assert (
        results["layerskip_h2_d15"].run.stats.average_draft_length
        > results["layerskip_h2_d5"].run.stats.average_draft_length
    )
    assert {result.run.stats.mode for result in results.values()} == set(results)


def test_the_table_of_all_methods_goes_to_stderr(model, capsys):
    methods = {"full": (NoDrafter(), 8), "layerskip_h2_d5": (FixedDrafter(2), 6)}
    show.all_methods(run_all(model, PROMPT, methods, 16, 1, lambda number, name: None), "tiny", 1)
    out, err = capsys.readouterr()
    assert out == ""
    row = next(line for line in err.splitlines() if line.startswith("layerskip_h2_d5"))
    assert "bit-exact" in row
    assert "0: 0  1: 0  2: " in row


def test_comprehensive_needs_a_calibration(model):
    with pytest.raises(BundleError, match="not calibrated"):
        all_methods(model, 8, "all")
