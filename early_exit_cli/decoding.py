"""The one decoding loop: draft, verify, accept, roll back, stop. Plain decoding is the loop with `NoDrafter`.

State between rounds: the KV cache holds all committed tokens but the newest, which is `pending`. A round asks the
drafter for tokens after `pending`, runs what is left of the blocks over pending and draft in one pass, and commits the
longest prefix of the draft that equals the backbone's own choices, greedy or sampled (`sampling.Chooser`), then its next
choice (the bonus token). Rolling back is `cache.length`. One text at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from early_exit_cli.blocks import LARGEST_WIDTH, KVCache
from early_exit_cli.drafters import Draft, Drafter, Exit, Reason, Row, catch_up, decider, show
from early_exit_cli.engine import Engine, synchronize
from early_exit_cli.errors import ConfigError
from early_exit_cli.head_views import HeadReading, HeadViews
from early_exit_cli.sampling import GREEDY, Chooser

DEFAULT_WIDTH = 8
REPLACEMENT = "\ufffd"
StopsAfter = Callable[[int], bool]
"""Asked once for every committed token, in order: does the text end with it?"""


@dataclass(frozen=True)
class Round:
    """One verify step.

    tokens: committed, the first `accepted` of them drafted. decided_by: why each was drafted, None where
    the backbone decided. drafted: how many were proposed. states: [len(tokens), hidden], the final normed state that
    decided each token, when asked for. readings: every head's view of each committed token, when traced. rejected: the
    proposals from the first one on that the backbone did not choose, and why each was made.
    """

    tokens: list[int]
    accepted: int
    drafted: int
    decided_by: list[Reason | None]
    states: Tensor | None = None
    readings: list[list[HeadReading]] = field(default_factory=list)
    rejected: list[tuple[int, Reason | None]] = field(default_factory=list)


def default_width(model: Engine) -> int:
    """Rows of a verifying pass when nobody asks for another number: 8, or the largest invariant width below."""
    return min(DEFAULT_WIDTH, model.blocks.widths[-1])


def accepted_length(draft: list[int], choices: list[int]) -> int:
    """Length of the longest prefix of the draft that equals the backbone's choices."""
    length = 0
    while length < min(len(draft), len(choices)) and draft[length] == choices[length]:
        length += 1
    return length


def cut_at_stop(
    tokens: list[int], stop_ids: Container[int], remaining: int, stops_after: StopsAfter | None = None
) -> tuple[list[int], bool]:
    """The stop rule: up to and with the first stop token or the first one that `stops_after` ends the text after, at
    most `remaining`; and whether the text ends here."""
    tokens = tokens[:remaining]
    for place, token in enumerate(tokens):
        asked = stops_after is not None and stops_after(token)
        if asked or token in stop_ids:
            return tokens[: place + 1], True
    return tokens, len(tokens) == remaining


def decode(
    model: Engine,
    prompt_ids: list[int],
    drafter: Drafter,
    max_new_tokens: int,
    *,
    width: int = DEFAULT_WIDTH,
    chooser: Chooser = GREEDY,
    stop_ids: Container[int] | None = None,
    stops_after: StopsAfter | None = None,
    keep_states: bool = False,
    trace: bool = False,
) -> Iterator[Round]:
    """Decode, a Round at a time.

    Args:
        chooser: how the backbone's choices follow from its logits.
        width: rows of a verifying pass, at most LARGEST_WIDTH; at most width - 1 tokens are drafted.
        stop_ids: tokens that end the text; the backbone's by default.
        stops_after: a further rule that ends it.

    Raises:
        ConfigError: empty prompt, beyond the context, width out of range.
        NumericsError: the backbone's logits are not finite.
    """
    width = checked_width(model, width)
    text = Text(model, prompt_ids, drafter, chooser, max_new_tokens, stop_ids, stops_after, trace)
    while not text.ended:
        started = time.perf_counter()
        with torch.inference_mode():
            draft = text.draft(width - 1)
            deep, states, choices, readings = verify(model, text, draft)
        decided = text.commit(draft, deep, states, choices, readings, keep_states)
        drafter.timed(draft, (time.perf_counter() - started) * 1000)
        yield decided


def checked_width(model: Engine, width: int) -> int:
    """A width that was asked for, cut to what the device has.

    Raises:
        ConfigError: out of range.
    """
    if not 1 <= width <= LARGEST_WIDTH:
        raise ConfigError(f"width {width} is out of range", hint=f"--width takes 2 to {LARGEST_WIDTH}")
    return min(width, model.blocks.widths[-1])


class Text:
    """One text being decoded: what is committed, and who drafts and chooses for it.

    Args:
        trace: read every head for each token.

    Raises:
        ConfigError: empty prompt, or beyond the context.
    """

    def __init__(
        self,
        model: Engine,
        prompt_ids: list[int],
        drafter: Drafter,
        chooser: Chooser,
        max_new_tokens: int,
        stop_ids: Container[int] | None = None,
        stops_after: StopsAfter | None = None,
        trace: bool = False,
    ) -> None:
        self.model, self.drafter, self.chooser = model, drafter, chooser
        self.stops = model.backbone.eos_token_ids if stop_ids is None else stop_ids
        self.stops_after = stops_after
        self.remaining = max_new_tokens
        self.ended = False
        self.pending = prompt_ids[-1] if prompt_ids else 0
        with torch.inference_mode():
            chooser.begin(model.backbone.vocab_size, prompt_ids)
            drafter.meet(model)
            drafter.begin(prompt_ids, chooser)
            self.views = HeadViews(model, model.heads) if trace and model.heads is not None else None
            self.exit_layers = sorted({*drafter.exit_layers, *(self.views.exit_layers if self.views else ())})
            see = self.see if self.exit_layers else None
            self.cache = model.start(prompt_ids, max_new_tokens, self.exit_layers, see)

    def see(self, tokens: list[int], states: list[Tensor]) -> None:
        """Show verified positions to those who look: states after `exit_layers` and the final normed one (`Drafter.see`)."""
        show(self.drafter, tokens, self.exit_layers, states)
        if self.views:
            self.views.see(self.exit_layers, states)

    def draft(self, limit: int) -> Draft:
        """Ask for at most `limit` tokens, and never for what the text has no room for."""
        limit = min(limit, self.remaining - 1)
        return self.drafter.propose(self.model, self.cache, self.pending, limit, self.stops)

    def commit(
        self,
        draft: Draft,
        deep: list[Tensor],
        states: Tensor,
        choices: list[int],
        readings: list[list[HeadReading]],
        keep_states: bool,
    ) -> Round:
        """Take over the drafted tokens that the backbone chose too, and its own next one; see `verify`."""
        matched = accepted_length(draft.tokens, choices)
        tokens, self.ended = cut_at_stop(choices[: matched + 1], self.stops, self.remaining, self.stops_after)
        accepted = min(matched, len(tokens))
        self.cache.length += len(tokens)
        self.pending = tokens[-1]
        self.remaining -= len(tokens)
        self.chooser.commit(tokens)
        self.drafter.observe(draft, tokens, accepted)
        if deep:
            self.see(tokens, [state[: len(tokens)] for state in (*deep, states)])
        return Round(
            tokens=tokens,
            accepted=accepted,
            drafted=len(draft.tokens),
            decided_by=[*draft.reasons[:accepted], *[None] * (len(tokens) - len(draft.reasons[:accepted]))],
            states=states[: len(tokens)].clone() if keep_states else None,
            readings=readings[: len(tokens)],
            rejected=list(zip_longest(draft.tokens[matched:], draft.reasons[matched:])),
        )


def verify(model: Engine, text: Text, draft: Draft) -> tuple[list[Tensor], Tensor, list[int], list[list[HeadReading]]]:
    """Run what is left of the blocks over the pending token and the draft, and keep the states that are looked at.

    Returns:
        (states after each of the text's exit layers [rows, hidden], final normed states [rows, hidden], the backbone's
        choice after each row, up to the first that the draft lacks at least, head readings per row when traced).
    """
    cache, exit_layers, depth = text.cache, text.exit_layers, model.blocks.num_blocks
    readings: list[list[HeadReading]] = []
    if text.views or draft.rows:
        rows = draft.rows
        if text.views:  # it needs every row at every exit layer, also where drafting did not stop
            rows = [{0: hidden} for hidden in model.embed([text.pending, *draft.tokens]).split(1)]
            readings = text.views.read(cache, rows, exit_layers)
        *deep, hidden = states_after(model, cache, rows, [*exit_layers, depth])
    else:
        *deep, hidden = model.run_tokens([text.pending, *draft.tokens], cache, cache.length, [*exit_layers, depth])
    states, said = model.read_out(hidden) if text.chooser.reads_logits else model.finish(hidden)
    return deep, states, text.chooser.choose(said, draft.tokens), readings


def states_after(model: Engine, cache: KVCache, rows: list[Row], layers: Sequence[int]) -> list[Tensor]:
    """Bring rows, some of which have run already, to each of `layers` in turn: their states there, [rows, hidden] each."""
    found = []
    for layer in layers:
        catch_up(model, cache, rows, layer)
        found.append(torch.cat([row[layer] for row in rows]))
    return found


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
    """Token ids to text, piece by piece; never half a character, and the pieces joined are the final text."""

    def __init__(self, model: Engine) -> None:
        self.tokenizer = model.backbone.tokenizer
        self.known = len(self.tokenizer)
        self.stream = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.text = ""

    def push(self, tokens: list[int]) -> str:
        """Text that became certain with these tokens."""
        pieces = []
        for token in tokens:
            self.ids.append(token)
            if token < self.known:  # padded vocabularies hold rows without a token
                pieces.append(self.stream.step(self.tokenizer.backend_tokenizer, token) or "")
        piece = "".join(pieces)
        self.text += piece
        return piece

    def finish(self) -> str:
        """What is left; a character whose bytes never became complete is dropped."""
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        rest = whole[len(self.text) :].rstrip(REPLACEMENT) if whole.startswith(self.text) else ""
        self.text += rest
        return rest


def generate(
    model: Engine,
    prompt_ids: list[int],
    drafter: Drafter,
    max_new_tokens: int,
    *,
    mode: str,
    width: int = DEFAULT_WIDTH,
    chooser: Chooser = GREEDY,
    stop_ids: Container[int] | None = None,
    stops_after: StopsAfter | None = None,
    keep_states: bool = False,
    trace: bool = False,
    on_text: Callable[[str, str], None] | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Decode to the end, timed from before the prompt is run to after the last token.

    Args:
        stop_ids, stops_after: as for `decode`.
        on_text: called with each piece of text as its token is committed, and with who decided that token (a character
            of several tokens belongs to the last one).
        on_token: called with each committed token.
    """
    stream = TextStream(model)
    rounds: list[Round] = []
    first_token = 0.0
    synchronize(model.backbone.device)
    reason: Reason | None = None
    steps = decode(
        model,
        prompt_ids,
        drafter,
        max_new_tokens,
        width=width,
        chooser=chooser,
        stop_ids=stop_ids,
        stops_after=stops_after,
        keep_states=keep_states,
        trace=trace,
    )
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
    synchronize(model.backbone.device)
    seconds = time.perf_counter() - started
    rest = stream.finish()
    if on_text and rest:
        on_text(rest, decider(reason))
    states = torch.cat([step.states for step in rounds if step.states is not None]) if keep_states else None
    stats = collect_stats(model, mode, rounds, seconds, first_token)
    return Generation(stream.text, stream.ids, stats, rounds, states)


def collect_stats(model: Engine, mode: str, rounds: list[Round], seconds: float, first_token: float) -> Stats:
    """The one place where tokens, drafts and exits are counted; committed tokens only."""
    tokens = sum(len(step.tokens) for step in rounds)
    drafted = sum(step.drafted for step in rounds)
    accepted = sum(step.accepted for step in rounds)
    attempts = sum(step.drafted > 0 for step in rounds)
    reasons = [reason for step in rounds for reason in step.decided_by]
    distribution = {str(head): 0 for head in range(len(model.heads) if model.heads is not None else 0)}
    distribution["full"] = 0
    depth, device = model.blocks.num_blocks, model.backbone.device
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


def round_records(model: Engine, generation: Generation, prompt_length: int) -> list[dict[str, Any]]:
    """A record per round: the committed tokens, how many of them were drafted, and the drafted ones that were not taken.

    A committed token's `text` is what became certain with it: joined, they are the text of the answer.
    """
    stream = TextStream(model)
    records: list[dict[str, Any]] = []
    position = prompt_length
    for step in generation.rounds:
        tokens = []
        views = step.readings or [[]] * len(step.tokens)
        for token, reason, readings in zip(step.tokens, step.decided_by, views, strict=True):
            record = token_record(model, token, reason, readings)
            tokens.append({"position": position, **record, "text": stream.push([token])})
            position += 1
        rejected = [token_record(model, token, reason, []) for token, reason in step.rejected]
        records.append({"accepted": step.accepted, "tokens": tokens, "rejected": rejected})
    records[-1]["tokens"][-1]["text"] += stream.finish()
    return records


def token_record(model: Engine, token: int, reason: Reason | None, readings: list[HeadReading]) -> dict[str, Any]:
    """Who decided a token after how many blocks, how sure, and what every head would have said (when traced)."""

    def text(token_id: int) -> str:
        return model.backbone.tokenizer.decode([token_id])

    known: dict[str, Any] = {} if reason is None else asdict(reason)
    if known.get("threshold") == float("inf"):  # no gate, and no number in JSON
        known["threshold"] = None
    return {
        "token_id": token,
        "token_text": text(token),
        "decided_by": "head" if isinstance(reason, Exit) else decider(reason),
        "exit_layer": model.blocks.num_blocks if reason is None else 0,
        "head": None,
        "entropy": None,
        "threshold": None,
        **known,
        "heads": [{**asdict(reading), "token_text": text(reading.token_id)} for reading in readings],
    }


def trace_records(model: Engine, generation: Generation, prompt_length: int) -> list[dict[str, Any]]:
    """A record per committed token."""
    return [token for step in round_records(model, generation, prompt_length) for token in step["tokens"]]
