"""Drafting with the EAGLE head: roll forward while another token is worth its time.

How far a draft goes is decided token by token: calibration has measured, for each draft position, how probable it is at what
entropy that the backbone will say the same, given that it agreed so far; the pass and step costs of this device are
measured; the draft of the highest expected tokens per millisecond is proposed, and none where plain decoding has it.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect
from collections.abc import Callable, Container
from itertools import pairwise
from operator import mul
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.drafter import Draft, Drafter
from early_exit_cli.drafting.reasons import MtpStep, Step
from early_exit_cli.drafting.round_costs import NEED, PassShares
from early_exit_cli.engine import Engine, OwnHead
from early_exit_cli.heads.assistant import AssistantHead, AssistantRunner
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.head_runner import HeadRunner
from early_exit_cli.heads.mtp import MtpHead, MtpRunner
from early_exit_cli.heads.native_eagle import eagle_runner
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.sampling import GREEDY, Chooser

STRENGTH = 4.0
"""Drafted tokens that the calibrated probabilities count for against what this text has shown."""
ADAPTATIONS = 20
"""Steps of a text's adaptation that a promise tells apart."""
LOOKED_AHEAD = 8
"""Tokens of a draft that a promise looks at."""
MOST_PROMISES = 4096
"""Kept; all are worked out anew when there are more, since a server goes on for ever and what rounds take changes."""
READINGS = 8.0
"""First tokens of a text that the calibrated entropies count for against those that this text has shown."""
FORGETTING = 0.97
"""What is left of the text's own evidence after a round without a draft, so that drafting is tried again."""


class _Stop(NamedTuple):
    """A draft length, the tokens that a round with it is expected to commit, and its milliseconds."""

    length: int
    tokens: float
    milliseconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.milliseconds


def runner_of(head: EagleHead | OwnHead) -> HeadRunner:
    """What rolls a head out over a text."""
    if isinstance(head, AssistantHead):
        return AssistantRunner(head)
    return MtpRunner(head) if isinstance(head, MtpHead) else eagle_runner(head)


class EagleDrafter(Drafter):
    """Proposes what the EAGLE head says, as far as it pays.

    Args:
        survival: by draft position; the last one stands for all later ones.
        pass_cost: rows -> milliseconds of a pass of the backbone over so many rows.
        read_cost: milliseconds until the first token is known. step_cost: of each further one.
        temperature: of the head's distribution, where tokens are sampled.
    """

    name = "eagle"
    step: ClassVar[type[Step]] = Step
    """Why it drafts a token."""

    def __init__(
        self,
        head: EagleHead | OwnHead,
        survival: list[Survival],
        pass_cost: Callable[[int], float],
        read_cost: float,
        step_cost: float,
        temperature: float = 1.0,
    ) -> None:
        self.runner = runner_of(head)
        self.exit_layers = head.exit_layers
        self.survival, self.passes = survival, PassShares(pass_cost)
        self.read_cost, self.step_cost = read_cost, step_cost
        self.temperature = temperature
        self.waiting: list[tuple[list[int], list[Tensor]]] = []
        self.hits = self.expected = 0.0
        self.guess: tuple[int | None, float] | None = None
        """A first token that was not worth drafting this round, and its chance: the text will tell whether it was right."""
        known = survival[0].entropies or (0.0,)
        self.between = [(low + high) / 2 for low, high in pairwise(known)]
        """What tells apart the entropies that a promise looks at."""
        self.prior = [READINGS / len(known)] * len(known)
        self.met = list(self.prior)
        """How often each of them is expected to be met in this text."""
        self.promises: dict[tuple[int, int, int, float], tuple[list[float], list[float]]] = {}
        self.spent: float | None = None
        """Milliseconds that this round's drafting was expected to take; none where nothing was asked of the head, or where
        nobody will tell what the round took."""

    def begin(self, prompt_ids: list[int], chooser: Chooser = GREEDY) -> None:
        self.chooser = chooser
        self.runner.rewind()
        self.waiting = []
        self.hits = self.expected = 0.0
        self.met = list(self.prior)
        self.guess = None

    def fork(self) -> Drafter:
        other = copy.copy(self)
        other.runner = self.runner.fork()
        return other

    def process(self, tokens: list[int], states: list[Tensor]) -> None:
        self.waiting.append((tokens, states))

    def expected_rate(self, limit: int) -> float:
        """Tokens per millisecond that reading the head promises, before its first token is known; 0 where it cannot.

        The entropy will say whether a draft is worth verifying: the promise is the mean over the entropies to be met, those of
        calibration and this text's own, of tokens over the mean of times. Where calibration kept none, the mean chance
        stands for all.
        """
        if limit < 1 or not self.waiting:
            return 0.0
        key = (round(ADAPTATIONS * self._adaptation), min(limit, LOOKED_AHEAD), self.batch_size, self._reading)
        if key not in self.promises:
            if len(self.promises) >= MOST_PROMISES:
                self.promises.clear()
            chances = [self._chance(0, uncertainty) for uncertainty in self._at(0).entropies] or [self._chance(0)]
            stops = [self._best_stop([chance], 1, key[1]) for chance in chances]
            self.promises[key] = [stop.tokens for stop in stops], [stop.milliseconds for stop in stops]
        tokens, milliseconds = self.promises[key]
        return sum(map(mul, self.met, tokens)) / sum(map(mul, self.met, milliseconds))

    def draft(self, engine: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        self.guess = self.spent = None
        if self.expected_rate(limit) * self.passes.in_batch(self.batch_size)[1] <= NEED:
            self.hits, self.expected = self.hits * FORGETTING, self.expected * FORGETTING
            self.met = [prior + (met - prior) * FORGETTING for prior, met in zip(self.prior, self.met, strict=True)]
            return Draft()
        self.runner.follow(cache)
        if self.runner.most_steps and not self.chooser.reads_logits:
            return self._propose_chain(limit, stop_ids)
        hidden = self.runner.read(*self._waiting())
        tokens: list[int] = []
        reasons: list[Step] = []
        while True:
            token, uncertainty = self.runner.choose(hidden, self.chooser, tokens, self.temperature)
            if not math.isfinite(uncertainty):  # the head has left the range of its numbers
                made = len(tokens) + 1
                best = self._best_stop([reason.chance for reason in reasons], made, len(tokens)).length
                return self._cut(tokens, reasons, best)
            if not tokens:
                self.met[bisect(self.between, uncertainty)] += 1
            tokens.append(token)
            reasons.append(self.step(len(tokens), uncertainty, self._chance(len(tokens) - 1, uncertainty)))
            best = self._best_stop([reason.chance for reason in reasons], len(tokens), limit).length
            if best <= len(tokens) or token in stop_ids:
                return self._cut(tokens, reasons, min(best, len(tokens)))
            hidden = self.runner.step(token, hidden, len(tokens))

    def _propose_chain(self, limit: int, stop_ids: Container[int]) -> Draft:
        """All steps at once, as many as promise the most before any is known; what is worth verifying when they are."""
        count = self._chain_length(min(limit, self.runner.most_steps))
        self.spent = self.read_cost + (count - 1) * self.step_cost
        tokens, entropies = self.runner.chain(*self._waiting(), count)
        end = next((place + 1 for place, token in enumerate(tokens) if token in stop_ids), len(tokens))
        end = next((place for place, found in enumerate(entropies[:end]) if not math.isfinite(found)), end)
        if end:
            self.met[bisect(self.between, entropies[0])] += 1
        reasons = [
            self.step(place + 1, found, self._chance(place, found)) for place, found in enumerate(entropies[:end])
        ]
        best = self._best_stop([reason.chance for reason in reasons], max(count, 1), end).length
        return self._cut(tokens[:end], reasons, best)

    def _cut(self, tokens: list[int], reasons: list[Step], length: int) -> Draft:
        """The first `length` of what the head said. Where that is none, the text will tell whether its first token was right; a
        head that said nothing finite was wrong."""
        if length == 0:
            self.guess = (tokens[0], reasons[0].chance) if tokens else (None, self._chance(0))
        return Draft(tokens=tokens[:length], reasons=list(reasons[:length]))

    def _chain_length(self, limit: int) -> int:
        """The chain of the highest expected tokens per millisecond, by the mean chances of its positions."""
        passes = self.passes.in_batch(self.batch_size)
        best, best_rate = 1, 0.0
        expected = survives = 1.0
        for count in range(1, limit + 1):
            survives *= self._chance(count - 1)
            expected += survives
            rate = expected / (passes[count + 1] + self._reading + (count - 1) * self.step_cost)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _waiting(self) -> tuple[list[int], list[Tensor]]:
        """All that was verified since the last time: tokens, and states by layer."""
        (tokens, states), *more = self.waiting
        if more:
            tokens = [token for part, _ in self.waiting for token in part]
            states = [torch.cat(parts) for parts in zip(*(found for _, found in self.waiting), strict=True)]
        self.waiting = []
        return tokens, states

    def accept(self, draft: Draft, tokens: list[int], accepted: int) -> None:
        for reason in draft.reasons[: accepted + 1]:
            if type(reason) is self.step:
                self.expected += reason.chance
        if draft.reasons and type(draft.reasons[0]) is self.step:
            self.hits += accepted
        elif self.guess is not None:
            self.expected += self.guess[1]
            self.hits += self.guess[0] == tokens[0]
        self.guess = None  # it may not be asked in the next round
        if self.batch_size > 1:
            self.spent = None

    def timed(self, draft: Draft, milliseconds: float) -> bool:
        spent, self.spent = self.spent, None
        if spent is None:
            return False
        if self.times is not None:
            self.times.observe(self.name, milliseconds, self.passes.in_batch(1)[len(draft.tokens) + 1] + spent)
        return True

    @property
    def _reading(self) -> float:
        """Milliseconds until the first token is known, what the host adds included."""
        return self.read_cost + (0.0 if self.times is None else self.times.extra(self.name))

    @property
    def _adaptation(self) -> float:
        """Text-adapted survival: tokens of this text that were right over those that calibration expected to be."""
        return (self.hits + STRENGTH) / (self.expected + STRENGTH)

    def _at(self, place: int) -> Survival:
        return self.survival[min(place, len(self.survival) - 1)]

    def _chance(self, place: int, uncertainty: float | None = None) -> float:
        """The calibrated probability at a draft position, adapted to this text."""
        survival = self._at(place)
        calibrated = survival.mean if uncertainty is None else survival.at(uncertainty)
        return min(calibrated * self._adaptation, 0.995)

    def _best_stop(self, chances: list[float], made: int, limit: int) -> _Stop:
        """The draft length of the highest expected tokens per millisecond from here on.

        Args:
            chances: of the tokens drafted already; later ones count with their position's mean.
            made: draft steps that are spent already, at least one.
        """
        passes = self.passes.in_batch(self.batch_size)
        drafting = self._reading + (made - 1) * self.step_cost
        best = _Stop(0, 1.0, passes[1] + drafting)
        to_beat = NEED * best.rate
        expected = survives = 1.0
        for count in range(1, limit + 1):
            survives *= chances[count - 1] if count <= len(chances) else self._chance(count - 1)
            expected += survives
            if count > made:
                drafting += self.step_cost
            milliseconds = passes[count + 1] + drafting
            if expected > to_beat * milliseconds:
                best = _Stop(count, expected, milliseconds)
                to_beat = best.rate
        return best


class MtpDrafter(EagleDrafter):
    """Proposes what the checkpoint's MTP layer says, or the model's assistant, as far as it pays."""

    name = "mtp"
    step = MtpStep

    def process(self, tokens: list[int], states: list[Tensor]) -> None:
        if self.runner.reads_keys:
            self.waiting = [(tokens[-1:], [states[-1][-1:]])]
        else:
            self.waiting.append((tokens, states[-1:]))
