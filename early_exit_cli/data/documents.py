"""A text as token ids, and the one split of texts into training, evaluation and calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

Whole = TypeVar("Whole")
Split = Literal["train", "eval", "calibrate"]
Progress = Callable[[int, int, int], None]
"""Called with (documents done, documents in all, tokens of prompts and answers made by this run)."""


@dataclass(frozen=True)
class Document:
    """Token ids of one text. `source` names where it came from; the backbone's own answer begins at `answer_start`."""

    ids: list[int]
    source: str
    answer_start: int = 0


def split_documents(documents: list[Whole], holdout: float, split: Split) -> list[Whole]:
    """`train` is the head of the list; the last `holdout` share is halved into `eval` and `calibrate`.

    Args:
        documents: or groups of them, which stay whole.
    """
    held = max(2, round(len(documents) * holdout))
    start, middle = len(documents) - held, len(documents) - held // 2
    return {"train": documents[:start], "eval": documents[start:middle], "calibrate": documents[middle:]}[split]
