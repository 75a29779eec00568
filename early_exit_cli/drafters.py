"""What proposes tokens. A drafter is asked for at most `limit` tokens and says how sure it was of each.

`NoDrafter` never proposes, which makes the decoding loop plain decoding. `ExitDrafter` is early exit: it runs a token to
the first exit layer, reads its head, exits when the head's entropy is below its threshold, and otherwise goes on to the
next head; when no head exits, drafting ends and the round is verified. `FixedDrafter` lets one head draft everything.
`lookup.LookupDrafter` drafts from the text, `lookahead_drafter.LookaheadDrafter` rolls forward from verified states.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

import torch
from torch import Tensor

from early_exit_cli.blocks import LARGEST_WIDTH, KVCache
from early_exit_cli.config import UncertaintyMetric
from early_exit_cli.engine import Engine
from early_exit_cli.exit_reader import ExitReader
from early_exit_cli.gating import may_exit
from early_exit_cli.heads import ExitHeads
from early_exit_cli.sampling import GREEDY, Chooser


@dataclass(frozen=True)
class Exit:
    """Why a token was drafted: which head (in depth order) exited after how many blocks, and how sure it was (entropy in
    nats, or what the calibration's metric puts in its place)."""

    head: int
    exit_layer: int
    entropy: float
    threshold: float

    @property
    def decider(self) -> str:
        return f"head {self.head}"


@dataclass(frozen=True)
class Match:
    """Why a token was drafted: a suffix of so many tokens had occurred before."""

    decider: ClassVar[str] = "lookup"
    length: int


@dataclass(frozen=True)
class Step:
    """Why a token was drafted: a step of the lookahead head, 1 for the first, its entropy (nats), and the calibrated
    probability that the backbone says the same, given that it agreed with the steps before."""

    decider: ClassVar[str] = "lookahead"
    number: int
    entropy: float
    chance: float


Reason = Exit | Match | Step
"""Why a token was drafted."""


def decider(reason: Reason | None) -> str:
    """Who decided a token, in words: `head 0`, `lookup` ..., or `backbone` where there is no other reason."""
    return "backbone" if reason is None else reason.decider


Row = dict[int, Tensor]
"""States of one token by the number of blocks run, [1, hidden] each: what verification may resume from."""


@dataclass(frozen=True)
class Draft:
    """Proposed tokens and what was computed for them.

    tokens: the proposals, for the positions after the pending token. reasons: why, one for each token.
    rows: the states of the pending token and of the drafted ones; empty when nothing was run. The last drafted token
    has no row when it ends the text.
    """

    tokens: list[int] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def catch_up(model: Engine, cache: KVCache, rows: list[Row], layer: int) -> None:
    """Bring all rows to `layer` blocks, in passes over those that stopped earlier.

    Rows stand one after another from the pending token on, and no row has run deeper than one before it: its keys and
    values would have been missing there. So the rows behind are always the last ones, and no block runs twice. A pass
    takes LARGEST_WIDTH rows at most: what it leaves in the KV cache are the bits that any other pass would have left.
    """
    while layer not in rows[-1]:
        start = max(rows[-1])
        first = next(place for place, row in enumerate(rows) if max(row) == start)
        target = min(layer, max(rows[first - 1])) if first else layer
        if target <= start:
            raise RuntimeError(f"row {first} stands at {start} blocks and its neighbour at {target}: rows out of order")
        for place in range(first, len(rows), LARGEST_WIDTH):
            part = rows[place : place + LARGEST_WIDTH]
            hidden = model.run(torch.cat([row[start] for row in part]), cache, cache.length + place, start, target)
            for row, state in zip(part, hidden.split(1), strict=True):
                row[target] = state


class RoundTimes:
    """How much longer rounds take than their parts were measured to, by who drafted; "" where nobody did.

    On a GPU a round is also what the host does between two waits for it, which no measurement of a part holds: learned as
    rounds run, the median of the last ones.
    """

    KEPT = 9
    NEEDED = 3
    """Rounds without a draft that come first in a process, and rounds after which a drafter is judged."""

    def __init__(self) -> None:
        self.beyond: dict[str, deque[float]] = {}

    def observe(self, kind: str, milliseconds: float, expected: float) -> None:
        """A round is over that was expected to take `expected` milliseconds."""
        self.beyond.setdefault(kind, deque(maxlen=self.KEPT)).append(milliseconds - expected)

    @property
    def knows_plain(self) -> bool:
        """Whether enough rounds without a draft were seen to compare with."""
        return len(self.beyond.get("", ())) >= self.NEEDED

    def extra(self, kind: str) -> float:
        """Milliseconds to add to what a draft costs, in steps of 0.01; 0 until enough is known."""
        found = self.beyond.get(kind, ())
        if not self.knows_plain or len(found) < self.NEEDED:
            return 0.0
        return round(max(0.0, median(found) - median(self.beyond[""])), 2)


class Drafter(ABC):
    """Proposes tokens that follow `pending`, which stands at `cache.length` and has not been run yet."""

    name: ClassVar[str]
    """Of the method, in records."""
    exit_layers: Sequence[int] = ()
    """Layers after which it wants to see the states of verified tokens."""
    chooser: Chooser = GREEDY
    """How the text's tokens are chosen, and so the drafted ones."""
    company: int = 0
    """Other texts that have a row in the same passes."""

    times: RoundTimes | None = None
    """What rounds take here beyond their parts, where that is learned: on a GPU."""

    def meet(self, model: Engine) -> None:
        """The model that the next text is decoded by; called before `exit_layers` is asked for."""
        if model.backbone.device.type == "cuda":
            model.round_times = model.round_times or RoundTimes()
            self.times = model.round_times

    def begin(self, prompt_ids: list[int], chooser: Chooser = GREEDY) -> None:
        """A new text starts with these tokens."""
        self.chooser = chooser

    def another(self) -> Drafter:
        """A drafter like this one for another text at the same time; what is learned is shared, the text is not."""
        return copy.copy(self)

    def join(self, company: int) -> None:
        """From now on so many other texts stand in the same passes."""
        self.company = company

    def see(self, tokens: list[int], states: list[Tensor]) -> None:  # noqa: B027
        """States of verified positions, for a drafter with `exit_layers`; called for the prompt too.

        Args:
            tokens: the token that follows each of the positions.
            states: after each of `exit_layers`, and the final normed state, [len(tokens), hidden] each.
        """

    def expected_rate(self, limit: int) -> float:
        """Tokens per millisecond expected of a draft of at most `limit` tokens now; 0 where it has none to make."""
        return 0.0

    @abstractmethod
    def propose(self, model: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        """At most `limit` tokens."""

    def observe(self, draft: Draft, tokens: list[int], accepted: int) -> None:  # noqa: B027
        """A round is over: `tokens` were committed, the first `accepted` of them from the draft."""

    def timed(self, draft: Draft, milliseconds: float) -> bool:
        """What the round took, drafting included, where one text was decoded; whether this one spent time on the draft."""
        return False


def share_of_pass(pass_cost: Callable[[int], float], rows: int, company: int) -> float:
    """Milliseconds of a pass that fall to one text with `rows` rows: an equal share of the pass in which every text has
    one row, and all that its further rows cost."""
    if not company:
        return pass_cost(rows)
    everyone = pass_cost(1 + company)
    return everyone / (1 + company) + pass_cost(rows + company) - everyone


class PassShares:
    """`share_of_pass` by rows, worked out once for each number of other texts: drafting asks for it all the time.

    Args:
        pass_cost: rows -> milliseconds of a pass of the backbone over so many rows.
    """

    def __init__(self, pass_cost: Callable[[int], float]) -> None:
        self.pass_cost = pass_cost
        self.known: dict[int, list[float]] = {}

    def beside(self, company: int) -> list[float]:
        """Milliseconds of 1 to LARGEST_WIDTH rows, each at its number."""
        if company not in self.known:
            shares = [share_of_pass(self.pass_cost, rows, company) for rows in range(1, LARGEST_WIDTH + 1)]
            self.known[company] = [0.0, *shares]
        return self.known[company]


def show(drafter: Drafter, tokens: list[int], layers: Sequence[int], states: list[Tensor]) -> None:
    """Let a drafter see verified positions, if it wants to.

    Args:
        states: after `layers`, its own among them, and the final normed state (`Drafter.see`).
    """
    if drafter.exit_layers:
        drafter.see(tokens, [*(states[layers.index(layer)] for layer in drafter.exit_layers), states[-1]])


class NoDrafter(Drafter):
    """Plain decoding: never proposes."""

    name = "full"

    def propose(self, model: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        return Draft()


@dataclass
class ExitDrafter(Drafter):
    """Early exit with the thresholds of one target accuracy.

    thresholds: in the units of metric, one per head in depth order. active: the heads that are read, ascending; all by
    default. temperature: of the heads' distributions, where tokens are sampled.
    """

    name: ClassVar[str] = "adaptive_early_exit"
    thresholds: list[float]
    active: list[int] | None = None
    metric: UncertaintyMetric = "entropy"
    temperature: float = 1.0
    reader: ExitReader | None = field(default=None, init=False, repr=False)
    watched: list[int] = field(default_factory=list, init=False, repr=False)
    """The active heads whose attention looks at the text."""

    def meet(self, model: Engine) -> None:
        super().meet(model)
        if model.heads is None or not self._active():
            return
        self.reader = model.exit_reader.another()
        self.watched = self.reader.watched(self._active())
        self.exit_layers = [model.heads.exit_layers[head] for head in self.watched]
        model.blocks.prepare_parts([model.heads.exit_layers[head] for head in self._active()])

    def see(self, tokens: list[int], states: list[Tensor]) -> None:
        if self.reader is not None:
            for head, seen in zip(self.watched, states):  # noqa: B905 (the final state is the last one)
                self.reader.see(head, seen)

    def _active(self) -> list[int]:
        return list(range(len(self.thresholds))) if self.active is None else self.active

    def propose(self, model: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        heads, reader, active = model.heads, self.reader, self._active()
        if limit < 1 or heads is None or reader is None or not active:
            return Draft()
        first_layer = heads.exit_layers[active[0]]
        draft = Draft()
        token = pending
        while True:
            position = cache.length + len(draft.tokens)
            draft.rows.append({first_layer: model.run(model.embed([token]), cache, position, 0, first_layer)})
            if len(draft.tokens) == limit:
                return draft
            found = self._read_heads(model, heads, reader, active, cache, draft)
            if found is None:
                return draft
            token, reason = found
            draft.tokens.append(token)
            draft.reasons.append(reason)
            if token in stop_ids:
                return draft

    def _read_heads(
        self, model: Engine, heads: ExitHeads, reader: ExitReader, active: list[int], cache: KVCache, draft: Draft
    ) -> tuple[int, Exit] | None:
        """Go from head to head with the last row until one is sure; None when none is.

        A deeper head needs the keys of the drafted tokens before it, so these go deeper too, in the same pass: blocks
        that verification would have to run anyway.
        """
        for head in active:
            exit_layer, threshold = heads.exit_layers[head], self.thresholds[head]
            catch_up(model, cache, draft.rows, exit_layer)
            found = reader.read(head, [row[exit_layer] for row in draft.rows], self.metric)
            if may_exit(found, threshold):
                token = reader.token(self.chooser, draft.tokens, self.temperature)
                return token, Exit(head, exit_layer, found, threshold)
        return None


class FixedDrafter(ExitDrafter):
    """One head drafts every token, however sure it is: as many as the decoding loop asks for."""

    name = "fixed_layerskip"

    def __init__(self, head: int) -> None:
        super().__init__([float("inf")] * (head + 1), [head])


class DynamicDrafter(ExitDrafter):
    """DSSD's gated exits: every head is read, whatever that costs here."""

    name = "dynamic_early_exit"


class AutoDrafter(Drafter):
    """Asks the drafter that promises the most tokens per millisecond, then the others in their order.

    Args:
        choices: drafters in order of preference, each with the most tokens it may draft.
        plain_cost: milliseconds of a pass without a draft.
    """

    name = "auto"

    def __init__(self, choices: list[tuple[Drafter, int]], plain_cost: float = 0.0) -> None:
        self.choices = choices
        self.plain_cost = plain_cost

    def meet(self, model: Engine) -> None:
        super().meet(model)
        for drafter, _ in self.choices:
            drafter.meet(model)
        self.exit_layers = sorted({layer for drafter, _ in self.choices for layer in drafter.exit_layers})

    def begin(self, prompt_ids: list[int], chooser: Chooser = GREEDY) -> None:
        for drafter, _ in self.choices:
            drafter.begin(prompt_ids, chooser)

    def another(self) -> Drafter:
        return AutoDrafter([(drafter.another(), longest) for drafter, longest in self.choices], self.plain_cost)

    def join(self, company: int) -> None:
        for drafter, _ in self.choices:
            drafter.join(company)

    def see(self, tokens: list[int], states: list[Tensor]) -> None:
        for drafter, _ in self.choices:
            show(drafter, tokens, self.exit_layers, states)

    def propose(self, model: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        draft = Draft()
        if self.times is not None and not self.times.knows_plain:
            return draft
        for drafter, longest in sorted(
            self.choices, key=lambda choice: -choice[0].expected_rate(min(limit, choice[1]))
        ):
            draft = drafter.propose(model, cache, pending, min(limit, longest), stop_ids)
            if draft.tokens:
                break
        return draft

    def observe(self, draft: Draft, tokens: list[int], accepted: int) -> None:
        for drafter, _ in self.choices:
            drafter.observe(draft, tokens, accepted)

    def timed(self, draft: Draft, milliseconds: float) -> bool:
        claimed = [drafter.timed(draft, milliseconds) for drafter, _ in self.choices]
        if self.times is not None and not any(claimed) and not draft.tokens:
            self.times.observe("", milliseconds, self.plain_cost)
        return any(claimed)
