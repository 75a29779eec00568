"""Fixed drafts, gated drafts and the comparison of all methods, on a tiny model with untrained heads."""

import math
from dataclasses import replace

import pytest
import torch
from drafters import thresholds_between
from tiny_models import END, byte_tokenizer

from early_exit_cli.cli import show
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.records import round_records
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import DynamicDrafter, FixedDrafter
from early_exit_cli.errors import BundleError
from early_exit_cli.evaluation.comprehensive import DRAFT_LENGTHS, all_methods, run_all
from early_exit_cli.heads.uncertainty import Thresholds

PROMPT = byte_tokenizer()("one two three")["input_ids"]
NEW = 40


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plain(model):
    return generate(model, Request(PROMPT, NEW), NoDrafter(), mode="full", keep_states=True)


@pytest.mark.parametrize("head", [0, 1, 2])
def test_fixed_drafts_of_every_head_and_length_change_no_token(model, plain, head):
    accepted = partly = 0
    for length in (1, 2, 3, 5, 8, 10, 15):
        run = generate(
            model, Request(PROMPT, NEW), FixedDrafter(head), mode="fixed", width=length + 1, keep_states=True
        )
        assert run.token_ids == plain.token_ids
        assert torch.equal(run.states, plain.states)
        left = NEW
        for step in run.rounds:  # only the cap and a drafted end token make a draft shorter
            assert step.drafted == min(length, left - 1) or END in [token for token, _ in step.rejected]
            left -= len(step.tokens)
        assert {name for name, count in run.stats.exit_distribution.items() if count} <= {str(head), "full"}
        accepted += run.stats.tokens_accepted
        partly += run.stats.partly_rejected_drafts
    assert accepted > 0
    assert partly > 0


def test_dynamic_exits_draft_up_to_ten_tokens_and_change_none(model, plain):
    run = generate(
        model, Request(PROMPT, NEW), DynamicDrafter([math.inf] * 3), mode="dynamic", width=11, keep_states=True
    )
    assert run.token_ids == plain.token_ids
    assert torch.equal(run.states, plain.states)
    assert max(step.drafted for step in run.rounds) == 10


def test_a_round_keeps_what_was_rejected_and_why(model):
    rejected = 0
    run = generate(model, Request(PROMPT, NEW), FixedDrafter(2), mode="fixed", width=6)
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
    run = generate(
        model, Request(PROMPT, NEW), drafter, mode="fixed", width=6, on_text=lambda *piece: told.append(piece)
    )
    assert "".join(piece for piece, _ in told) == run.text
    assert {decider for _, decider in told} == {"head 2", "backbone"}


def test_comprehensive_runs_every_method_and_all_texts_are_equal(model):
    levels = {"0.60": thresholds_between(model, 0.6), "0.90": thresholds_between(model, 0.2)}
    model = replace(model, thresholds=Thresholds(levels))
    methods = all_methods(model, 8, "all")
    done = []
    results = run_all(model, Request(PROMPT, NEW), methods, 2, lambda number, name: done.append((number, name)))
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
    show.all_methods(run_all(model, Request(PROMPT, 16), methods, 1, lambda number, name: None), "tiny", 1)
    out, err = capsys.readouterr()
    assert out == ""
    row = next(line for line in err.splitlines() if line.startswith("layerskip_h2_d5"))
    assert "bit-exact" in row
    assert "head 2 " in row
    assert "head 0" not in row


def test_comprehensive_needs_a_calibration(model):
    with pytest.raises(BundleError, match="not calibrated"):
        all_methods(model, 8, "all")
