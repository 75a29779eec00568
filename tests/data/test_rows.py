"""Files as people write them: encodings, line ends, broken lines, splits, and tokens that the model does not know."""

import codecs
import dataclasses
import json

import datasets
import pytest
import torch
from commands import eexit, one_line
from tiny_models import VOCAB, byte_tokenizer

from early_exit_cli.config import BackboneConfig, CacheConfig, DataConfig, HeadsConfig
from early_exit_cli.data.load import load_documents
from early_exit_cli.data.rows import prompt_rows, read_data, read_prompts, read_records
from early_exit_cli.drafting.choose import corpus_tokens
from early_exit_cli.errors import DataError
from early_exit_cli.files.atomic import decoded, read_json, read_text
from early_exit_cli.hidden_states.cache import cache_request
from early_exit_cli.resolve import resolve

ENCODINGS = {
    "plain": str.encode,
    "BOM": lambda text: codecs.BOM_UTF8 + text.encode(),
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "BOM, CR LF": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big end first": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
}
every_encoding = pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)


def texts(path, **settings):
    return [record["text"] for record in read_records(DataConfig(dataset_name=str(path), **settings))]


# Encodings


@every_encoding
def test_files_are_read_in_every_encoding_that_says_what_it_is(tmp_path, encode):
    lines = '{"text": "caf\u00e9"}\n\n{"prompt": "\u65e5\u672c \U0001f642"}\n'
    expected = ["caf\u00e9", "\u65e5\u672c \U0001f642"]
    (tmp_path / "a.jsonl").write_bytes(encode(lines))
    (tmp_path / "a.json").write_bytes(
        encode(json.dumps([json.loads(line) for line in lines.split("\n") if line], indent=1))
    )
    (tmp_path / "a.txt").write_bytes(encode("\n\n".join(expected)))
    for name in ("a.jsonl", "a.json", "a.txt"):
        assert texts(tmp_path / name) == expected, name
    assert [row["prompt"] for row in read_prompts(tmp_path / "a.jsonl")] == expected
    assert [row.number for row in prompt_rows(tmp_path / "a.jsonl")] == [1, 3]
    assert read_text(tmp_path / "a.txt") == "\n\n".join(expected)


@every_encoding
def test_settings_and_json_files_too(tmp_path, encode):
    (tmp_path / "a.yaml").write_bytes(encode("data:\n  dataset_name: caf\u00e9\n"))
    (tmp_path / "a.json").write_bytes(encode('{\n"model_name": "caf\u00e9"\n}\n'))
    assert resolve({}, tmp_path / "a.yaml").config.data.dataset_name == "caf\u00e9"
    assert read_json(tmp_path / "a.json") == {"model_name": "caf\u00e9"}


def test_files_that_were_joined_hold_marks_within(tmp_path):
    path = tmp_path / "joined.jsonl"
    path.write_bytes(b"".join(codecs.BOM_UTF8 + json.dumps({"text": text}).encode() + b"\r\n" for text in "abc"))
    assert texts(path) == ["a", "b", "c"]


def test_text_keeps_its_null_bytes_and_separators(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\0b\u2028c\x85d"}, ensure_ascii=False), encoding="utf-8")
    assert texts(path) == ["a\0b\u2028c\x85d"]
    path.write_text(json.dumps({"text": "a\0b"}))
    assert [row["prompt"] for row in read_prompts(path)] == ["a\0b"]
    assert decoded(b"a\0b\r\n") == "a\0b\n"


def test_a_line_of_other_bytes_is_named_and_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        '{"text": "caf\u00e9"}\r\n'.encode() + '{"text": "caf\u00e9"}\r\n'.encode("cp1252") + b'{"text": "b"}\n'
    )
    assert [row.error for row in prompt_rows(path)] == [
        None,
        "is not UTF-8: invalid continuation byte at byte 13",
        None,
    ]
    assert prompt_rows(path)[0].prompt == "caf\u00e9"
    with pytest.raises(DataError, match=r"a\.jsonl:2 is not UTF-8"):
        texts(path)
    path.with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        texts(path.with_suffix(".txt"))


# Prompts, line by line


def test_two_hundred_mixed_lines_are_prompts_or_named(tmp_path):
    user = {"role": "user", "content": "ask"}
    system = {"role": "system", "content": "be kind"}
    good = [
        ({"prompt": "ask"}, "ask"),
        ({"text": "ask"}, "ask"),
        ({"turns": ["ask", "more"]}, "ask"),
        ({"messages": [system, user]}, [system, user]),
        ({"messages": [user, {"role": "assistant", "content": "no"}]}, "ask"),
        ({"conversations": [{"from": "human", "value": "ask"}]}, "ask"),
        ({"instruction": "ask", "input": "", "output": "no"}, "ask"),
        ({"question": "ask", "answer": "no"}, "ask"),
        ({"prompt": "\u65e5\u672c\0 \U0001f642" * 900}, "\u65e5\u672c\0 \U0001f642" * 900),
    ]
    bad = [
        (b'{"prompt": "a"', "is not JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b'{"prompt": "  "}', "holds no prompt: empty"),
        (b'{"body": "a"}', "holds no prompt: no column that holds a text or a conversation"),
        (b'{"prompt": "\xff"}', "is not UTF-8"),
        (b'{"prompt": "\\ud83d"}', "is not JSON: half a surrogate pair"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "holds no prompt: no user turn"),
        (b'{"prompt": {"a": 1}}', "holds no prompt: prompt is no text"),
        (b"\0\0\0", "is not JSON"),
    ]
    lines, expected = [], []
    for number in range(1, 201):
        if number % 20 == 0:
            lines.append(b" \t" if number % 40 else b"")
        elif number % 4 == 0:
            line, fault = bad[number // 4 % len(bad)]
            lines.append(line)
            expected.append((number, "", fault))
        else:
            row, prompt = good[number % len(good)]
            lines.append((codecs.BOM_UTF8 if number % 7 == 0 else b"") + json.dumps(row).encode())
            expected.append((number, prompt, None))
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"".join(line + (b"\r\n" if number % 3 else b"\n") for number, line in enumerate(lines)))
    rows = prompt_rows(path)
    assert [(row.number, row.prompt) for row in rows] == [(number, prompt) for number, prompt, _ in expected]
    for row, (number, _, fault) in zip(rows, expected, strict=True):
        assert (row.error is None) == (fault is None)
        assert row.error is None or row.error.startswith(fault)
        assert row.place == f"{path}:{number}"
    assert {fault for _, _, fault in expected} == {None, *(fault for _, fault in bad)}
    with pytest.raises(DataError, match=r"mixed\.jsonl:4 .*\(40 rows like it or otherwise bad\)"):
        read_prompts(path)


def test_a_file_without_rows_holds_no_prompts(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b"\r\n\r\n")
    with pytest.raises(DataError, match="holds no prompts"):
        prompt_rows(path)
    with pytest.raises(DataError, match="holds no text"):
        texts(path)


def test_a_file_of_another_kind_holds_no_prompts_and_is_refused_as_a_whole(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nWhy?,So.\n")
    with pytest.raises(DataError, match=r"a\.csv:1 is not JSON: .* \(2 rows like it or otherwise bad\)") as fault:
        prompt_rows(tmp_path / "a.csv")
    assert '{"prompt": "..."} on each line' in fault.value.hint


def test_broken_lines_of_training_text_are_errors_and_empty_ones_are_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n\n  \n{"text": "b"}\n')
    assert texts(path) == ["a", "b"]
    for line, words in [
        (b'{"text": ', r"a\.jsonl:6 is not JSON"),
        (b'"b"', r"a\.jsonl:6 must hold a JSON object"),
        (b'{"text": "\\udc00"}', r"a\.jsonl:6 is not JSON: half a surrogate pair"),
        (b'{"body": "b"}', "row 6 has no column .* its columns: body"),
    ]:
        path.write_bytes(b'\n{"text": "a"}\n\n  \n{"text": "b"}\n' + line)
        with pytest.raises(DataError, match=words):
            texts(path)


def test_a_named_column_must_be_in_every_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "a", "text": "b"}\n{"text": "c"}\n')
    with pytest.raises(DataError, match="row 2 has no column 'body'; its columns: text"):
        texts(path, text_column="body")
    path.write_text('{"body": "a", "text": "b"}\n{"body": "c"}\n')
    assert texts(path, text_column="body") == ["a", "c"]


# Splits


def test_a_saved_set_without_the_split_lists_those_it_has(tmp_path):
    part = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    datasets.DatasetDict({"test": part, "validation": part}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved has no split 'train'; its splits: test, validation") as raised:
        texts(tmp_path / "saved")
    assert raised.value.hint == "--split NAME"
    assert texts(tmp_path / "saved", split="validation") == ["a", "b"]


def test_a_set_of_the_hub_without_the_split_lists_those_it_has(monkeypatch):
    def load_dataset(name, config, split):
        raise ValueError(f'Unknown split "{split}". Should be one of [...].')

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["test", "train_sft"])
    with pytest.raises(DataError, match="org/talks has no split 'train'; its splits: test, train_sft"):
        texts("org/talks")
    with pytest.raises(DataError, match="cannot read the data set 'org/talks': Unknown split"):
        texts("org/talks", split="test[7:")


def test_conversations_of_tables_are_read(tmp_path):
    """Arrow gives every turn the keys of all, and every row the columns of all, with nulls."""
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "c"}],
            "prompt": None,
        },
        {"prompt": "d", "messages": None},
        {"prompt": None, "messages": []},
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        reading = read_data(DataConfig(dataset_name=str(tmp_path / name)))
        assert reading.summary() == f"{name}: 2 rows read (1 messages, 1 prompt); 1 left out: empty [1 row: 3]"
        assert reading.records[0]["sample"].messages == [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "name": "c"},
        ]


# Tokens that the tokenizer has and the model has not


@pytest.fixture
def grown(tiny_backbone):
    """A backbone whose tokenizer has two tokens more than its embedding has rows, one of them for padding."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<t{number}>" for number in range(VOCAB + 1 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert len(tokenizer) == VOCAB + 2
    return dataclasses.replace(tiny_backbone("llama"), tokenizer=tokenizer)


FAULT = r"token 320 \('<t63>'\): the tokenizer has 322 tokens, the embedding 320 rows"


@pytest.mark.parametrize("on_policy", [False, True])
def test_training_text_with_a_token_that_the_model_lacks_is_named(grown, tmp_path, on_policy, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"row {number}"} for number in range(6)] + [{"prompt": "a <t63>"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(dataset_name=str(path), on_policy=on_policy, answer_tokens=2)
    with pytest.raises(DataError, match=rf"a\.jsonl: row 7 holds {FAULT}"):
        load_documents(config, grown, "train")
    path.write_text("\n".join(map(json.dumps, [*rows[:-1], {"prompt": "a <t62>"}])))  # the last one it has
    assert all(max(document.ids) < VOCAB for document in load_documents(config, grown, "train"))


def test_a_lookup_corpus_with_such_a_token_is_named(grown, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("some text <t63> and more")
    with pytest.raises(DataError, match=rf"corpus\.txt holds {FAULT}"):
        corpus_tokens(grown, path)
    path.write_text("some text")
    assert grown.tokenizer.decode(corpus_tokens(grown, path)) == "some text"


def test_padding_and_end_tokens_that_the_model_lacks_are_not_used(grown):
    assert grown.tokenizer.pad_token_id == VOCAB + 1
    assert grown.pad_token_id == min(grown.eos_token_ids)
    grown.embedding(torch.tensor([grown.pad_token_id]))
    grown.tokenizer.eos_token = "<pad>"
    assert VOCAB + 1 not in dataclasses.replace(grown).eos_token_ids


def test_train_on_such_text_is_one_line(grown, tmp_path, tiny_folder):
    grown.model.save_pretrained(tmp_path / "model")
    grown.tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {number} <t{number}>"}) for number in range(60, 65)))
    model = ["--model-name", tmp_path / "model", "--quantization", "none"]
    for extra in ([], ["--on-policy"]):
        code, out, err = eexit("train", *model, "--dataset-name", path, *extra, "--output-dir", tmp_path / "heads")
        assert (code, out) == (2, "")
        assert "row 4 holds token 320 ('<t63>')" in one_line(err)
    code, out, err = eexit("infer", *model, "--prompt", "a", "--drafter", "lookup", "--lookup-corpus", path)
    assert (code, out) == (2, "")
    assert "holds token 320 ('<t63>')" in one_line(err)


# What was kept before


def test_a_cache_made_before_there_was_the_setting_is_still_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')

    def request(**settings):
        data = DataConfig(dataset_name=str(path), **settings)
        return cache_request(BackboneConfig(), HeadsConfig(), data, CacheConfig())

    assert "data.answer_turns" not in request()
    assert request(answer_turns="every")["data.answer_turns"] == "every"
