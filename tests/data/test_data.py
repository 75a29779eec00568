import json
import random

import pytest
import torch

from early_exit_cli.config import DataConfig
from early_exit_cli.data import on_policy
from early_exit_cli.data.documents import Document, split_documents
from early_exit_cli.data.load import load_documents, load_splits
from early_exit_cli.data.packing import apart, pack
from early_exit_cli.data.rows import read_data, read_prompts, read_records
from early_exit_cli.errors import DataError


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_packing_keeps_every_token_and_cuts_only_what_is_longer_than_a_row():
    documents = [Document(list(range(100 * i, 100 * i + n)), "s") for i, n in enumerate([5, 9, 3, 20], start=1)]
    rows = pack(documents, 8, pad_id=0)
    held = [row.input_ids[row.valid].tolist() for row in rows]
    assert sorted(token for row in held for token in row) == [token for document in documents for token in document.ids]
    assert (
        held
        == [
            [*documents[0].ids, *documents[2].ids],  # fill a row between them
            documents[1].ids[:8],
            [*documents[1].ids[8:], *documents[3].ids[16:]],
            documents[3].ids[:8],
            documents[3].ids[8:16],
        ]
    )
    assert [row.documents[row.valid].unique().tolist() for row in rows] == [[0, 2], [1], [1, 3], [3], [3]]


def test_packing_wastes_little_and_leaves_answers_with_their_prompts():
    dice = random.Random(0)
    documents = [Document([i] * dice.randrange(20, 301), "s", answer_start=10) for i in range(400)]
    rows = pack(documents, 512, pad_id=0)
    assert all((row.documents == i).sum() in (0, len(d.ids)) for row in rows for i, d in enumerate(documents))
    assert sum(int(row.valid.sum()) for row in rows) > 0.97 * 512 * len(rows)
    first = [int(row.documents[0, 0]) for row in rows]
    assert first == sorted(first)  # so the first rows are no longer documents than the last


def test_documents_apart_keep_their_tokens_numbers_and_places():
    documents = [Document([n] * size, "s", answer_start=size // 3) for n, size in enumerate((5, 19, 3, 8, 8, 12))]
    rows = pack(documents, 12, pad_id=0)
    found = apart(rows, 30)
    assert sorted(tokens_of(found)) == sorted(tokens_of(rows))
    for batch in found:
        places, length = batch.input_ids.shape
        assert places * length <= 30 or places == 1
        assert all(len({*row[row >= 0].tolist()}) == 1 for row in batch.documents)
    assert [batch.input_ids.shape[1] for batch in found] == [7, 8, 12]
    assert sum(int(batch.measured.sum()) for batch in found) == sum(int(row.measured.sum()) for row in rows)


def tokens_of(batches):
    return [
        token
        for batch in batches
        for token in torch.stack((batch.documents, batch.input_ids, batch.places), -1)[batch.valid].tolist()
    ]


def test_attention_and_targets_never_cross_documents():
    (row,) = pack([Document([1, 2, 3], "a"), Document([4, 5], "b")], 8, pad_id=0)
    mask = row.block_mask()[0, 0]
    assert mask[2].tolist() == [True, True, True] + [False] * 5
    assert mask[4].tolist() == [False] * 3 + [True, True] + [False] * 3
    assert row.measured[0].tolist() == [True, True, False, True, False, False, False, False]


def test_only_answers_are_measured():
    """Of [prompt 1 2][answer 3 4], the positions that predict 3 and 4 count; a long answer goes on in another row."""
    (first,) = pack([Document([1, 2, 3, 4], "a", answer_start=2), Document([5, 6], "b", answer_start=1)], 6, pad_id=0)
    assert first.measured[0].tolist() == [False, True, True, False, True, False]
    assert first.answers[0].tolist() == [False, False, True, True, False, True]
    _, second = pack([Document([1, 2, 3, 4, 5, 6, 7], "b", answer_start=1)], 6, pad_id=0)
    assert second.input_ids[0, 0] == 7
    assert second.answers[0].tolist() == [True] + [False] * 5


def test_every_token_knows_its_document_and_its_place_in_the_answer():
    rows = pack([Document([1, 2, 3, 4, 5], "a", answer_start=2), Document([6, 7, 8], "b")], 4, pad_id=0)
    assert [row.documents[0].tolist() for row in rows] == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert [row.places[0].tolist() for row in rows] == [[-2, -1, 0, 1], [2, 0, 1, 2]]


def test_packed_documents_give_the_states_they_have_alone(tiny_backbone):
    backbone = tiny_backbone("llama")
    documents = [Document([5, 6, 7, 8], "a"), Document([50, 60, 70], "b")]
    (row,) = pack(documents, 8, pad_id=0)
    packed = backbone.hidden_states_at(row.input_ids, row.block_mask(), [2])
    start = 0
    for document in documents:
        ids = torch.tensor([document.ids])
        alone = backbone.hidden_states_at(ids, torch.ones_like(ids), [2])
        end = start + len(document.ids)
        for ours, theirs in zip(packed, alone, strict=True):
            assert torch.allclose(ours[0, start:end], theirs[0], atol=1e-4)
        start = end


def test_the_split_is_disjoint_complete_and_stable():
    documents = [Document([i], "s") for i in range(100)]
    parts = [split_documents(documents, 0.1, name) for name in ("train", "eval", "calibrate")]
    assert [len(part) for part in parts] == [90, 5, 5]
    assert sorted(d.ids[0] for part in parts for d in part) == list(range(100))


def test_local_files_of_every_kind_are_read(tmp_path):
    from datasets import Dataset

    rows = [{"text": "first text"}, {"text": "second\u2028text"}]
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.txt").write_text("first text\n\nsecond text")
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
    for name in ("a.jsonl", "a.txt", "a.parquet", "folder"):
        records = read_records(DataConfig(dataset_name=str(tmp_path / name)))
        assert [record["text"].split()[0] for record in records] == ["first", "second"], name


def test_a_documents_source_is_its_source_its_category_or_its_file(tmp_path):
    rows = [{"text": "a", "source": "s", "category": "c"}, {"text": "b", "category": "c"}, {"text": "c"}]
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    assert [record["source"] for record in read_records(DataConfig(dataset_name=str(path)))] == ["s", "c", "mixed"]


def test_data_faults_name_file_line_and_flag(tmp_path):
    with pytest.raises(DataError, match="no text"):
        read_records(DataConfig())
    for name in ("none.jsonl", "none.csv"):  # and no data set of the Hub
        with pytest.raises(DataError, match="no file"):
            read_records(DataConfig(dataset_name=str(tmp_path / name)))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(DataError, match=r"bad\.jsonl:2 is not JSON"):
        read_records(DataConfig(dataset_name=str(tmp_path / "bad.jsonl")))
    write_lines(tmp_path / "other.jsonl", [{"body": "x"}])
    with pytest.raises(DataError, match="its columns: body"):
        read_records(DataConfig(dataset_name=str(tmp_path / "other.jsonl")))
    write_lines(tmp_path / "empty.jsonl", [{"text": "  "}])
    with pytest.raises(DataError, match="holds no text"):
        read_records(DataConfig(dataset_name=str(tmp_path / "empty.jsonl")))


def test_prompts_may_be_spec_bench_turns(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"turns": ["b", "c"], "category": "qa"}])
    assert [row["prompt"] for row in read_prompts(path)] == ["a", "b"]
    write_lines(path, [{"prompt": "a"}, {"body": "b"}])
    with pytest.raises(DataError, match=r"p\.jsonl:2 holds no prompt"):
        read_prompts(path)


def test_on_policy_text_is_the_backbones_own_answer_and_is_made_once(tmp_path, tiny_backbone, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    backbone = tiny_backbone("llama")
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(10)])
    config = DataConfig(
        dataset_name=str(path),
        on_policy=True,
        answer_tokens=6,
        sampled_share=0.0,
        answer_batch=4,
        holdout=0.5,
    )
    documents = [d for split in ("train", "eval", "calibrate") for d in load_documents(config, backbone, split)]
    assert len(documents) == 10
    for document in documents:
        prompt = document.ids[: len("question 0")]
        ids = torch.tensor([prompt])
        answer = backbone.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        assert document.ids == answer[0].tolist()

    def forbidden(*_):
        raise AssertionError("answered again")

    monkeypatch.setattr(on_policy, "answerer", forbidden)
    again = load_splits(read_data(config), backbone, ["train", "eval", "calibrate"])
    assert [document for part in again for document in part] == documents


def test_large_batches_are_groups_of_one_kind(tmp_path, tiny_backbone, monkeypatch):
    """On a GPU: which prompts are answered greedily is decided by group as on a CPU, and answers are kept for both."""
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(on_policy, "GROUP", 3)
    backbone = tiny_backbone("llama")
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "q" * (1 + i % 40)} for i in range(50)])
    config = DataConfig(dataset_name=str(path), on_policy=True, answer_tokens=2)
    batches = []

    def fake(prompts, tokens, temperature, generator):
        batches.append(([len(prompt) for prompt in prompts], temperature))
        return [[len(prompt)] for prompt in prompts]

    monkeypatch.setattr(on_policy, "answerer", lambda _: fake)
    kinds = {}
    for together in (1, 4):
        monkeypatch.setattr(on_policy, "groups_together", lambda _, together=together: together)
        monkeypatch.setenv("EEXIT_HOME", str(tmp_path / str(together)))
        batches.clear()
        load_documents(config, backbone, "train")
        kinds[together] = sorted((length, temperature or 0) for lengths, temperature in batches for length in lengths)
        assert max(len(lengths) for lengths, _ in batches) == 3 * together
        assert [lengths[0] for lengths, _ in batches] == sorted(lengths[0] for lengths, _ in batches)
    assert kinds[1] == kinds[4]
    assert {temperature for _, temperature in kinds[1]} == {0, config.temperature}
    assert len(kinds[1]) == 50
    monkeypatch.setattr(on_policy, "groups_together", lambda _: 1)
    batches.clear()
    load_documents(config, backbone, "train")
    assert not batches


def test_an_interrupted_answering_goes_on_where_it_was(tmp_path, tiny_backbone, monkeypatch):
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    backbone = tiny_backbone("llama")
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": f"question {i}"} for i in range(12)])
    config = DataConfig(dataset_name=str(path), on_policy=True, answer_tokens=5, sampled_share=0.5, answer_batch=4)
    real, calls = on_policy.answerer(backbone), []

    def dies_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(on_policy, "answerer", lambda _: dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        load_documents(config, backbone, "train")
    answers = next((tmp_path / "home" / "answers").iterdir())
    answers.write_text(answers.read_text() + '{"index": 9, "ans')  # killed while writing
    load_documents(config, backbone, "train")
    assert len(calls) == 4
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "fresh"))
    resumed = load_documents(config, backbone, "train")
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    assert load_documents(config, backbone, "train") == resumed
