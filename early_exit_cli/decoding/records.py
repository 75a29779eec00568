"""Rounds and tokens as JSON: for traces, the page of `--html`, and `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from early_exit_cli.decoding.answer import Generation
from early_exit_cli.decoding.head_trace import TracedHead
from early_exit_cli.decoding.text import Round
from early_exit_cli.drafting.reasons import Exit, Reason, decider
from early_exit_cli.engine import Engine


def round_records(engine: Engine, generation: Generation, prompt_length: int) -> list[dict[str, Any]]:
    """A record per round: the committed tokens, how many of them were drafted, and the drafted ones that were not taken.

    A committed token's `text` is what became certain with it: joined, they are the text of the answer.
    """
    records: list[dict[str, Any]] = []
    position = prompt_length
    for step in generation.rounds:
        records.append(round_record(engine, step, position))
        position += len(step.tokens)
    certain = sum(len(piece) for step in generation.rounds for piece in step.pieces)
    records[-1]["tokens"][-1]["text"] += generation.text[certain:]
    return records


def round_record(engine: Engine, step: Round, position: int) -> dict[str, Any]:
    """A round of a text with a stream; its first token stands at `position`."""
    tokens = []
    views = step.traced or [[]] * len(step.tokens)
    committed = zip(step.tokens, step.pieces, step.decided_by, views, strict=True)
    for place, (token, piece, reason, traced) in enumerate(committed):
        record = token_record(engine, token, reason, traced)
        tokens.append({"position": position + place, **record, "text": piece})
    rejected = [token_record(engine, token, reason, []) for token, reason in step.rejected]
    return {"accepted": step.accepted, "tokens": tokens, "rejected": rejected}


def token_record(engine: Engine, token: int, reason: Reason | None, traced: list[TracedHead]) -> dict[str, Any]:
    """Who decided a token after how many blocks, how sure, and what every head would have said (when traced)."""

    def text(token_id: int) -> str:
        return engine.backbone.tokenizer.decode([token_id])

    known: dict[str, Any] = {} if reason is None else asdict(reason)
    if known.get("threshold") == float("inf"):  # no gate, and no number in JSON
        known["threshold"] = None
    return {
        "token_id": token,
        "token_text": text(token),
        "decided_by": "head" if isinstance(reason, Exit) else decider(reason),
        "exit_layer": engine.blocks.num_blocks if reason is None else 0,
        "head": None,
        "entropy": None,
        "threshold": None,
        **known,
        "heads": [{**asdict(reading), "token_text": text(reading.token_id)} for reading in traced],
    }


def trace_records(engine: Engine, generation: Generation, prompt_length: int) -> list[dict[str, Any]]:
    """A record per committed token."""
    return [token for step in round_records(engine, generation, prompt_length) for token in step["tokens"]]
