"""An answer as JSON: every token with who decided it, what was drafted in vain, and text that joins to the answer."""

import pytest
from drafters import PROMPT, make_drafter

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.records import round_records, token_record, trace_records
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.exit import FixedDrafter
from early_exit_cli.drafting.reasons import Exit, Match, Step


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


def test_each_token_has_its_text_its_place_and_what_every_head_says(model):
    run = generate(model, Request(PROMPT, 30), FixedDrafter(2), mode="fixed", width=4, trace=True)
    records = round_records(model, run, len(PROMPT))
    depth, layer = model.blocks.num_blocks, model.heads.exit_layers[2]
    decode = model.backbone.tokenizer.decode
    tokens = [token for record in records for token in record["tokens"]]
    assert trace_records(model, run, len(PROMPT)) == tokens
    assert [token["token_id"] for token in tokens] == run.token_ids
    assert [token["token_text"] for token in tokens] == [decode([token]) for token in run.token_ids]
    assert [token["position"] for token in tokens] == [len(PROMPT) + place for place in range(len(tokens))]
    assert "".join(token["text"] for token in tokens) == run.text
    for step, record in zip(run.rounds, records, strict=True):
        assert record["accepted"] == step.accepted
        deciders = [(token["decided_by"], token["head"], token["exit_layer"]) for token in record["tokens"]]
        by_backbone = len(step.tokens) - step.accepted
        assert deciders == [("head", 2, layer)] * step.accepted + [("backbone", None, depth)] * by_backbone
        for token in record["rejected"]:
            assert (token["decided_by"], token["head"], token["heads"]) == ("head", 2, [])
            assert token["entropy"] > 0
            assert token["token_text"] == decode([token["token_id"]])
    for token in tokens:
        for number, said in enumerate(token["heads"]):
            assert said["head"] == number
            assert said["token_text"] == decode([said["token_id"]])
        assert len(token["heads"]) == 3
    assert any(record["rejected"] for record in records)


@pytest.mark.parametrize("length", range(1, 9))
def test_the_texts_of_tokens_join_to_the_answer_wherever_it_ends(model, length):
    run = generate(model, Request(PROMPT, length, stop_ids=()), make_drafter("fixed", model), mode="fixed", width=4)
    assert "".join(token["text"] for token in trace_records(model, run, 0)) == run.text


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (None, ("backbone", 6, None, None, None)),
        (Exit(1, 3, 0.5, 0.75), ("head", 3, 1, 0.5, 0.75)),
        (Exit(1, 3, 0.5, float("inf")), ("head", 3, 1, 0.5, None)),  # no gate, and no number in JSON
        (Match(7), ("lookup", 0, None, None, None)),
        (Step(2, 0.5, 0.8), ("eagle", 0, None, 0.5, None)),
    ],
)
def test_who_decided_a_token_is_told_in_the_same_words(model, reason, expected):
    record = token_record(model, 65, reason, [])
    names = ("decided_by", "exit_layer", "head", "entropy", "threshold")
    assert tuple(record[name] for name in names) == expected
    assert (record["token_id"], record["token_text"], record["heads"]) == (
        65,
        model.backbone.tokenizer.decode([65]),
        [],
    )


def test_an_answer_as_json_holds_text_tokens_and_counts(model):
    run = generate(model, Request(PROMPT, 5), FixedDrafter(2), mode="fixed", width=4)
    record = run.record()
    assert (record["text"], record["token_ids"]) == (run.text, run.token_ids)
    assert record["stats"]["tokens_accepted"] == run.stats.tokens_accepted
    assert record["stats"]["mode"] == "fixed"
