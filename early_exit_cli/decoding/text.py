"""One text being decoded: what was asked for, what is committed, and how a verified draft is taken over.

State between rounds: the KV cache holds all committed tokens but the newest, which is `pending`. A round commits the
longest prefix of the draft that equals the backbone's own choices, then its next choice (the bonus token). Rolling back
is `cache.length`.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from early_exit_cli.decoding.head_trace import HeadViews, TracedHead
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.drafter import Draft, Drafter, show
from early_exit_cli.drafting.reasons import Reason
from early_exit_cli.engine import Engine, Prefill
from early_exit_cli.runtime.prefix import FINAL, Prefix, kept_of
from early_exit_cli.sampling import GREEDY, Chooser

FinishReason = Literal["stop", "length"]
"""Why a text ends: with a stop token or a rule, or at its limit."""
StopsAfter = Callable[[int], bool]
"""Asked once for every committed token, in order: does the text end with it?"""


@dataclass(frozen=True)
class Request:
    """One text to be decoded.

    prompt_ids: token ids, at least one. max_new_tokens: the limit. chooser: how the backbone's choices follow from its
    logits; it holds the text's state, so a request has one of its own unless it is greedy. stop_ids: tokens that end
    the text; the backbone's by default. stop: texts that end it; the answer goes up to the first. stops_after: a further
    rule that ends it.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    chooser: Chooser = GREEDY
    stop_ids: Container[int] | None = None
    stop: tuple[str, ...] = ()
    stops_after: StopsAfter | None = None


@dataclass(frozen=True)
class Verified:
    """What a verifying pass found for the rows of one text: the pending token and its draft.

    deep: states after each of the text's exit layers, [rows, hidden] each. states: the final normed ones, [rows, hidden].
    choices: the backbone's token after each row, at least up to the first that the draft lacks. traced: what every head
    says of each row, when traced.
    """

    deep: list[Tensor]
    states: Tensor
    choices: list[int]
    traced: list[list[TracedHead]] = field(default_factory=list)


@dataclass(frozen=True)
class Round:
    """One verify step.

    tokens: committed, the first `accepted` of them drafted. drafted: how many were proposed. decided_by: why each token
    was drafted, None where the backbone decided. states: [len(tokens), hidden], the final normed state that decided each
    token, when asked for. traced: what every head says of each committed token, when traced. rejected: the proposals
    from the first one on that the backbone did not choose, and why each was made. finish_reason: of the last round.
    pieces: the text that became certain with each token, where the text has a stream.
    """

    tokens: list[int]
    accepted: int
    drafted: int
    decided_by: list[Reason | None]
    states: Tensor | None = None
    traced: list[list[TracedHead]] = field(default_factory=list)
    rejected: list[tuple[int, Reason | None]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    pieces: list[str] = field(default_factory=list)


class Text:
    """One text being decoded, once its prefill is finished.

    Args:
        trace: read every head for each token.
        prefixes: of earlier texts; `prefix` leaves what is here to later ones.
        stream: turns the tokens into text as they are committed; one of the request's `stop` is made where none is given.

    Raises:
        ConfigError: empty prompt, or beyond the context.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        drafter: Drafter,
        trace: bool = False,
        prefixes: Prefixes | None = None,
        stream: TextStream | None = None,
    ) -> None:
        self.engine, self.drafter, self.chooser = engine, drafter, request.chooser
        self.stops = engine.backbone.eos_token_ids if request.stop_ids is None else request.stop_ids
        self.stops_after = request.stops_after
        self.stream = stream or (TextStream(engine, request.stop) if request.stop else None)
        self.pieces: list[str] = []
        """Of the round that is being committed."""
        self.remaining = request.max_new_tokens
        self.finish_reason: FinishReason | None = None
        prompt_ids = request.prompt_ids
        self.tokens, self.prompt_tokens = list(prompt_ids), len(prompt_ids)
        self.seen: list[list[Tensor]] | None = None if prefixes is None else []
        """States of all positions, in the pieces in which they came, to be left to later texts."""
        self.pending = prompt_ids[-1] if prompt_ids else 0
        with torch.inference_mode():
            self.chooser.begin(engine.backbone.vocab_size, prompt_ids)
            drafter.bind(engine)
            drafter.begin(prompt_ids, self.chooser)
            self.views = HeadViews(engine, engine.heads) if trace and engine.heads is not None else None
            self.exit_layers = sorted({*drafter.exit_layers, *(self.views.exit_layers if self.views else ())})
            on_states = self.process if self.exit_layers else None
            known = (None, 0) if prefixes is None else prefixes.best(engine, prompt_ids, self.exit_layers)
            self.prefill = Prefill(engine, prompt_ids, request.max_new_tokens, self.exit_layers, on_states, *known)
            """To be finished before the first round."""
            self.cache = self.prefill.cache

    @property
    def ended(self) -> bool:
        """Whether the last round was the text's last."""
        return self.finish_reason is not None

    def process(self, tokens: list[int], states: list[Tensor]) -> None:
        """Show verified positions to those who look: states after `exit_layers`, and the final normed one."""
        if self.seen is not None:
            self.seen.append(states)
        show(self.drafter, tokens, self.exit_layers, states)
        if self.views:
            self.views.process(self.exit_layers, states)

    def draft(self, limit: int) -> Draft:
        """At most `limit` tokens of the drafter, and never more than the text has room for."""
        limit = min(limit, self.remaining - 1)
        return self.drafter.draft(self.engine, self.cache, self.pending, limit, self.stops)

    def commit(self, draft: Draft, verified: Verified, keep_states: bool) -> Round:
        """Take over the drafted tokens that the backbone chose too, and its own next one."""
        matched = accepted_length(draft.tokens, verified.choices)
        choices, self.pieces = verified.choices[: matched + 1], []
        tokens, self.finish_reason = cut_at_stop(choices, self.stops, self.remaining, self._ends_with)
        count, accepted = len(tokens), min(matched, len(tokens))
        self.cache.length += count
        self.tokens += tokens
        self.pending = tokens[-1]
        self.remaining -= count
        self.chooser.commit(tokens)
        self.drafter.accept(draft, tokens, accepted)
        if verified.deep:
            self.process(tokens, [state[:count] for state in (*verified.deep, verified.states)])
        return Round(
            tokens=tokens,
            accepted=accepted,
            drafted=len(draft.tokens),
            decided_by=[*draft.reasons[:accepted], *[None] * (count - len(draft.reasons[:accepted]))],
            states=verified.states[:count].clone() if keep_states else None,
            traced=verified.traced[:count],
            rejected=list(zip_longest(draft.tokens[matched:], draft.reasons[matched:])),
            finish_reason=self.finish_reason,
            pieces=self.pieces,
        )

    def _ends_with(self, token: int) -> bool:
        """Whether the request's rule, or a text to stop at, ends the text with a further token; it is text from now on."""
        asked = self.stops_after is not None and self.stops_after(token)
        if self.stream is None:
            return asked
        self.pieces.append(self.stream.push([token]))
        return asked or self.stream.stopped

    def leave_to(self, prefixes: Prefixes) -> None:
        """Leave `prefix` to later texts. Where there is no memory for a copy, all that earlier ones left is forgotten instead."""
        try:
            with torch.inference_mode():
                prefixes.keep(self.prefix())
        except (MemoryError, torch.OutOfMemoryError):
            prefixes.clear()

    def prefix(self) -> Prefix:
        """What a later text that begins like this one need not compute again."""
        length = self.cache.length
        states: dict[int, Tensor] = {}
        if self.seen:
            layers = (*self.exit_layers, FINAL)
            states = {
                layer: torch.cat(pieces) for layer, pieces in zip(layers, zip(*self.seen, strict=True), strict=True)
            }
            length = min(length, len(states[FINAL]))  # less only where it was interrupted in between
        return kept_of(self.cache, self.tokens[:length], self.prompt_tokens - 1, states)


def accepted_length(draft: list[int], choices: list[int]) -> int:
    """Length of the longest prefix of the draft that equals the backbone's choices."""
    length = 0
    while length < min(len(draft), len(choices)) and draft[length] == choices[length]:
        length += 1
    return length


def cut_at_stop(
    tokens: list[int], stop_ids: Container[int], remaining: int, stops_after: StopsAfter | None = None
) -> tuple[list[int], FinishReason | None]:
    """The stop rule: up to and with the first stop token or the first one that `stops_after` ends the text after, at
    most `remaining`; and why the text ends here, if it does."""
    tokens = tokens[:remaining]
    for place, token in enumerate(tokens):
        asked = stops_after is not None and stops_after(token)
        if asked or token in stop_ids:
            return tokens[: place + 1], "stop"
    return tokens, "length" if len(tokens) == remaining else None
