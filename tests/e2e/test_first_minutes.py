"""What somebody meets first: the prompt as an argument, answers to many prompts, help, an interruption."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from commands import eexit, started

from early_exit_cli.cli.reference import commands

PROMPTS = ["one two three", "four five six", "seven eight nine"]


@pytest.fixture(scope="module")
def base(tiny_folder):
    return [
        "infer",
        "--model-name",
        tiny_folder("llama"),
        "--quantization",
        "none",
        "--drafter",
        "lookup",
        "--max-tokens",
        12,
    ]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [json.dumps({"prompt": prompt, "category": "count"}) for prompt in PROMPTS]
    path.write_text("\n".join([rows[0], "{broken", *rows[1:]]))
    return path


def answer_to(base, *arguments):
    code, out, err = eexit(*base, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["lookup"]


def test_the_prompt_is_an_argument(base):
    assert answer_to(base, PROMPTS[0])["token_ids"] == answer_to(base, "--prompt", PROMPTS[0])["token_ids"]


def test_a_model_without_a_chat_template_is_told_once_and_not_with_raw(base):
    said = "has no chat template: it goes on with prompts as plain text"
    assert eexit(*base, PROMPTS[0])[2].count(said) == 1
    assert said not in eexit(*base, PROMPTS[0], "--raw")[2]


def test_the_system_speaks_first(base):
    alone, behind = answer_to(base, "hello"), answer_to(base, "hello", "--system", "Be brief.")
    assert behind["stats"]["prompt_tokens"] > alone["stats"]["prompt_tokens"]
    assert behind["token_ids"] != alone["token_ids"]


def test_an_answer_ends_before_a_stop_text_and_says_why_it_ends(base):
    whole = answer_to(base, PROMPTS[0])
    assert whole["finish_reason"] == "length"
    word = whole["text"][3:6]
    cut = answer_to(base, PROMPTS[0], "--stop", "not in there, nowhere", "--stop", word)
    assert (cut["finish_reason"], cut["text"]) == ("stop", whole["text"][: whole["text"].index(word)])
    code, out, err = eexit(*base, PROMPTS[0], "--stop", word)
    assert (code, out.rstrip("\n")) == (0, cut["text"].rstrip("\n"))
    assert re.search(r"ended +by itself", err)


def test_the_number_of_threads_changes_no_bit(base):
    import torch

    before = torch.get_num_threads()
    try:
        one = answer_to(base, PROMPTS[0], "--threads", 1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert one["token_ids"] == answer_to(base, PROMPTS[0])["token_ids"]


@pytest.mark.parametrize("batch", [1, 2])
def test_many_prompts_are_answered_on_stdout_and_in_a_file_as_they_come(base, many, tmp_path, batch):
    kept = tmp_path / "answers.jsonl"
    kept.write_text("an earlier run")
    code, out, err = eexit(*base, "--prompts", many, "--batch", batch, "--output", kept)
    assert code == 1
    assert "1 of 4 prompts have no answer" in err
    records = {record["row"]: record for record in map(json.loads, kept.read_text().splitlines())}
    assert sorted(records) == [1, 2, 3, 4]
    assert "is not JSON" in records[2]["error"]
    for number, prompt in zip((1, 3, 4), PROMPTS, strict=True):
        alone = answer_to(base, prompt)
        assert records[number]["lookup"]["token_ids"] == alone["token_ids"]
        assert f"--- prompt {number} of 4, count ---\n{alone['text'].rstrip()}" in out
    assert re.search(r"prompt +category +tokens read +written +ends", err)


def test_a_file_of_answers_stays_until_there_are_new_ones(base, many, tmp_path):
    kept = tmp_path / "answers.jsonl"
    kept.write_text("an earlier run")
    code, _, _ = eexit(*base[:-1], 10**6, "--prompts", many, "--output", kept, "--limit", 1)
    assert code == 1
    assert "exceed the context" in json.loads(kept.read_text())["error"]
    kept.write_text("an earlier run")
    code, _, _ = eexit("infer", "--model-name", tmp_path / "nowhere", "--prompts", many, "--output", kept)
    assert code == 1
    assert kept.read_text() == "an earlier run"


@pytest.mark.parametrize("name", [name for name, _, _ in commands()])
def test_help_shows_examples_and_no_flag_twice(name):
    helps = [eexit(*name.split(), flag, COLUMNS="100") for flag in ("-h", "--help")]
    code, out, _ = helps[0]
    assert code == 0
    assert helps[0] == helps[1]
    assert out.count(f"eexit {name}") >= 3  # the usage, and two examples
    flags = re.findall(r"(?<=│ )--[\w-]+", out)
    assert flags
    assert not [flag for flag in flags if "_" in flag]
    assert len(flags) == len({*flags})


def test_underscores_and_other_names_are_the_same_flags(base):
    code, out, _ = eexit(*base, "hi", "--max_new_tokens=3", "--accuracy_level", 0.8, "--show-config", "--json")
    assert code == 0
    settings = json.loads(out)
    assert settings["inference.max_tokens"]["value"] == 3
    assert settings["inference.accuracy_level"] == {"value": 0.8, "origin": "--accuracy-level"}


def test_ctrl_c_keeps_what_there_is_and_its_statistics(base):
    process = started(*base[:-1], 400, "hello", "--drafter", "none")
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith("\n")
    assert re.search(r"ended +interrupted", err)
    assert "decode tokens/s" in err
    assert "Traceback" not in err


def test_ctrl_c_while_the_program_itself_loads_is_no_traceback():
    interrupted = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'early_exit_cli.cli.app': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from early_exit_cli.__main__ import main\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_sigterm_ends_an_answer_and_what_was_only_for_this_process_goes(base, tmp_path):
    (tmp_path / "home").write_text("")
    places = {"EEXIT_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    process = started(*base[:-1], 400, "hello", "--drafter", "none", env={**os.environ, **places})
    process.stdout.read(20)
    assert list(tmp_path.glob("eexit-*"))
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    assert not list(tmp_path.glob("eexit-*"))
