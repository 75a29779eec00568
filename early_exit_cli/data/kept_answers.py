"""On-policy answers of earlier runs, a line each: whoever made them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import parse_json
from early_exit_cli.files.schemas import AnswerForm, require_form

GROUP = 48
"""Prompts answered together on a CPU; the least number of like kind, greedy or sampled, anywhere. Part of a file's name."""


def read_answers(path: Path, prompts: int, vocab_size: int) -> dict[int, list[int]]:
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
                found = require_form(parse_json(line.decode("utf-8")), AnswerForm, str(path))
                if found.index < prompts and all(token < vocab_size for token in found.answer):
                    answers[found.index] = found.answer
        file.truncate(whole)
    return answers
