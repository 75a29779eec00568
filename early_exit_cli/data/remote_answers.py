"""Prompts answered by an endpoint of the same model, many at once, and looked at by the backbone here.

An answer of another model teaches heads another text, and nothing else would notice. So a sample of the answers is
scored: by how much the backbone is more surprised by their tokens than by its own choices. Of its own answers that is
zero, of a greedy one exactly, of a sampled one on average: a token's mean surprise is then the entropy it was drawn from.
"""

from __future__ import annotations

import contextlib
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.output import logits_of
from early_exit_cli.config import DataConfig
from early_exit_cli.data.documents import Document, Progress
from early_exit_cli.data.endpoint import Endpoint, Said
from early_exit_cli.data.kept_answers import GROUP, read_answers
from early_exit_cli.errors import DataError, EexitWarning, shown
from early_exit_cli.files.atomic import sha256_of
from early_exit_cli.files.environment import kept_path
from early_exit_cli.files.kept import MADE_FROM

MODEL, SCORE = "endpoint_model", "score"
"""Keys of what stands in a file of answers besides them."""
SCORED = 16
"""Answers of the sample."""
LIKE_OWN, ANOTHERS = 0.25, 1.5
"""Excess in nats a token up to which answers count as the backbone's own, and above which they cannot be
(docs/decisions/0025)."""
ANCHOR = "\n"
"""Stands before an answer's text while it is tokenised, so that no beginning is added to it."""


@dataclass(frozen=True)
class Score:
    """Of a sample of answers, by the backbone here.

    excess: mean over tokens of its surprise, less what its own choice would have had, in nats. agreement: share of the greedy
    answers' tokens that it would choose; None without any. tokens: how many were looked at.
    """

    excess: float
    agreement: float | None
    tokens: int


def answers_of_endpoint(
    url: str, unanswered: list[Document], config: DataConfig, backbone: Backbone, progress: Progress | None = None
) -> list[Document]:
    """As `answer_prompts`. What is kept already is not asked for again, and where nothing is missing nobody is asked.

    The sample is answered first, so that another model is noticed before it has answered everything.

    Raises:
        DataError: the endpoint refuses, is out of reach, has another model than the answers so far are of, or its answers
            are not the backbone's.
    """
    known = {name: value for name, value in backbone.fingerprint.items() if name != "quantization"}
    settings = (config.answers_model, config.answer_tokens, config.sampled_share, config.temperature, config.data_seed)
    key = sha256_of(json.dumps([known, settings, [document.ids for document in unanswered]], sort_keys=True))
    path = kept_path("answers", f"{key[:24]}.jsonl")
    answers = read_answers(path, len(unanswered), backbone.vocab_size)
    notes = _notes(path)
    sample = random.Random(config.data_seed).sample(range(len(unanswered)), min(SCORED, len(unanswered)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file, Endpoint(url, config.answer_batch or GROUP) as endpoint:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        if len(answers) < len(unanswered):
            model = endpoint.model(config.answers_model, backbone.name)
            if notes.setdefault(MODEL, model) != model:
                raise DataError(
                    f"the answers so far are those of {shown(notes[MODEL])}, and {url} has {shown(model)}",
                    hint=f"--answers-model {model} begins anew",
                )
            if not file.tell():
                write({MADE_FROM: ", ".join(filter(None, (backbone.name, config.dataset_name))), MODEL: model})
        made = 0
        for part in (sample, range(len(unanswered))):
            missing = [index for index in part if index not in answers]
            for index, said in _answered(endpoint, str(notes.get(MODEL)), unanswered, missing, config):
                answers[index] = tokens_of(said, backbone, config.answer_tokens)
                write({"index": index, "answer": answers[index]})
                made += len(unanswered[index].ids) + len(answers[index])
                if progress:
                    progress(len(answers), len(unanswered), made)
            if part is sample and SCORE not in notes:
                found = score(
                    backbone,
                    [(unanswered[index].ids, answers[index], _temperature(config, index)) for index in sample],
                )
                judge(found, f"{shown(notes.get(MODEL))} at {url}", backbone)
                write({SCORE: asdict(found)})
    return [
        Document(document.ids + answers[index], document.source, len(document.ids))
        for index, document in enumerate(unanswered)
    ]


def _notes(path: Path) -> dict[str, Any]:
    """What stands in the file besides answers: the endpoint's model, and the score of the sample."""
    found: dict[str, Any] = {}
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    value = json.loads(line)
                    if isinstance(value, dict) and "index" not in value:
                        found |= value
    return found


def _temperature(config: DataConfig, index: int) -> float:
    """Of the answer to a prompt; 0 where it is greedy."""
    is_sampled = random.Random(f"{config.data_seed} {index}").random() < config.sampled_share
    return config.temperature if is_sampled else 0.0


def _answered(
    endpoint: Endpoint, model: str, unanswered: list[Document], indices: list[int], config: DataConfig
) -> Iterator[tuple[int, Said]]:
    """Answers as they come, as many requests at once as the endpoint has connections."""
    workers = ThreadPoolExecutor(config.answer_batch or GROUP)
    try:
        asked = {
            workers.submit(
                endpoint.complete,
                model,
                unanswered[index].ids,
                config.answer_tokens,
                _temperature(config, index),
                config.data_seed + index,
            ): index
            for index in indices
        }
        for done in as_completed(asked):
            yield asked[done], done.result()
    finally:
        workers.shutdown(wait=False, cancel_futures=True)


def tokens_of(said: Said, backbone: Backbone, most: int) -> list[int]:
    """An endpoint's answer as token ids, up to and with an end token, as an answer made here.

    Raises:
        DataError: a token that the backbone has no embedding of.
    """
    ends = backbone.eos_token_ids
    ids = said.token_ids if said.token_ids is not None else _tokenised(backbone.tokenizer, said.text)
    ids = ids[: next((place + 1 for place, token in enumerate(ids) if token in ends), None)]
    if said.ended and ends and (not ids or ids[-1] not in ends):
        likely = (said.end_token, backbone.tokenizer.eos_token_id, min(ends))
        ids = [*ids, next(token for token in likely if token in ends)]
    fault = backbone.unknown_token(ids)
    if fault is not None:
        raise DataError(f"an answer of the endpoint holds {fault}", hint="it must be the same model as the backbone")
    return ids[:most]


def _tokenised(tokenizer: Any, text: str) -> list[int]:
    """A text that goes on where another stopped: without what a tokenizer puts before a beginning."""
    anchor, ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (ANCHOR, ANCHOR + text))
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def score(backbone: Backbone, answers: Sequence[tuple[list[int], list[int], float]]) -> Score:
    """How far answers are from being the backbone's own.

    Args:
        answers: of each, its prompt, its tokens, and its temperature, 0 where it is greedy. An end token is not looked at:
            it may have been added here.
    """
    excess: list[Tensor] = []
    agreed: list[Tensor] = []
    with torch.inference_mode():
        for prompt, answer, temperature in answers:
            tokens = answer[:-1] if answer and answer[-1] in backbone.eos_token_ids else answer
            if not tokens:
                continue
            ids = torch.tensor([prompt + tokens], device=backbone.device)
            states = backbone.hidden_states_at(ids, torch.ones_like(ids), [])[-1][0, len(prompt) - 1 : -1]
            chosen = ids[0, len(prompt) :, None]
            scores = (logits_of(backbone, states).float() / (temperature or 1.0)).log_softmax(-1)
            surprise = -scores.gather(-1, chosen)[:, 0]
            if temperature:
                excess.append((surprise + (scores.exp() * scores).sum(-1)).cpu())
            else:
                excess.append((surprise + scores.amax(-1)).cpu())
                agreed.append((scores.argmax(-1) == chosen[:, 0]).float().cpu())
    if not excess:
        return Score(0.0, None, 0)
    every = torch.cat(excess)
    return Score(float(every.mean()), float(torch.cat(agreed).mean()) if agreed else None, every.numel())


def judge(found: Score, who: str, backbone: Backbone) -> None:
    """Warn of answers that are hardly the backbone's, refuse those that are not.

    Raises:
        DataError
    """
    if found.excess <= LIKE_OWN:
        return
    agreement = "" if found.agreement is None else f"; it would choose {found.agreement:.0%} of the greedy ones' tokens"
    told = (
        f"the answers of {who} surprise {backbone.name} by {found.excess:.2f} nats a token more than its own would "
        f"({found.tokens:,} tokens of a sample{agreement})"
    )
    if found.excess > ANOTHERS:
        raise DataError(f"{told}: they are another model's", hint="serve the backbone itself there, or --answers-model")
    warnings.warn(f"{told}: is it the same model, in the same precision?", EexitWarning, stacklevel=2)
