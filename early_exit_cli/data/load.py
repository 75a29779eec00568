"""Texts and prompts from files or data sets, answered by the backbone where asked, packed into token sequences.

A `Document` is one text as token ids. Records are split once, by a seeded shuffle, into `train`, `eval` and `calibrate`;
every command draws the same split from the same configuration, and all documents of a conversation are of one split.
Sequences are packed: documents stand one after another in rows of `max_length`, and attention never crosses from one to
the next (`block_mask`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.chat import encode_conversation
from early_exit_cli.config import DataConfig
from early_exit_cli.data.documents import Document, Progress, Split, split_documents
from early_exit_cli.data.on_policy import answer_prompts
from early_exit_cli.data.rows import Reading, Record, read_data
from early_exit_cli.errors import BackboneError, DataError

Group = list[Document]
"""The documents of one record: one, or with `answer_turns: every` one for each user turn of a conversation."""


def load_documents(
    config: DataConfig,
    backbone: Backbone,
    split: Split,
    progress: Progress | None = None,
    on_read: Callable[[str], None] | None = None,
) -> list[Document]:
    """The documents of one split, as `load_splits`.

    Raises:
        DataError: as `load_splits`, or nothing to read.
    """
    return load_splits(read_data(config), backbone, [split], progress, on_read)[0]


def load_splits(
    reading: Reading,
    backbone: Backbone,
    splits: Sequence[Split],
    progress: Progress | None = None,
    on_read: Callable[[str], None] | None = None,
) -> list[list[Document]]:
    """The documents of each split, tokenised; with `on_policy`, prompts together with the backbone's own answers.

    Args:
        reading: of the whole data set; what cannot be used after all is counted in it.
        on_read: called with one line on what was read and what was left out, before anything is answered.

    Raises:
        DataError: nothing left of one of them, or a token that the backbone has no embedding of.
    """
    config, records = reading.config, list(reading.records)
    random.Random(config.data_seed).shuffle(records)
    if config.max_documents:
        records = records[: config.max_documents]
    if not backbone.tokenizer.chat_template and any(record["sample"].messages for record in records):
        reading.notes.append("the tokenizer has no chat template, so roles and texts are joined plainly")
    groups = _prompts(reading, records, backbone) if config.on_policy else _texts(reading, records, backbone)
    if not groups:
        raise DataError(f"{config.dataset_name} holds nothing to use; {reading.reasons()}")
    if on_read:
        on_read(reading.summary())
    if config.on_policy:
        unanswered = [document for group in groups for document in group]
        answered = iter(answer_prompts(unanswered, config, backbone, progress))
        groups = [[next(answered) for _ in group] for group in groups]
    parts = []
    for split in splits:
        part = [document for group in split_documents(groups, config.holdout, split) for document in group]
        if not any(len(document.ids) > 1 for document in part):
            raise DataError(
                f"{config.dataset_name}: the {split} part of {len(groups)} texts is empty",
                hint="use more text, or --holdout",
            )
        parts.append(part)
    return parts


def _texts(reading: Reading, records: list[Record], backbone: Backbone) -> list[Group]:
    """Texts as they are, with an end token; conversations whole, through the chat template."""
    plain = [record["text"] for record in records if not record["sample"].messages]
    tokenised = iter(backbone.tokenizer(plain)["input_ids"] if plain else [])
    end = sorted(backbone.eos_token_ids)[:1]
    groups = []
    for record in records:
        messages = record["sample"].messages
        if not messages:
            document = Document([*next(tokenised), *end], record["source"])
        else:
            try:
                ids, start = encode_conversation(backbone.tokenizer, messages)
            except BackboneError as error:
                reading.reject(record, error.message)
                continue
            document = Document(ids if backbone.tokenizer.chat_template else [*ids, *end], record["source"], start)
        _require_known(reading, record, backbone, [document])
        groups.append([document])
    return groups


def _prompts(reading: Reading, records: list[Record], backbone: Backbone) -> list[Group]:
    """Prompts that are not too long, without their answers yet."""
    config, groups = reading.config, []
    too_long = f"longer than {config.prompt_tokens} tokens"
    later = 0
    for record in records:
        try:
            prompts = record["sample"].prompts(every_turn=config.answer_turns == "every")
            encoded = [backbone.encode_prompt(prompt) for prompt in prompts]
        except BackboneError as error:
            reading.reject(record, error.message)
            continue
        group = [Document(ids, record["source"], len(ids)) for ids in encoded if len(ids) <= config.prompt_tokens]
        if not group:
            reading.reject(record, too_long if prompts else "without a user turn")
            continue
        later += len(encoded) - len(group)
        _require_known(reading, record, backbone, group)
        groups.append(group)
    if later:
        reading.notes.append(f"{later:,} later turns left out, {too_long}")
    if not groups and set(reading.left_out) == {too_long}:
        raise DataError(f"every prompt is longer than {config.prompt_tokens} tokens", hint="--prompt-tokens N")
    return groups


def _require_known(reading: Reading, record: Record, backbone: Backbone, documents: Iterable[Document]) -> None:
    for document in documents:
        fault = backbone.unknown_token(document.ids)
        if fault is not None:
            raise DataError(
                f"{reading.name}: row {record['number']} holds {fault}",
                hint="give the model a row for each token (resize_token_embeddings), or leave it out of the text",
            )
