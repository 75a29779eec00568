"""`eexit chat`: turns from a pipe and from a terminal, its commands, and answers that are those of `infer`."""

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import time
from types import SimpleNamespace

import pytest
from commands import command_line, eexit

from early_exit_cli.backbone import chat as turns

ESCAPE = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|[\r\n]")
TURNS = ["hello there, how are you", "tell me more of it", "and then"]


@pytest.fixture(scope="module")
def base(tiny_folder):
    model = ["--model-name", tiny_folder("llama"), "--quantization", "none", "--drafter", "lookup", "--max-tokens", 12]
    return ["chat", *model]


def chat(base, *lines, code=0, **environment):
    """Answers to some lines, and what stood on stderr."""
    found, out, err = eexit(*base, "--json", stdin="\n".join(lines), **environment)
    assert found == code, err
    return [json.loads(line) for line in out.splitlines()], err


def test_every_turn_is_answered_as_infer_answers_the_whole_conversation(base, tmp_path):
    saved, asked = tmp_path / "talk.json", tmp_path / "asked.jsonl"
    answers, _ = chat([*base, "--system", "Be kind."], *TURNS, f"/save {saved}")
    messages = json.loads(saved.read_text())["messages"]
    assert [turn["role"] for turn in messages] == ["system", *["user", "assistant"] * 3]
    assert [turn["content"] for turn in messages[1::2]] == TURNS
    assert [turn["content"] for turn in messages[2::2]] == [answer["text"] for answer in answers]
    asked.write_text("".join(json.dumps({"messages": messages[: 2 * turn + 2]}) + "\n" for turn in range(3)))
    code, out, err = eexit("infer", *base[1:], "--prompts", asked, "--json")
    assert code == 0, err
    alone = [record["lookup"] for record in json.loads(out)["records"]]
    assert [answer["token_ids"] for answer in answers] == [answer["token_ids"] for answer in alone]
    assert [a["stats"]["prompt_tokens"] for a in answers] == [a["stats"]["prompt_tokens"] for a in alone]


def test_the_answer_is_streamed_and_a_line_says_how_fast_it_was(base):
    code, out, err = eexit(*base, stdin="\n\nhello\nagain\n")
    assert code == 0, err
    answers, _ = chat(base, "hello", "again")
    assert out.split() == " ".join(answer["text"] for answer in answers).split()
    assert len(re.findall(r"12 tokens, [\d.,]+ tokens/s; first token after \d+ ms.*cut at the limit", err)) == 2
    assert err.count("tokens by drafter") == 1


def test_an_answer_without_a_template_ends_where_the_users_next_turn_would_begin(base, monkeypatch):
    ((whole,), _), known = chat(base, "hello"), turns.turn_ends(SimpleNamespace(chat_template=None))
    assert turns.joined([{"role": role, "content": "x"} for role in ("user", "assistant", "user")]).count(*known) == 1
    assert turns.turn_ends(SimpleNamespace(chat_template="{{ messages }}")) == ()
    word = whole["text"][3:6]
    monkeypatch.setattr(turns, "turn_ends", lambda tokenizer, raw: (word,))
    ((cut,), _) = chat(base, "hello")
    assert (cut["text"], cut["finish_reason"]) == (whole["text"][: whole["text"].index(word)], "stop")


def test_turns_are_taken_back_tried_again_and_begun_anew(base):
    first, again = chat(base, "hello", "/retry")[0]
    assert again["token_ids"] == first["token_ids"]
    sampled = [*base, "--temperature", 1.5]
    first, again = chat(sampled, "hello", "/retry")[0]
    assert again["token_ids"] != first["token_ids"]
    alone, more, after, anew = chat(base, "hello", "more", "/undo", "more", "/new", "hello")[0]
    assert after["token_ids"] == more["token_ids"]
    assert anew["token_ids"] == alone["token_ids"]


def test_a_conversation_goes_on_from_a_file_in_any_usual_form(base, tmp_path):
    saved, shared = tmp_path / "talk.json", tmp_path / "shared.json"
    first, second = chat(base, TURNS[0], f"/save {saved}", TURNS[1])[0]
    (loaded,) = chat([*base, "--load", saved], TURNS[1])[0]
    turns = [{"from": "human", "value": TURNS[0]}, {"from": "gpt", "value": first["text"]}]
    shared.write_text(json.dumps({"conversations": turns}))
    (other,) = chat(base, f"/load {shared}", TURNS[1])[0]
    assert loaded["token_ids"] == other["token_ids"] == second["token_ids"]


def test_what_cannot_be_done_is_a_line_and_the_rest_goes_on(base, tmp_path):
    (tmp_path / "there.json").write_text("{}")
    wrong = ["/nonsense", "/save", "/undo", "/retry", f"/save {tmp_path}/there.json", f"/load {tmp_path}/none.json",
             f"/load {tmp_path}/there.json", "/new now", '/save "open', "x" * 600]  # fmt: skip
    answers, err = chat(base, *wrong, "//slash", code=1)
    assert len(answers) == 1
    assert err.count("error: ") == len(wrong) + 1
    assert f"{len(wrong)} lines were not answered" in err
    assert "Traceback" not in err
    assert (tmp_path / "there.json").read_text() == "{}"


def test_statistics_and_help(base):
    _, err = chat(base, "hello", "/stats", "/help")
    assert re.search(r"answers +1 *\ntokens +12 *\n", err)
    assert re.search(r"context +\d+ of 512 tokens", err)
    assert re.search(r"/undo +take back the last turn", err)


class Typed:
    """A chat in a terminal."""

    def __init__(self, arguments):
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            command_line(*arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = self.unread = ""

    def wait_for(self, words, seconds=60):
        """Until the words have come, behind those that were waited for before."""
        deadline = time.monotonic() + seconds
        while words not in self.unread:
            assert time.monotonic() < deadline, self.unread
            if select.select([self.ours], [], [], 0.1)[0]:
                chunk = os.read(self.ours, 65536).decode(errors="replace")
                self.seen += chunk
                self.unread += ESCAPE.sub("", chunk)
        self.unread = self.unread.partition(words)[2]

    def type(self, text):
        os.write(self.ours, text.encode())

    def ends_with(self, key, tries=60):
        """The exit code, after a key that is lost while no line is being edited."""
        for _ in range(tries):
            self.type(key)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=1)
        raise AssertionError(self.unread)


def test_a_person_types_turns_and_ctrl_d_ends(base):
    typed = Typed(base)
    typed.wait_for("/help lists")
    typed.wait_for(">")
    typed.type("hello\r")
    typed.wait_for("cut at the limit")
    typed.type("/stats\r")
    typed.wait_for("kept of earlier turns")
    typed.type("first\x1b\rsecond\r")  # Alt-Enter between them
    typed.wait_for("cut at the limit")
    typed.type("half a line\x03")
    assert typed.ends_with("\x04") == 0
    assert "Traceback" not in typed.seen
