"""Rounds and tokens as JSON: for traces, the page of `--html`, and `--json`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from early_exit_cli.decoding.answer import Generation
from early_exit_cli.decoding.head_trace import TracedHead
from early_exit_cli.decoding.text import Round
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.reasons import Exit, Reason, decider
from early_exit_cli.engine import Engine


def round_records(engine: Engine, generation: Generation, prompt_length: int) -> list[dict[str, Any]]:
    """A record per round: the committed tokens, how many of them were drafted, and the drafted ones that were not taken.

    A committed token's `text` is what became certain with it: joined, they are the text of the answer.
    """
    stream = TextStream(engine, generation.stop)
    records: list[dict[str, Any]] = []
    position = prompt_length
    for step in generation.rounds:
        records.append(round_record(engine, stream, step, position))
        position += len(step.tokens)
    records[-1]["tokens"][-1]["text"] += stream.finish()
    return records


def round_record(engine: Engine, stream: TextStream, step: Round, position: int) -> dict[str, Any]:
    """A round whose first token stands at `position`; `stream` has the answer's tokens before it, and then its own."""
    tokens = []
    views = step.traced or [[]] * len(step.tokens)
    for place, (token, reason, traced) in enumerate(zip(step.tokens, step.decided_by, views, strict=True)):
        record = token_record(engine, token, reason, traced)
        tokens.append({"position": position + place, **record, "text": stream.push([token])})
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
