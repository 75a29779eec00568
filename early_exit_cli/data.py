"""Texts and prompts from files or data sets, answered by the backbone where asked, packed into token sequences.

A `Document` is one text as token ids. Documents are split once, by a seeded shuffle, into `train`, `eval` and
`calibrate`; every command draws the same split from the same configuration. Sequences are packed: documents stand one
after another in rows of `max_length`, and attention never crosses from one to the next (`block_mask`).
"""

from __future__ import annotations

import bisect
import contextlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.artifacts import parse_json, sha256_of, user_cache_dir
from early_exit_cli.backbone import Backbone
from early_exit_cli.batched import GROUP, Answer, answerer, groups_together
from early_exit_cli.config import DataConfig
from early_exit_cli.errors import BundleError, DataError
from early_exit_cli.formats import AnswerForm, require_form

Split = Literal["train", "eval", "calibrate"]
TEXT_COLUMNS = ("text", "prompt", "turns", "messages", "instruction", "question")
IGNORED = -1

Progress = Callable[[int, int, int], None]
"""Called with (documents done, documents in all, tokens of prompts and answers made by this run)."""


@dataclass(frozen=True)
class Document:
    """Token ids of one text. `source` names where it came from; the backbone's own answer begins at `answer_start`."""

    ids: list[int]
    source: str
    answer_start: int = 0


@dataclass(frozen=True)
class Batch:
    """Packed sequences.

    input_ids: [batch, seq] int64. documents: [batch, seq] int64, the number of the document a token belongs to among
    those packed, IGNORED (-1) for padding. places: [batch, seq] int64, where in the document's answer the token stands:
    0 is the first, a prompt's tokens have negative ones (plain text is all answer). Positions need no tensor: the mask
    says where a document begins.
    """

    input_ids: Tensor
    documents: Tensor
    places: Tensor

    @property
    def valid(self) -> Tensor:
        """[batch, seq] bool: not padding."""
        return self.documents != IGNORED

    @property
    def answers(self) -> Tensor:
        """[batch, seq] bool: of an answer."""
        return self.places >= 0

    @property
    def measured(self) -> Tensor:
        """[batch, seq] bool: the following token is of the same document, and of an answer.

        Heads are calibrated and scored on these positions only: a chat template and a prompt are never decoded, and
        the template's fixed words would flatter every head.
        """
        same = torch.zeros_like(self.documents, dtype=torch.bool)
        same[:, :-1] = (self.documents[:, 1:] == self.documents[:, :-1]) & self.answers[:, 1:]
        return same & self.valid

    def block_mask(self) -> Tensor:
        """[batch, 1, seq, seq] bool: causal, within a document; a padding row sees itself."""
        seq = self.input_ids.shape[1]
        causal = torch.ones(seq, seq, dtype=torch.bool, device=self.input_ids.device).tril()
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (causal & same)[:, None]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.documents.to(device), self.places.to(device))


def read_records(config: DataConfig) -> list[dict[str, Any]]:
    """Rows of the data set as `{"text": str, "source": str}`.

    Raises:
        DataError: no name given, file or column missing, nothing in it.
    """
    name = config.dataset_name
    if not name:
        raise DataError("no text to work on", hint="name it with --dataset-name: a Hub id or a local file")
    rows = _load_rows(config, name)
    column = config.text_column or next((key for key in TEXT_COLUMNS if rows and key in rows[0]), "text")
    missing = next((number for number, row in enumerate(rows, start=1) if column not in row), None)
    if missing is not None:
        raise DataError(
            f"{name}: row {missing} has no column {column!r}; its columns: {', '.join(rows[missing - 1]) or 'none'}",
            hint="--text-column NAME",
        )
    records = [
        {"text": text, "source": str(row.get("source") or row.get("category") or Path(name).stem)}
        for row in rows
        if (text := _as_text(row[column])).strip()
    ]
    if not records:
        raise DataError(f"{name} holds no text")
    return records


def _load_rows(config: DataConfig, name: str) -> list[dict[str, Any]]:
    from datasets import Dataset, load_dataset, load_from_disk

    path = Path(name).expanduser()
    kinds = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
    try:
        if path.is_file() and path.suffix in (".jsonl", ".json"):
            return _read_json_lines(path)
        if path.is_file():
            if path.suffix not in kinds:
                raise DataError(f"{path}: unknown kind of file; supported: {', '.join(kinds)}")
            options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
            loaded: Any = load_dataset(kinds[path.suffix], data_files=str(path), split="train", **options)
        elif path.is_dir():
            loaded = load_from_disk(str(path))
        elif path.suffix in kinds:
            raise DataError(f"no file {path}")
        else:
            loaded = load_dataset(name, config.dataset_config_name, split=config.split)
    except DataError:
        raise
    except Exception as error:  # datasets raises builder-specific classes; all mean: this cannot be read
        raise DataError(f"cannot read the data set {name!r}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(loaded, Dataset):
        loaded = loaded[config.split]
    return list(loaded)


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file; or of a .json file that holds a list, or a list under `data`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    places = [(str(path), text)]
    if path.suffix != ".json":
        places = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    values: Any = []
    for place, document in places:
        try:
            values.append(parse_json(document))
        except ValueError as error:
            raise DataError(f"{place} is not JSON: {error}") from error
    if path.suffix == ".json":
        (whole,) = values
        values = whole.get("data") if isinstance(whole, dict) else whole
        if not isinstance(values, list):
            raise DataError(f"{path} must hold a list, or a list under 'data'")
        places = [(f"{path}, row {number}", "") for number in range(1, len(values) + 1)]
    for (place, _), value in zip(places, values, strict=True):
        if not isinstance(value, dict):
            raise DataError(f"{place} must hold a JSON object")
    return values


def _as_text(value: Any) -> str:
    """A text column's value: a string, the first of Spec-Bench's turns, or the first user message."""
    if isinstance(value, list) and value:
        value = value[0]
        if isinstance(value, dict):
            value = value.get("content")
    return value if isinstance(value, str) else ""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Prompts of a .jsonl file: rows with `prompt`, or Spec-Bench's `turns` (the first one counts).

    Raises:
        DataError: unreadable, or a row without a prompt.
    """
    rows = _read_json_lines(path)
    for number, row in enumerate(rows, start=1):
        row["prompt"] = _as_text(row.get("prompt") or row.get("turns"))
        if not row["prompt"].strip():
            raise DataError(f"{path}: row {number} has neither `prompt` nor `turns`")
    if not rows:
        raise DataError(f"{path} holds no prompts")
    return rows


def load_documents(
    config: DataConfig, backbone: Backbone, split: Split, progress: Progress | None = None
) -> list[Document]:
    """The documents of one split, tokenised; with `on_policy`, prompts together with the backbone's own answers."""
    records = read_records(config)
    random.Random(config.data_seed).shuffle(records)
    if config.max_documents:
        records = records[: config.max_documents]
    if config.on_policy:
        documents = answer_prompts(records, config, backbone, progress)
    else:
        ids = backbone.tokenizer([record["text"] for record in records])["input_ids"]
        end = sorted(backbone.eos_token_ids)[:1]
        documents = [Document([*row, *end], record["source"]) for row, record in zip(ids, records, strict=True)]
    part = split_documents(documents, config.holdout, split)
    if not any(len(document.ids) > 1 for document in part):
        raise DataError(
            f"{config.dataset_name}: the {split} part of {len(documents)} texts is empty",
            hint="use more text, or --holdout",
        )
    return part


def split_documents(documents: list[Document], holdout: float, split: Split) -> list[Document]:
    """`train` is the head of the list; the last `holdout` share is halved into `eval` and `calibrate`."""
    held = max(2, round(len(documents) * holdout))
    start, middle = len(documents) - held, len(documents) - held // 2
    return {"train": documents[:start], "eval": documents[start:middle], "calibrate": documents[middle:]}[split]


def pack(documents: list[Document], max_length: int, pad_id: int) -> list[Batch]:
    """Rows of `max_length` tokens, each a [1, max_length] Batch padded behind, in the order of their first documents.

    A document that fits into a row stays whole: the longest come first, each into the row that it leaves the least room
    in (best-fit packing, Ding et al. 2024, section 3). One longer than a row is cut, and no piece sees the one before.
    """
    pieces = [
        (owner, start, min(max_length, len(document.ids) - start))
        for owner, document in enumerate(documents)
        for start in range(0, len(document.ids), max_length)
    ]
    rows: list[list[tuple[int, int, int]]] = []
    rooms: list[tuple[int, int]] = []  # what is left in a row and its number, ascending
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        fits = bisect.bisect_left(rooms, (piece[2], -1))
        room, row = rooms.pop(fits) if fits < len(rooms) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (room - piece[2], row))
    return [_packed(documents, sorted(row), max_length, pad_id) for row in sorted(rows, key=min)]


def _packed(documents: list[Document], pieces: list[tuple[int, int, int]], max_length: int, pad_id: int) -> Batch:
    """One row of pieces: (number of the document, where in it, tokens)."""
    ids: list[int] = []
    owners: list[int] = []
    places: list[int] = []
    for owner, start, length in pieces:
        document = documents[owner]
        ids += document.ids[start : start + length]
        owners += [owner] * length
        places += range(start - document.answer_start, start - document.answer_start + length)
    missing = max_length - len(ids)
    return Batch(
        torch.tensor([ids + [pad_id] * missing], dtype=torch.int64),
        torch.tensor([owners + [IGNORED] * missing], dtype=torch.int64),
        torch.tensor([places + [IGNORED] * missing], dtype=torch.int64),
    )


def stacked(rows: list[Batch]) -> Batch:
    """Rows of any lengths as one batch, padded behind."""
    longest = max(row.input_ids.shape[1] for row in rows)

    def join(parts: list[Tensor], filler: int) -> Tensor:
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=filler) for part in parts])

    return Batch(
        join([row.input_ids for row in rows], 0),
        join([row.documents for row in rows], IGNORED),
        join([row.places for row in rows], IGNORED),
    )


def batches(rows: list[Batch], batch_size: int, seed: int | None = None) -> Iterator[Batch]:
    """Batches of `batch_size` rows; shuffled by `seed`, in order without one. The last batch may be smaller."""
    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        chosen = [rows[index] for index in order[start : start + batch_size]]
        yield stacked(chosen)


def answer_prompts(
    records: list[dict[str, Any]], config: DataConfig, backbone: Backbone, progress: Progress | None = None
) -> list[Document]:
    """Let the backbone answer each prompt, greedily or sampled; prompt and answer are one document.

    Answers are kept in the user's cache folder under a name made of everything that decides them, written batch by
    batch: a stopped run goes on where it was, and calibration reuses what training made.
    """
    prompts = [(record["source"], backbone.encode_prompt(record["text"])) for record in records]
    prompts = [(source, ids) for source, ids in prompts if len(ids) <= config.prompt_tokens]
    if not prompts:
        raise DataError(f"every prompt is longer than {config.prompt_tokens} tokens", hint="--prompt-tokens N")
    key = sha256_of(
        json.dumps(backbone.fingerprint, sort_keys=True),
        json.dumps([ids for _, ids in prompts]),
        f"{config.answer_tokens} {config.sampled_share} {config.temperature} {config.answer_batch or GROUP} {config.data_seed}",
    )
    path = user_cache_dir() / "answers" / f"{key[:24]}.jsonl"
    answers = _read_answers(path, len(prompts), backbone.vocab_size)
    answer_chunk: Answer | None = None
    path.parent.mkdir(parents=True, exist_ok=True)
    made = 0
    with open(path, "a", encoding="utf-8") as file:
        together = 1 if config.answer_batch else groups_together(backbone)
        for number, is_greedy, chunk in _batches_to_answer(prompts, config, together):
            if all(index in answers for index in chunk):
                continue  # a batch is answered whole or again: sampling depends on all of it
            answer_chunk = answer_chunk or answerer(backbone)
            found = answer_chunk(
                [prompts[index][1] for index in chunk],
                config.answer_tokens,
                None if is_greedy else config.temperature,
                torch.Generator(backbone.device).manual_seed(config.data_seed + number),
            )
            for index, answer in zip(chunk, found, strict=True):
                answers[index] = answer
                made += len(prompts[index][1]) + len(answer)
                file.write(json.dumps({"index": index, "answer": answer}) + "\n")
            file.flush()
            if progress:
                progress(len(answers), len(prompts), made)
    return [Document(ids + answers[index], source, len(ids)) for index, (source, ids) in enumerate(prompts)]


def _read_answers(path: Path, prompts: int, vocab_size: int) -> dict[int, list[int]]:
    """Answers of earlier runs. A line torn by a kill is cut off the file; one that is damaged is made again."""
    answers: dict[int, list[int]] = {}
    if not path.exists():
        return answers
    whole = 0
    with open(path, "rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            with contextlib.suppress(ValueError, BundleError):
                record = parse_json(line.decode("utf-8"))
                require_form(record, AnswerForm, str(path))
                if record["index"] < prompts and all(token < vocab_size for token in record["answer"]):
                    answers[record["index"]] = record["answer"]
        file.truncate(whole)
    return answers


def _batches_to_answer(
    prompts: list[tuple[str, list[int]]], config: DataConfig, together: int
) -> list[tuple[int, bool, list[int]]]:
    """(number, whether greedy, indices of prompts) of each batch: `together` groups of one kind, in order of length.

    A group is greedy or sampled by its number, whatever the device, so that large batches leave both kinds at any length.
    """
    kinds: dict[bool, list[tuple[int, list[int]]]] = {True: [], False: []}
    for number, group in enumerate(_chunks_of_like_length(prompts, config.answer_batch or GROUP)):
        is_greedy = random.Random(f"{config.data_seed} {number}").random() >= config.sampled_share
        kinds[is_greedy].append((number, group))
    found = []
    for is_greedy, own in kinds.items():
        for start in range(0, len(own), together):
            part = own[start : start + together]
            found.append((part[0][0], is_greedy, [index for _, group in part for index in group]))
    return sorted(found)


def _chunks_of_like_length(prompts: list[tuple[str, list[int]]], size: int) -> list[list[int]]:
    """Indices in groups of `size` prompts of like length, so that little of a batch is padding."""
    by_length = sorted(range(len(prompts)), key=lambda index: (len(prompts[index][1]), index))
    return [by_length[start : start + size] for start in range(0, len(by_length), size)]


def pad_token_id(backbone: Backbone) -> int:
    """The tokenizer's padding token, else an end token: padding is masked everywhere, its value never counts."""
    pad = backbone.tokenizer.pad_token_id
    return int(pad) if pad is not None else min(backbone.eos_token_ids, default=0)
