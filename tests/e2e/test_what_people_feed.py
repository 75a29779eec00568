"""Inputs and surroundings that are not as they should be: every good row is answered, every bad one is named."""

import contextlib
import json
import os
import random
import time
from pathlib import Path

import pytest
from commands import ONE_THREAD, eexit, eexit_process, one_line, started
from gguf_files import write_gguf
from safetensors.torch import load_file

from early_exit_cli.engine import Prefill
from early_exit_cli.errors import NumericsError

TOKENS = 6


@pytest.fixture(scope="module")
def infer(tiny_folder):
    model = ["--model-name", tiny_folder("llama"), "--quantization", "none"]
    return ["infer", *model, "--drafter", "lookup", "--max-tokens", TOKENS]


def mixed_lines() -> tuple[list[bytes], set[int]]:
    """200 lines of a .jsonl file, some of them no prompts, and the numbers of those."""
    draw = random.Random(0)
    good = [
        lambda text: {"prompt": text},
        lambda text: {"turns": [text, "and then?"], "category": "writing"},
        lambda text: {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]},
        lambda text: {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        lambda text: {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}]},
        lambda text: {"instruction": text, "input": "", "output": "yes"},
        lambda text: {"prompt": f"{text} \U0001f642 \u65e5\u672c \x00"},
    ]
    bad = [b"{not json", b'"a string"', b"[1]", b'{"prompt": ""}', b'{"prompt": "\xff\xfe"}', b'{"prompt": "\\ud83d"}']
    too_long = json.dumps({"prompt": "x" * 5000}).encode()
    lines, wrong = [], set()
    for number in range(1, 201):
        if number % 50 == 0:
            lines.append(b"  ")  # empty: neither answered nor wrong
        elif number % 9 == 0:
            lines.append(too_long if number % 27 == 0 else bad[number % len(bad)])
            wrong.add(number)
        else:
            make = draw.choice(good)
            text = json.dumps(make(f"count to {number}"), ensure_ascii=bool(draw.randrange(2)))
            lines.append(text.encode() + (b"\r" if draw.randrange(2) else b""))
    return lines, wrong


def test_two_hundred_mixed_lines_are_answered_or_named(infer, tmp_path):
    lines, wrong = mixed_lines()
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    code, out, err = eexit(*infer, "--prompts", path, "--json")
    records = json.loads(out)["records"]
    assert code == 1
    assert one_line(err) == f"error: {len(wrong)} of 196 prompts have no answer"
    assert {record["row"] for record in records if "error" in record} == wrong
    assert len([record for record in records if "lookup" in record]) == 196 - len(wrong)
    assert all(f"{path}:{number}: " in err for number in wrong)
    assert (
        next(record for record in records if "turns" not in record and record.get("category"))["category"] == "writing"
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ValueError("a library's own fault"), "answering: a library's own fault"),
        (NumericsError("the backbone's logits are NaN or infinite"), "the backbone's logits are NaN or infinite"),
    ],
    ids=["a library's", "ours"],
)
def test_a_row_that_fails_leaves_the_others_their_answers(infer, tmp_path, monkeypatch, batch, fault, message):
    """The second prompt's prefill fails, once: in a batch all are answered again, one after another."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two", "three")))
    finish, seen = Prefill.finish, []

    def fails_once(self):
        seen.append(self.prompt_ids)
        if len(seen) == 3:  # after the warm-up and the first
            raise fault
        return finish(self)

    monkeypatch.setattr(Prefill, "finish", fails_once)
    code, out, err = eexit(*infer, "--prompts", path, "--json", "--batch", batch)
    records = json.loads(out)["records"]
    assert [record.get("error") for record in records] == [None, message if batch == 1 else None, None]
    assert [record.get("row") for record in records] == [1, 2, 3]
    assert code == (1 if batch == 1 else 0), err


def test_a_fault_nobody_knows_is_one_line(infer, monkeypatch):
    def broken(*arguments, **more):
        raise KeyError("shape")

    monkeypatch.setattr("early_exit_cli.drafting.choose.make_drafter", broken)
    code, out, err = eexit(*infer, "--prompt", "one")
    assert (code, out) == (1, "")
    assert one_line(err) == "error: KeyError: 'shape'"
    assert "EEXIT_DEBUG=1" in err
    with pytest.raises(KeyError):
        eexit(*infer, "--prompt", "one", EEXIT_DEBUG="1")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "iso-8859-1"])
def test_a_console_that_cannot_show_a_character_gets_the_answer(infer, encoding):
    """The answer of a byte-level model with random weights is full of what no such console has."""
    surroundings = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    code, out, err = eexit_process(*infer, "--prompt", "\u65e5\u672c", "--json", **surroundings)
    assert code == 0, err
    found = json.loads(out)["lookup"]
    assert len(found["token_ids"]) == TOKENS
    code, _, err = eexit_process(*infer, "--prompt", "\u65e5\u672c", **surroundings)
    assert code == 0, err


@pytest.mark.parametrize(
    "surroundings",
    [
        {"EEXIT_HOME": "/dev/null/cache"},
        {"EEXIT_HOME": "", "XDG_CACHE_HOME": "", "HOME": "/dev/null"},
    ],
    ids=["not a folder", "no home to write in"],
)
def test_without_a_cache_folder_there_is_an_answer_and_a_line(infer, tmp_path, surroundings, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = eexit_process(*infer, "--prompt", "one two", "--json", **surroundings)
    assert code == 0, err
    assert json.loads(out)["lookup"]["token_ids"]
    assert err.count("nothing was kept for the next time") == 1
    assert "EEXIT_HOME" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_two_processes_that_convert_the_same_model_both_answer(tiny_folder, tmp_path, rounds):
    """Each converts and quantizes where nothing is kept yet; what one has completed stays, and is what the other reads."""
    tensors = load_file(tiny_folder("llama") / "model.safetensors")
    (path,) = write_gguf(tmp_path / "tiny.gguf", tiny_folder("llama"), tensors)
    asked = ["--max-tokens", TOKENS, "--prompt", "one", "--json"]
    command = ["infer", "--model-name", path, "--runner", "fused", "--drafter", "lookup", *asked]  # nothing to compile
    answers = set()
    for number in range(rounds):
        home = tmp_path / f"home-{number}"
        processes = [started(*command, env={**os.environ, "EEXIT_HOME": str(home), **ONE_THREAD}) for _ in range(2)]
        seen: dict[Path, set[int]] = {}
        while True:
            are_ended = all(process.poll() is not None for process in processes)
            for kind in ("gguf", "weights"):
                for place in (home / kind).glob("[!.]*/model.safetensors"):
                    with contextlib.suppress(FileNotFoundError):
                        seen.setdefault(place, set()).add(place.stat().st_ino)
            if are_ended:
                break
            time.sleep(0.005)
        for process in processes:
            out, err = process.communicate()
            assert (process.returncode, "error" in err) == (0, False), err
            answers.add(tuple(json.loads(out)["lookup"]["token_ids"]))
        assert {place: {place.stat().st_ino} for place in seen} == seen  # nothing complete was ever replaced
        assert [len(list((home / kind).glob("*/model.safetensors"))) for kind in ("gguf", "weights")] == [1, 1]
        assert not list(home.glob("*/.*.tmp"))
    assert len(answers) == 1
