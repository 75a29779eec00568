"""One answer: decoded to the end, as text and as counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import FinishReason, Request, Round
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.drafter import Drafter
from early_exit_cli.drafting.reasons import Exit, Reason, decider
from early_exit_cli.engine import DEFAULT_WIDTH, Engine
from early_exit_cli.numerics import synchronize


@dataclass(frozen=True)
class Stats:
    """Counts and times of one answer, named as formats of other programs name them."""

    mode: str
    prompt_tokens: int
    total_tokens_generated: int
    total_time_seconds: float
    tokens_per_second: float
    time_to_first_token_seconds: float
    prefill_tokens_per_second: float | None
    """Tokens of the prompt over the time to the first token; none of a text that waited for others."""
    decode_tokens_per_second: float | None
    """Tokens after the first round over the time after it; none where nothing came after it."""
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

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ends; None of one that was interrupted."""
        return self.rounds[-1].finish_reason

    def record(self) -> dict[str, Any]:
        """The answer as JSON."""
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stats": asdict(self.stats),
        }


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of an answer: what there is of it."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self.generation = generation


def generate(
    engine: Engine,
    request: Request,
    drafter: Drafter,
    *,
    mode: str,
    width: int = DEFAULT_WIDTH,
    keep_states: bool = False,
    trace: bool = False,
    prefixes: Prefixes | None = None,
    on_text: Callable[[str, str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Decode to the end, timed from before the prefill to after the last token.

    Args:
        width, keep_states, trace, prefixes: as for `decode`.
        on_text: called with each piece of text as its token is committed, and with who decided that token (a character
            of several tokens belongs to the last one).
        on_token: called with each committed token.

    Raises:
        Interrupted: Ctrl-C after the first token.
    """
    stream = TextStream(engine, request.stop)
    rounds: list[Round] = []
    first_token = 0.0
    synchronize(engine.backbone.device)
    reason: Reason | None = None
    steps = decode(
        engine,
        request,
        drafter,
        width=width,
        keep_states=keep_states,
        trace=trace,
        prefixes=prefixes,
        stream=stream,
    )
    started = time.perf_counter()
    interrupted = False
    try:
        for step in steps:
            rounds.append(step)
            first_token = first_token or time.perf_counter() - started
            for token, piece, reason in zip(step.tokens, step.pieces, step.decided_by, strict=True):
                if on_token:
                    on_token(token)
                if on_text and piece:
                    on_text(piece, decider(reason))
    except KeyboardInterrupt:
        if not rounds:
            raise
        interrupted = True
    finally:
        steps.close()
    synchronize(engine.backbone.device)
    seconds = time.perf_counter() - started
    ids = [token for step in rounds for token in step.tokens]
    rest = stream.finish() if len(stream.ids) == len(ids) else ""  # it is ahead where Ctrl-C came inside a commit
    if on_text and rest:
        on_text(rest, decider(reason))
    text = "".join(piece for step in rounds for piece in step.pieces) + rest
    states = torch.cat([step.states for step in rounds if step.states is not None]) if keep_states else None
    stats = collect_stats(engine, mode, rounds, len(request.prompt_ids), seconds, first_token)
    answer = Generation(text, ids, stats, rounds, states)
    if interrupted:
        raise Interrupted(answer)
    return answer


def collect_stats(
    engine: Engine,
    mode: str,
    rounds: list[Round],
    prompt_tokens: int,
    seconds: float,
    first_token: float,
    waited: bool = False,
) -> Stats:
    """The one place where tokens, drafts and exits are counted; committed tokens only.

    Args:
        first_token: seconds until the first round was over. waited: they hold the time of other texts.
    """
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
    later = tokens - len(rounds[0].tokens)
    return Stats(
        mode=mode,
        prompt_tokens=prompt_tokens,
        total_tokens_generated=tokens,
        total_time_seconds=seconds,
        tokens_per_second=tokens / seconds,
        time_to_first_token_seconds=first_token,
        prefill_tokens_per_second=None if waited or not first_token else prompt_tokens / first_token,
        decode_tokens_per_second=later / (seconds - first_token) if later else None,
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


def plain_seconds(rounds: Sequence[Round], first_seconds: float, a_pass: float) -> float:
    """What plain decoding would have taken for an answer: as long up to the end of its first round, then a pass a token."""
    return first_seconds + a_pass * sum(len(step.tokens) for step in rounds[1:])


def median_run(runs: list[Generation]) -> Generation:
    """The run whose speed is the (lower) median."""
    median = statistics.median_low(run.stats.tokens_per_second for run in runs)
    return next(run for run in runs if run.stats.tokens_per_second == median)
