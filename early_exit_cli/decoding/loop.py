"""The one decoding loop: draft, verify, accept, roll back, stop. Plain decoding is the loop with `NoDrafter`.

State between rounds: the KV cache holds all committed tokens but the newest, which is `pending`. A round asks the
drafter for tokens after `pending`, runs what is left of the blocks over pending and draft in one pass, and commits the
longest prefix of the draft that equals the backbone's own choices, greedy or sampled (`sampling.Chooser`), then its next
choice (the bonus token). Rolling back is `cache.length`. One text at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from early_exit_cli.decoding.head_trace import HeadViews, TracedHead
from early_exit_cli.drafting.drafter import Draft, Drafter, Row, catch_up, show
from early_exit_cli.drafting.reasons import Reason
from early_exit_cli.engine import DEFAULT_WIDTH, Engine, checked_width
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.sampling import GREEDY, Chooser

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
    traced: list[list[TracedHead]] = field(default_factory=list)
    rejected: list[tuple[int, Reason | None]] = field(default_factory=list)


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
    engine: Engine,
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
    width = checked_width(engine, width)
    text = Text(engine, prompt_ids, drafter, chooser, max_new_tokens, stop_ids, stops_after, trace)
    while not text.ended:
        started = time.perf_counter()
        with torch.inference_mode():
            draft = text.draft(width - 1)
            deep, states, choices, traced = verify(engine, text, draft)
        decided = text.commit(draft, deep, states, choices, traced, keep_states)
        drafter.timed(draft, (time.perf_counter() - started) * 1000)
        yield decided


class Text:
    """One text being decoded: what is committed, and who drafts and chooses for it.

    Args:
        trace: read every head for each token.

    Raises:
        ConfigError: empty prompt, or beyond the context.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_ids: list[int],
        drafter: Drafter,
        chooser: Chooser,
        max_new_tokens: int,
        stop_ids: Container[int] | None = None,
        stops_after: StopsAfter | None = None,
        trace: bool = False,
    ) -> None:
        self.engine, self.drafter, self.chooser = engine, drafter, chooser
        self.stops = engine.backbone.eos_token_ids if stop_ids is None else stop_ids
        self.stops_after = stops_after
        self.remaining = max_new_tokens
        self.ended = False
        self.pending = prompt_ids[-1] if prompt_ids else 0
        with torch.inference_mode():
            chooser.begin(engine.backbone.vocab_size, prompt_ids)
            drafter.bind(engine)
            drafter.begin(prompt_ids, chooser)
            self.views = HeadViews(engine, engine.heads) if trace and engine.heads is not None else None
            self.exit_layers = sorted({*drafter.exit_layers, *(self.views.exit_layers if self.views else ())})
            on_states = self.process if self.exit_layers else None
            self.cache = engine.prefill(prompt_ids, max_new_tokens, self.exit_layers, on_states)

    def process(self, tokens: list[int], states: list[Tensor]) -> None:
        """Show verified positions to those who look: states after `exit_layers` and the final normed one (`Drafter.process`)."""
        show(self.drafter, tokens, self.exit_layers, states)
        if self.views:
            self.views.process(self.exit_layers, states)

    def draft(self, limit: int) -> Draft:
        """Ask for at most `limit` tokens, and never for what the text has no room for."""
        limit = min(limit, self.remaining - 1)
        return self.drafter.draft(self.engine, self.cache, self.pending, limit, self.stops)

    def commit(
        self,
        draft: Draft,
        deep: list[Tensor],
        states: Tensor,
        choices: list[int],
        traced: list[list[TracedHead]],
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
        self.drafter.accept(draft, tokens, accepted)
        if deep:
            self.process(tokens, [state[: len(tokens)] for state in (*deep, states)])
        return Round(
            tokens=tokens,
            accepted=accepted,
            drafted=len(draft.tokens),
            decided_by=[*draft.reasons[:accepted], *[None] * (len(tokens) - len(draft.reasons[:accepted]))],
            states=states[: len(tokens)].clone() if keep_states else None,
            traced=traced[: len(tokens)],
            rejected=list(zip_longest(draft.tokens[matched:], draft.reasons[matched:])),
        )


def verify(engine: Engine, text: Text, draft: Draft) -> tuple[list[Tensor], Tensor, list[int], list[list[TracedHead]]]:
    """Run what is left of the blocks over the pending token and the draft, and keep the states that are looked at.

    Returns:
        (states after each of the text's exit layers [rows, hidden], final normed states [rows, hidden], the backbone's
        choice after each row, up to the first that the draft lacks at least, head readings per row when traced).
    """
    cache, exit_layers, depth = text.cache, text.exit_layers, engine.blocks.num_blocks
    traced: list[list[TracedHead]] = []
    if text.views or draft.rows:
        rows = draft.rows
        if text.views:  # it needs every row at every exit layer, also where drafting did not stop
            rows = [{0: hidden} for hidden in engine.embed([text.pending, *draft.tokens]).split(1)]
            traced = text.views.read(cache, rows, exit_layers)
        *deep, hidden = states_after(engine, cache, rows, [*exit_layers, depth])
    else:
        *deep, hidden = engine.run_tokens([text.pending, *draft.tokens], cache, cache.length, [*exit_layers, depth])
    states, said = engine.logits(hidden) if text.chooser.reads_logits else engine.finish(hidden)
    return deep, states, text.chooser.choose(said, draft.tokens), traced


def states_after(engine: Engine, cache: KVCache, rows: list[Row], layers: Sequence[int]) -> list[Tensor]:
    """Bring rows, some of which have run already, to each of `layers` in turn: their states there, [rows, hidden] each."""
    found = []
    for layer in layers:
        catch_up(engine, cache, rows, layer)
        found.append(torch.cat([row[layer] for row in rows]))
    return found
