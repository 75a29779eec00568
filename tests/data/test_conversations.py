"""What rows say, whatever their form, and what the chat template makes of it."""

import dataclasses
import json

import pytest
from commands import eexit
from tiny_models import END, byte_tokenizer

from early_exit_cli.backbone.chat import encode_conversation, encode_prompt
from early_exit_cli.config import DataConfig
from early_exit_cli.data import on_policy
from early_exit_cli.data.conversations import UnknownRow, UnreadableRow, read_row
from early_exit_cli.data.load import load_documents
from early_exit_cli.data.rows import read_data, read_records
from early_exit_cli.errors import BackboneError, DataError

MARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template that takes any roles."""
STRICT = (
    "{% for m in messages %}{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}" + MARKED
)
WITH_TOOLS = MARKED.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be kind"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TWO_TURNS = [SYSTEM, USER, ANSWER, {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "bye"}]


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def talking(backbone, template):
    """The backbone, with a chat template."""
    return dataclasses.replace(backbone, tokenizer=tokenizer_with(template))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(tokenizer, ids):
    return tokenizer.decode(ids)


def all_documents(config, backbone, **options):
    return [d for split in ("train", "eval", "calibrate") for d in load_documents(config, backbone, split, **options)]


CONVERSATIONS = {
    "roles": ({"messages": [SYSTEM, USER, ANSWER]}, "messages", [SYSTEM, USER, ANSWER]),
    "ShareGPT": (
        {
            "conversations": [
                {"from": n, "value": t} for n, t in [("system", "be kind"), ("human", "hi"), ("gpt", "ho")]
            ]
        },
        "conversations",
        [SYSTEM, USER, ANSWER],
    ),
    "ShareGPT, the system beside it": (
        {"system": "be kind", "conversations": [{"from": "user", "value": "hi"}, {"from": "model", "value": "ho"}]},
        "conversations",
        [SYSTEM, USER, ANSWER],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
        "messages",
        [{"role": "user", "content": "h\ni"}],
    ),
    "nulls of a table": (
        {"text": None, "messages": [{"role": "user", "content": "hi", "from": None, "tool_calls": None}]},
        "messages",
        [USER],
    ),
    "turns as JSON": ({"messages": json.dumps([USER, ANSWER])}, "messages", [USER, ANSWER]),
    "tools": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "2", "tool_call_id": "x"},
            ]
        },
        "messages",
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "tool_call_id": "x"},
        ],
    ),
    "tools, arguments as JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": 1}'}]}]},
        "messages",
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    "completion": ({"prompt": "hi", "completion": "ho"}, "prompt + completion", [USER, ANSWER]),
    "response": ({"prompt": "hi", "response": "ho"}, "prompt + response", [USER, ANSWER]),
    "turns as prompt and completion": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        "prompt + completion",
        [SYSTEM, USER, ANSWER],
    ),
    "Alpaca": (
        {"instruction": "add", "input": "1 2", "output": "3"},
        "instruction + input + output",
        [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    "Alpaca, empty input": (
        {"instruction": "hi", "input": "", "output": "ho"},
        "instruction + output",
        [USER, ANSWER],
    ),
    "Alpaca, earlier turns": (
        {"instruction": "hi", "output": "ho", "history": [["hi", "ho"]]},
        "instruction + output",
        [USER, ANSWER, USER, ANSWER],
    ),
    "Dolly": (
        {"instruction": "hi", "context": "ctx", "response": "ho", "category": "qa"},
        "instruction + context + response",
        [{"role": "user", "content": "hi\n\nctx"}, ANSWER],
    ),
    "question and answer": ({"question": "hi", "answer": "ho"}, "question + answer", [USER, ANSWER]),
    "a number for an answer": (
        {"question": "hi", "answer": 42},
        "question + answer",
        [USER, {"role": "assistant", "content": "42"}],
    ),
    "OpenOrca": (
        {"id": "1", "system_prompt": "be kind", "question": "hi", "response": "ho"},
        "question + response",
        [SYSTEM, USER, ANSWER],
    ),
    "MetaMath": ({"query": "hi", "response": "ho"}, "query + response", [USER, ANSWER]),
    "UltraChat": ({"prompt": "hi", "prompt_id": "1", "messages": [USER, ANSWER]}, "messages", [USER, ANSWER]),
}


@pytest.mark.parametrize(("row", "form", "messages"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_are_read_in_every_usual_form(row, form, messages):
    sample = read_row(row)
    assert (sample.form, sample.messages) == (form, messages)
    assert sample.text == next(message["content"] for message in messages if message["role"] == "user")


@pytest.mark.parametrize(
    ("row", "form", "text"),
    [
        ({"text": "a", "source": "s"}, "text", "a"),
        ({"text": "a", "prompt": "b"}, "text", "a"),
        ({"prompt": "a", "completion": ""}, "prompt", "a"),
        ({"turns": ["a", "b"]}, "turns", "a"),
        ({"prompt": ["a", "b"], "reference": ["c"]}, "prompt", "a"),
        ({"question": "a"}, "question", "a"),
        ({"text": None, "messages": [], "prompt": "a"}, "prompt", "a"),
    ],
)
def test_texts_and_prompts_alone_stay_texts(row, form, text):
    sample = read_row(row)
    assert (sample.form, sample.text, sample.messages) == (form, text, [])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": " "}, "empty"),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty"),
        ({"text": 5}, "text is no text"),
        ({"messages": [{"role": "narrator", "content": "a"}]}, "a turn of the unknown role 'narrator'"),
        ({"messages": [{"content": "a"}]}, "a turn without a role"),
        ({"messages": [USER, 5]}, "a turn that is no object"),
        ({"messages": [{"role": "user"}]}, "a user turn without content"),
        ({"messages": [{"role": "user", "content": 5}]}, "a turn whose content is no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "a part that is no text (image_url)",
        ),
        ({"prompt": "a", "completion": {"b": 1}}, "completion is no text"),
        ({"instruction": "a", "history": ["b"]}, "history is not made of pairs of texts"),
    ],
)
def test_rows_that_say_nothing_give_the_reason(row, reason):
    with pytest.raises(UnreadableRow) as raised:
        read_row(row)
    assert str(raised.value) == reason


def test_a_named_column_is_read_alone():
    row = {"text": "a", "prompt": "b", "completion": "c", "talk": [USER, ANSWER], "turns": ["d", "e"]}
    assert read_row(row, "prompt").text == "b"
    assert read_row(row, "prompt").messages == []
    assert read_row(row, "talk").messages == [USER, ANSWER]
    assert read_row(row, "turns").text == "d"
    with pytest.raises(UnknownRow, match="no column 'body'"):
        read_row(row, "body")


def test_prompts_are_the_first_user_turn_or_every_one_or_the_last():
    sample = read_row({"messages": TWO_TURNS})
    assert sample.prompts() == [TWO_TURNS[:2]]
    assert sample.prompts(every_turn=True) == [TWO_TURNS[:2], TWO_TURNS[:4]]
    assert sample.last_prompt() == TWO_TURNS[:4]
    assert read_row({"messages": [USER, ANSWER]}).prompts() == ["hi"]  # as the prompt alone
    assert read_row({"turns": ["a", "b"]}).prompts(every_turn=True) == ["a"]
    called = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]
    assert len(read_row({"messages": called}).last_prompt()) == 3
    assert read_row({"messages": [SYSTEM, ANSWER]}).prompts() == []
    with pytest.raises(UnreadableRow, match="no user turn"):
        read_row({"messages": [SYSTEM, ANSWER]}).last_prompt()


# Through the chat template


def test_training_renders_the_whole_conversation_and_knows_where_the_answer_begins(tmp_path, tiny_backbone):
    backbone = talking(tiny_backbone("llama"), MARKED)
    rows = [{"messages": TWO_TURNS}] * 2 + [{"prompt": "hi", "completion": "ho"}] * 2 + [{"text": "plain"}] * 2
    lines = []
    config = DataConfig(dataset_name=str(write_lines(tmp_path / "chat.jsonl", rows)))
    documents = [
        d for split in ("train", "eval") for d in load_documents(config, backbone, split, on_read=lines.append)
    ]
    documents += load_documents(config, backbone, "calibrate")
    found = sorted(
        {(words(backbone.tokenizer, d.ids), words(backbone.tokenizer, d.ids[: d.answer_start])) for d in documents}
    )
    assert found == [
        (
            "<system>be kind</><user>hi</><assistant>ho</><user>and now?</><assistant>bye</>",
            "<system>be kind</><user>hi</><assistant>",
        ),
        ("<user>hi</><assistant>ho</>", "<user>hi</><assistant>"),
        ("plain<end>", ""),
    ]
    assert lines[0] == "chat.jsonl: 6 rows read (2 messages, 2 prompt + completion, 2 text)"


@pytest.mark.parametrize(
    ("turns", "prompts"),
    [
        ("first", {"<system>be kind</><user>hi</><assistant>", "<user>one</><assistant>"}),
        (
            "every",
            {
                "<system>be kind</><user>hi</><assistant>",
                "<system>be kind</><user>hi</><assistant>ho</><user>and now?</><assistant>",
                "<user>one</><assistant>",
            },
        ),
    ],
)
def test_on_policy_answers_the_first_user_turn_or_every_one(tmp_path, tiny_backbone, monkeypatch, turns, prompts):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    backbone = talking(tiny_backbone("llama"), MARKED)
    rows = [{"messages": TWO_TURNS}, {"prompt": "one"}] * 4
    path = write_lines(tmp_path / "chat.jsonl", rows)
    config = DataConfig(dataset_name=str(path), on_policy=True, answer_tokens=3, answer_turns=turns, holdout=0.5)
    parts = {split: load_documents(config, backbone, split) for split in ("train", "eval", "calibrate")}
    for part in parts.values():
        for document in part:
            assert words(backbone.tokenizer, document.ids[: document.answer_start]) in prompts
            assert document.answer_start < len(document.ids) <= document.answer_start + 3
    documents = [document for part in parts.values() for document in part]
    assert {words(backbone.tokenizer, d.ids[: d.answer_start]) for d in documents} == prompts
    assert len(documents) == (8 if turns == "first" else 12)


def test_all_turns_of_a_conversation_are_of_one_split(tmp_path, tiny_backbone, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    backbone = talking(tiny_backbone("llama"), MARKED)
    rows = [
        {"messages": [{"role": role, "content": f"talk {i}"} for _ in "abc" for role in ("user", "assistant")]}
        for i in range(10)
    ]
    path = write_lines(tmp_path / "chat.jsonl", rows)
    config = DataConfig(
        dataset_name=str(path), on_policy=True, answer_tokens=1, answer_turns="every", holdout=0.5, prompt_tokens=500
    )
    talks = []
    for split in ("train", "eval", "calibrate"):
        part = [words(backbone.tokenizer, document.ids) for document in load_documents(config, backbone, split)]
        assert len(part) % 3 == 0
        talks.append({text[len("<user>") :].split("<")[0] for text in part})
    assert sum(map(len, talks)) == len(set.union(*talks)) == 10


def test_one_user_turn_is_answered_as_its_prompt_was(tmp_path, tiny_backbone, monkeypatch):
    """The same tokens under the same name: answers that were made before are found."""
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    backbone = talking(tiny_backbone("llama"), MARKED)
    forms = [
        lambda text: {"prompt": text},
        lambda text: {"turns": [text, "more"]},
        lambda text: {"text": text},
        lambda text: {"messages": [{"role": "user", "content": text}]},
        lambda text: {"instruction": text, "input": "", "output": "a"},
    ]
    made = []
    for form in forms:
        path = write_lines(tmp_path / "p.jsonl", [form(f"question {i}") for i in range(6)])
        made.append(all_documents(DataConfig(dataset_name=str(path), on_policy=True, answer_tokens=2), backbone))
        monkeypatch.setattr(on_policy, "answerer", lambda _: pytest.fail("answered again"))
    assert all(documents == made[0] for documents in made)
    assert len(list((tmp_path / "home" / "answers").iterdir())) == 1


def test_a_template_that_refuses_a_system_turn_gets_it_from_the_user():
    tokenizer = tokenizer_with(STRICT)
    ids, start = encode_conversation(tokenizer, TWO_TURNS)
    whole = "<user>be kind\n\nhi</><assistant>ho</><user>and now?</><assistant>bye</>"
    assert words(tokenizer, ids) == whole
    assert words(tokenizer, ids[:start]) == "<user>be kind\n\nhi</><assistant>"
    assert words(tokenizer, encode_prompt(tokenizer, TWO_TURNS[:2])) == "<user>be kind\n\nhi</><assistant>"
    called = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]
    ids, _ = encode_conversation(tokenizer, called)
    call = '{"name": "add", "arguments": {"a": 1}}'
    assert words(tokenizer, ids) == f"<user>hi</><assistant>{call}</><user>2</><assistant>ho</>"


def test_tool_calls_stand_in_the_text_where_the_template_knows_none():
    turns = [USER, {"role": "assistant", "content": "wait", "tool_calls": [CALL]}]
    plain, knowing = tokenizer_with(MARKED), tokenizer_with(WITH_TOOLS)
    call = '{"name": "add", "arguments": {"a": 1}}'
    assert words(plain, encode_conversation(plain, turns)[0]) == f"<user>hi</><assistant>wait\n{call}</>"
    assert words(knowing, encode_conversation(knowing, turns)[0]) == '<user>hi</><assistant>wait{"a": 1}</>'


@pytest.mark.parametrize("on_policy_text", [False, True])
def test_a_row_that_the_template_refuses_is_left_out_by_name(tmp_path, tiny_backbone, monkeypatch, on_policy_text):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    backbone = talking(tiny_backbone("llama"), STRICT)
    rows = [{"messages": [USER, ANSWER]}] * 6 + [{"messages": [ANSWER, USER, ANSWER]}]
    config = DataConfig(
        dataset_name=str(write_lines(tmp_path / "chat.jsonl", rows)), on_policy=on_policy_text, answer_tokens=1
    )
    lines = []
    assert len(all_documents(config, backbone, on_read=lines.append)) == 6
    assert set(lines) == {
        "chat.jsonl: 6 rows read (6 messages); 1 left out: the chat template refuses this: "
        "Conversation roles must alternate user/assistant [1 row: 7]"
    }


@pytest.mark.parametrize(("template", "said"), [("{{ raise_exception('no') }}", "no"), ("{% for %}", "Expected an")])
def test_a_template_that_takes_nothing_leaves_nothing(tmp_path, tiny_backbone, template, said):
    backbone = talking(tiny_backbone("llama"), template)
    config = DataConfig(dataset_name=str(write_lines(tmp_path / "chat.jsonl", [{"messages": [USER, ANSWER]}] * 3)))
    with pytest.raises(
        DataError, match=rf"nothing to use; the chat template refuses this: {said}.*\[3 rows: 1, 2, 3\]"
    ):
        load_documents(config, backbone, "train")
    with pytest.raises(BackboneError, match=f"the chat template refuses this: {said}") as raised:
        encode_prompt(backbone.tokenizer, "hi")
    assert "--raw" in raised.value.hint
    assert words(backbone.tokenizer, encode_prompt(backbone.tokenizer, "hi", raw=True)) == "hi"


def test_without_a_template_roles_and_texts_are_joined_and_it_is_said_once(tmp_path, tiny_backbone):
    backbone = tiny_backbone("llama")
    rows = [{"messages": [SYSTEM, USER, ANSWER]}] * 3
    lines = []
    config = DataConfig(dataset_name=str(write_lines(tmp_path / "chat.jsonl", rows)))
    documents = load_documents(config, backbone, "train", on_read=lines.append)
    assert words(backbone.tokenizer, documents[0].ids) == "system: be kind\n\nuser: hi\n\nassistant: ho<end>"
    assert (
        words(backbone.tokenizer, documents[0].ids[: documents[0].answer_start])
        == "system: be kind\n\nuser: hi\n\nassistant:"
    )
    assert documents[0].ids[-1] == END
    assert len(lines) == 1
    assert lines[0].endswith("; the tokenizer has no chat template, so roles and texts are joined plainly")


# What is said


def test_rows_are_counted_by_form_and_by_reason(tmp_path):
    rows = [
        {"text": "a"},
        {"prompt": "b"},
        {"text": ""},
        {"messages": [USER]},
        {"text": "c"},
        {"messages": [{}]},
        {"text": " "},
    ]
    reading = read_data(DataConfig(dataset_name=str(write_lines(tmp_path / "mixed.jsonl", rows))))
    assert reading.summary() == (
        "mixed.jsonl: 4 rows read (2 text, 1 prompt, 1 messages); "
        "3 left out: empty [2 rows: 3, 7]; a turn without a role [1 row: 6]"
    )
    assert [record["text"] for record in reading.records] == ["a", "b", "hi", "c"]


def test_the_first_message_is_not_the_text_of_all(tmp_path):
    rows = [{"messages": [SYSTEM, {"role": "user", "content": f"question {i}"}]} for i in range(3)]
    records = read_records(DataConfig(dataset_name=str(write_lines(tmp_path / "chat.jsonl", rows))))
    assert [record["text"] for record in records] == ["question 0", "question 1", "question 2"]


def test_on_policy_leaves_out_what_is_too_long_and_what_nobody_asks(tmp_path, tiny_backbone, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    backbone = talking(tiny_backbone("llama"), MARKED)
    longer = [USER, {"role": "assistant", "content": "x" * 60}, USER, ANSWER]
    rows = [{"prompt": "a"}] * 4 + [{"prompt": "b" * 60}, {"messages": [SYSTEM, ANSWER]}, {"messages": longer}]
    config = DataConfig(
        dataset_name=str(write_lines(tmp_path / "p.jsonl", rows)),
        on_policy=True,
        answer_tokens=1,
        prompt_tokens=60,
        answer_turns="every",
    )
    lines = []
    assert len(all_documents(config, backbone, on_read=lines.append)) == 5
    assert lines[0] == (
        "p.jsonl: 5 rows read (4 prompt, 1 messages); 2 left out: longer than 60 tokens [1 row: 5]; "
        "without a user turn [1 row: 6]; 1 later turns left out, longer than 60 tokens"
    )


def test_train_says_what_it_read_in_one_line(tmp_path, tiny_folder):
    rows = [{"messages": [SYSTEM, {"role": "user", "content": f"question {i} " * 9}, ANSWER]} for i in range(20)]
    path = write_lines(tmp_path / "chat.jsonl", [*rows, {"instruction": "a", "input": "", "output": "b"}, {"text": ""}])
    code, _, err = eexit(
        *("train", "--model-name", tiny_folder("llama"), "--quantization", "none", "--dataset-name", path),
        *("--max-length", 64, "--num-heads", 1, "--rank", 4, "--max-steps", 1, "--output-dir", tmp_path / "heads"),
    )
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "rows read" in line]
    assert line.startswith(
        "chat.jsonl: 21 rows read (20 messages, 1 instruction + output); 1 left out: empty [1 row: 22]; the tokenizer"
    )
