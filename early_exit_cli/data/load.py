"""Texts and prompts from files or data sets, answered by the backbone where asked, packed into token sequences.

A `Document` is one text as token ids. Documents are split once, by a seeded shuffle, into `train`, `eval` and
`calibrate`; every command draws the same split from the same configuration. Sequences are packed: documents stand one
after another in rows of `max_length`, and attention never crosses from one to the next (`block_mask`).
"""

from __future__ import annotations

import random

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.config import DataConfig
from early_exit_cli.data.documents import Document, Progress, Split, split_documents
from early_exit_cli.data.on_policy import answer_prompts
from early_exit_cli.data.rows import read_records
from early_exit_cli.errors import DataError


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
