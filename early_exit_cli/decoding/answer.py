"""One answer: decoded to the end, as text and as counts."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request, Round
from early_exit_cli.drafting.drafter import Drafter
from early_exit_cli.drafting.reasons import Exit, Reason, decider
from early_exit_cli.engine import DEFAULT_WIDTH, Engine
from early_exit_cli.numerics import synchronize

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""How byte fallback names a byte."""


@dataclass(frozen=True)
class Stats:
    """Counts and times of one answer, named as formats of other programs name them."""

    mode: str
    total_tokens_generated: int
    total_time_seconds: float
    tokens_per_second: float
    time_to_first_token_seconds: float
    draft_attempts: int
    tokens_drafted: int
    tokens_accepted: int
    acceptance_rate: float | None
    average_draft_length: float | None
    accept_length: float
    partly_rejected_drafts: int
    exit_distribution: dict[str, int]
    average_exit_layer: float
    peak_gpu_memory_gb: float | None = None
    """The most that tensors have held on the GPU since this process began, 10^9 bytes; none on a CPU."""


@dataclass(frozen=True)
class Generation:
    """One answer. states: [tokens, hidden], the final state that decided each token, when they were kept."""

    text: str
    token_ids: list[int]
    stats: Stats
    rounds: list[Round]
    states: Tensor | None = None

    def record(self) -> dict[str, Any]:
        """The answer as JSON."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "stats": asdict(self.stats),
        }


class TextStream:
    """Token ids to text, piece by piece; never half a character, and the pieces joined are the final text.

    A piece is what a token adds to the text of the tokens of the piece before it. It waits while a character may be
    incomplete: where the text ends in U+FFFD, or in a byte token, since a decoder with byte fallback shows a run of
    bytes as a whole. Bytes that are no text become U+FFFD, as the tokenizer decodes them.
    """

    def __init__(self, engine: Engine) -> None:
        tokenizer = engine.backbone.tokenizer
        self.decoder, self.known = tokenizer.backend_tokenizer, len(tokenizer)
        added = self.decoder.get_added_tokens_decoder()
        self.silent = {number for number, token in added.items() if token.special}
        self.ids: list[int] = []
        self.text = ""
        self.window: list[int] = []
        """Tokens of the last piece, and of the one to come."""
        self.before = 0
        """How many of the window's tokens are of the last piece."""
        self.shown = ""
        """Their text."""

    def push(self, tokens: list[int]) -> str:
        """Text that became certain with these tokens."""
        self.ids += tokens
        pieces = [
            self._add(token) for token in tokens if token < self.known
        ]  # padded vocabularies hold rows without one
        self.text += "".join(pieces)
        return "".join(pieces)

    def _add(self, token: int) -> str:
        self.window.append(token)
        text = self._decoded(self.window)
        may_go_on = token in self.silent or text.endswith(REPLACEMENT) or BYTE_TOKEN.fullmatch(self._name(token))
        if may_go_on or len(text) <= len(self.shown):
            return ""
        piece = text[len(self.shown) :]
        self.window = self.window[self.before :]
        self.before, self.shown = len(self.window), self._decoded(self.window)
        return piece

    def finish(self) -> str:
        """What is left; a character whose bytes never became complete is dropped."""
        rest = self._decoded(self.window)[len(self.shown) :].rstrip(REPLACEMENT)
        self.text += rest
        return rest

    def _decoded(self, ids: list[int]) -> str:
        return self.decoder.decode(ids, skip_special_tokens=True)

    def _name(self, token: int) -> str:
        return self.decoder.id_to_token(token) or ""


def generate(
    engine: Engine,
    request: Request,
    drafter: Drafter,
    *,
    mode: str,
    width: int = DEFAULT_WIDTH,
    keep_states: bool = False,
    trace: bool = False,
    on_text: Callable[[str, str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Decode to the end, timed from before the prefill to after the last token.

    Args:
        width, keep_states, trace: as for `decode`.
        on_text: called with each piece of text as its token is committed, and with who decided that token (a character
            of several tokens belongs to the last one).
        on_token: called with each committed token.
    """
    stream = TextStream(engine)
    rounds: list[Round] = []
    first_token = 0.0
    synchronize(engine.backbone.device)
    reason: Reason | None = None
    steps = decode(engine, request, drafter, width=width, keep_states=keep_states, trace=trace)
    started = time.perf_counter()
    for step in steps:
        rounds.append(step)
        first_token = first_token or time.perf_counter() - started
        for token, reason in zip(step.tokens, step.decided_by, strict=True):
            piece = stream.push([token])
            if on_token:
                on_token(token)
            if on_text and piece:
                on_text(piece, decider(reason))
    synchronize(engine.backbone.device)
    seconds = time.perf_counter() - started
    rest = stream.finish()
    if on_text and rest:
        on_text(rest, decider(reason))
    states = torch.cat([step.states for step in rounds if step.states is not None]) if keep_states else None
    stats = collect_stats(engine, mode, rounds, seconds, first_token)
    return Generation(stream.text, stream.ids, stats, rounds, states)


def collect_stats(engine: Engine, mode: str, rounds: list[Round], seconds: float, first_token: float) -> Stats:
    """The one place where tokens, drafts and exits are counted; committed tokens only."""
    tokens = sum(len(step.tokens) for step in rounds)
    drafted = sum(step.drafted for step in rounds)
    accepted = sum(step.accepted for step in rounds)
    attempts = sum(step.drafted > 0 for step in rounds)
    reasons = [reason for step in rounds for reason in step.decided_by]
    distribution = {str(head): 0 for head in range(len(engine.heads) if engine.heads is not None else 0)}
    distribution["full"] = 0
    depth, device = engine.blocks.num_blocks, engine.backbone.device
    layers = 0
    for reason in reasons:
        name = "full" if reason is None else str(reason.head) if isinstance(reason, Exit) else reason.decider
        distribution[name] = distribution.get(name, 0) + 1
        layers += depth if reason is None else reason.exit_layer if isinstance(reason, Exit) else 0
    return Stats(
        mode=mode,
        total_tokens_generated=tokens,
        total_time_seconds=seconds,
        tokens_per_second=tokens / seconds,
        time_to_first_token_seconds=first_token,
        draft_attempts=attempts,
        tokens_drafted=drafted,
        tokens_accepted=accepted,
        acceptance_rate=accepted / drafted if drafted else None,
        average_draft_length=drafted / attempts if attempts else None,
        accept_length=tokens / len(rounds),
        partly_rejected_drafts=sum(0 < step.accepted < step.drafted for step in rounds),
        exit_distribution=distribution,
        average_exit_layer=layers / tokens,
        peak_gpu_memory_gb=None if device.type == "cpu" else torch.cuda.max_memory_allocated(device) / 1e9,
    )


def median_run(runs: list[Generation]) -> Generation:
    """The run whose speed is the (lower) median."""
    median = statistics.median_low(run.stats.tokens_per_second for run in runs)
    return next(run for run in runs if run.stats.tokens_per_second == median)
