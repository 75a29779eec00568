"""Modes and colours of `eexit infer` as a person runs them, on a tiny bundle."""

import json
import re

import pytest
from commands import eexit
from ptys import in_terminal

from early_exit_cli.report.answer_text import CONTROLS

PROMPT = ["--prompt", "one two three", "--max-tokens", 24]


@pytest.fixture(scope="module")
def base(tiny_bundle):
    return ["infer", "--bundle", tiny_bundle, *PROMPT]


@pytest.fixture(scope="module")
def full(base):
    code, out, err = eexit(*base, "--mode", "full", "--json")
    assert code == 0, err
    return json.loads(out)["full"]


def test_fixed_layerskip_takes_the_seeds_flags_and_says_what_full_says(base, full):
    seeds = ["--mode", "fixed_layerskip", "--layerskip_head", 2, "--layerskip_draft_length", 5]
    code, out, err = eexit(*base, *seeds, "--json")
    assert code == 0, err
    answer = json.loads(out)["fixed_layerskip"]
    assert answer["token_ids"] == full["token_ids"]
    assert answer["stats"]["tokens_drafted"] > answer["stats"]["tokens_accepted"] > 0


def test_dynamic_early_exit_drafts_by_gates_and_says_what_full_says(base, full, tmp_path):
    arguments = [*base, "--mode", "dynamic_early_exit", "--accuracy-level", 0.6, "--trace", tmp_path / "trace.json"]
    code, out, err = eexit(*arguments, "--json")
    assert code == 0, err
    answer = json.loads(out)["dynamic_early_exit"]
    assert answer["token_ids"] == full["token_ids"]
    assert sum(count for name, count in answer["stats"]["exit_distribution"].items() if name != "full") > 0
    assert [token["token_id"] for token in json.loads((tmp_path / "trace.json").read_text())] == answer["token_ids"]


@pytest.mark.parametrize("drafter", [pytest.param("exit", marks=pytest.mark.slow), "lookup"])
def test_sampled_words_are_those_of_the_seed_whoever_drafts(base, full, drafter):
    sampled = ["--temperature", 0.9, "--top-p", 0.95, "--seed", 5, "--json"]
    drafting = ["--drafter", drafter, "--accuracy-level", 0.6, "--read-heads", "all", "--mode", "compare"]
    code, out, err = eexit(*base, *sampled, *drafting, "--repeats", 1)
    assert code == 0, err
    record = json.loads(out)
    assert record["identical"]
    assert record["bit_exact"]
    assert record["full"]["token_ids"] != full["token_ids"]
    code, out, _ = eexit(*base, *sampled, "--mode", "full")
    assert json.loads(out)["full"]["token_ids"] == record["full"]["token_ids"]
    code, out, _ = eexit(*base, *sampled, "--mode", "full", "--seed", 6)
    assert json.loads(out)["full"]["token_ids"] != record["full"]["token_ids"]


@pytest.mark.parametrize(
    "extra",
    [pytest.param([], id="greedy"), pytest.param(["--temperature", 0.8], id="sampled", marks=pytest.mark.slow)],
)
def test_a_batch_answers_each_prompt_as_alone(tiny_bundle, tmp_path, extra):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i} " * (i + 1)}) + "\n" for i in range(5)))
    many = ["infer", "--bundle", tiny_bundle, "--prompts", prompts, "--max-tokens", 16, "--json", *extra]
    answers = []
    for batch in (1, 3):
        code, out, err = eexit(*many, "--batch", batch)
        assert code == 0, err
        answers.append([next(v for v in row.values() if isinstance(v, dict)) for row in json.loads(out)["records"]])
    assert [one["token_ids"] for one in answers[0]] == [one["token_ids"] for one in answers[1]]
    assert [one["text"] for one in answers[0]] == [one["text"] for one in answers[1]]
    code, out, err = eexit(*(word for word in many if word != "--json"), "--batch", 3)
    assert "tokens/s in batches" in err


def test_a_page_that_cannot_be_written_is_one_line(base, tmp_path):
    code, out, err = eexit(*base, "--mode", "full", "--html", tmp_path)
    assert code == 1
    assert out.strip()
    assert f"cannot write the page to {tmp_path}" in err
    assert "Traceback" not in err


def test_comprehensive_has_every_method_and_one_text(base, full):
    code, out, err = eexit(*base, "--mode", "comprehensive", "--repeats", 1, "--json")
    assert code == 0, err
    results = json.loads(out)
    fixed = [f"layerskip_h{head}_d{length}" for head in range(3) for length in (5, 10, 15)]
    assert list(results) == ["full", *fixed, "adaptive_acc0.60", "adaptive_acc0.90"]
    for result in results.values():
        assert {"text", "stats", "speedup", "identical", "bit_exact"} <= set(result)
        assert result["token_ids"] == full["token_ids"]
        assert result["identical"]
        assert result["bit_exact"]
    assert results["adaptive_acc0.60"]["stats"]["tokens_drafted"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--mode", "fixed_layerskip", "--drafter", "lookup", "--width", 4, "--fixed-head", 3],
            ["leave --drafter out", "takes --draft-length", "the bundle has heads 0 to 2"],
        ),
        (["--mode", "comprehensive", "--trace", "trace.json"], ["--trace runs every head"]),
        (["--batch", 4], ["--batch takes many prompts"]),
        (["--top-k", 5, "--min-p", 0.1], ["top_k, min_p without a temperature"]),
        (["--temperature", -1, "--top-p", 0, "--seed", -3], ["--temperature", "--top-p", "--seed"]),
        (["--mode", "dynamic_early_exit", "--width", 4], ["drafts up to 10 tokens"]),
        (["--draft-length", 16, "--color", "sometimes"], ["--draft-length", "inference.color = 'sometimes'"]),
        (
            ["--mode", "comprehensive", "--prompts", "many.jsonl", "--html", "page.html"],
            ["takes one prompt", "--html shows one answer"],
        ),
    ],
)
def test_combinations_without_meaning_are_refused(base, arguments, words):
    code, out, err = eexit(*base, *arguments)
    assert code == 2
    assert out == ""
    assert all(some in err for some in words), err
    assert "Traceback" not in err


def test_a_terminal_shows_who_decided_and_the_same_text(base, full):
    arguments = [*base, "--mode", "fixed_layerskip", "--fixed-head", 2]
    shown, written = in_terminal(arguments, columns=100)
    assert "\x1b[38;2;58;148;245m" in written  # head 2
    assert "loading PyTorch" in written
    text = [line.rstrip() for line in full["text"].translate(CONTROLS).split("\n")]
    begin = shown.index(text[0])  # the note above it is wrapped where the model's path is long
    assert " ".join(shown[:begin]).endswith("has no chat template: it goes on with prompts as plain text")
    assert shown[begin:][: len(text)] == text
    legend, *statistics = shown[begin + len(text) :]
    assert re.fullmatch(r"tokens by drafter: head 2 \d+, backbone \d+", legend)
    assert any(re.fullmatch(r"ended +at the limit", line) for line in statistics)
    without, written = in_terminal(arguments, columns=100, NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*3[0-9;]*m", written)
    assert [re.sub("[0-9.,]+", "N", line) for line in without] == [re.sub("[0-9.,]+", "N", line) for line in shown]


def test_colours_go_into_a_pipe_where_they_are_asked_for(base, full):
    code, out, err = eexit(*base, "--mode", "fixed_layerskip", "--fixed-head", 2, "--color", "always")
    assert code == 0, err
    assert "\x1b[" in out
    assert re.sub(r"\x1b\[[0-9;]*m", "", out) == full["text"] + "\n"


def test_lookup_drafts_from_a_corpus_too(base, full, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(full["text"] + " and so on", encoding="utf-8")
    records = []
    for extra in ([], ["--lookup-corpus", corpus]):
        code, out, err = eexit(*base, "--drafter", "lookup", *extra, "--json")
        assert code == 0, err
        records.append(json.loads(out)["lookup"])
    assert [record["token_ids"] for record in records] == [full["token_ids"]] * 2


def test_a_corpus_goes_with_lookup_and_must_be_readable(base, tmp_path):
    code, _, err = eexit(*base, "--drafter", "exit", "--lookup-corpus", tmp_path / "no.txt")
    assert code == 2
    assert "cannot read" in err
    (tmp_path / "some.txt").write_text("text")
    code, _, err = eexit(*base, "--drafter", "exit", "--lookup-corpus", tmp_path / "some.txt")
    assert code == 2
    assert "--lookup-corpus is for the drafters lookup and auto, and this is exit" in err
