"""Prompts answered by the backbone itself, here or at an endpoint, kept in the user's cache folder as they are made."""

from __future__ import annotations

import json
import random

import torch

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.config import DataConfig
from early_exit_cli.data.answers import Answer, answerer, groups_together
from early_exit_cli.data.documents import Document, Progress
from early_exit_cli.data.kept_answers import GROUP, read_answers
from early_exit_cli.files.atomic import sha256_of
from early_exit_cli.files.environment import kept_path
from early_exit_cli.files.kept import MADE_FROM


def answer_prompts(
    unanswered: list[Document], config: DataConfig, backbone: Backbone, progress: Progress | None = None
) -> list[Document]:
    """Let the backbone answer each prompt, greedily or sampled; prompt and answer are one document.

    Answers are kept in the user's cache folder under a name made of everything that decides them, written batch by
    batch: a stopped run goes on where it was, and calibration reuses what training made.
    """
    if config.answers_from is not None:
        from early_exit_cli.data.remote_answers import answers_of_endpoint  # an HTTP client only where it is needed

        return answers_of_endpoint(config.answers_from, unanswered, config, backbone, progress)
    prompts = [(document.source, document.ids) for document in unanswered]
    key = sha256_of(
        json.dumps(backbone.identity, sort_keys=True),
        json.dumps([ids for _, ids in prompts]),
        f"{config.answer_tokens} {config.sampled_share} {config.temperature} {config.answer_batch or GROUP} {config.data_seed}",
    )
    path = kept_path("answers", f"{key[:24]}.jsonl")
    answers = read_answers(path, len(prompts), backbone.vocab_size)
    answer_chunk: Answer | None = None
    path.parent.mkdir(parents=True, exist_ok=True)
    made = 0
    with open(path, "a", encoding="utf-8") as file:
        if not file.tell():  # a line that is no answer: for people
            file.write(json.dumps({MADE_FROM: ", ".join(filter(None, (backbone.name, config.dataset_name)))}) + "\n")
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
