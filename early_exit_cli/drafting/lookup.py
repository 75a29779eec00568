"""Prompt lookup: drafts that continue the longest suffix of the text that was seen before (Saxena 2023).

The suffix is found by a suffix automaton of the text (Blumer et al. 1985), extended token by token in amortised constant
time, with a cursor that follows the longest suffix of the text with an earlier occurrence.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Protocol

from early_exit_cli.drafting.corpus import Corpus, CorpusCursor
from early_exit_cli.drafting.drafter import Draft, Drafter
from early_exit_cli.drafting.reasons import Match
from early_exit_cli.drafting.round_costs import PassShares
from early_exit_cli.drafting.suffix_automaton import PRIOR, PRIOR_STRENGTH, SuffixAutomaton, kind_of_match
from early_exit_cli.engine import Engine
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.sampling import GREEDY, Chooser


class Matcher(Protocol):
    """Knows the longest end of the growing text that occurred before, somewhere, and what followed there."""

    match_length: int

    def extend(self, tokens: list[int]) -> None: ...
    def predict(self, count: int) -> list[int]: ...


class _Source:
    """A matcher, and how its matches have fared on this text.

    Args:
        prior: probability that the next token of a match is right, by kind of match, before this text has shown any.
    """

    def __init__(self, matcher: Matcher, prior: Sequence[float]) -> None:
        self.matcher = matcher
        self.right = [PRIOR_STRENGTH * chance for chance in prior]
        self.seen = [PRIOR_STRENGTH] * len(prior)

    @property
    def chance(self) -> float:
        """Of the next token, where there is a match."""
        kind = kind_of_match(self.matcher.match_length)
        return self.right[kind] / self.seen[kind]

    def count(self, drafted: int, accepted: int) -> None:
        """A draft from the current match was verified."""
        kind = kind_of_match(self.matcher.match_length)
        self.right[kind] += accepted
        self.seen[kind] += min(accepted + 1, drafted)


class LookupDrafter(Drafter):
    """Drafts from the text itself, or from a corpus; how many tokens, the expected tokens per millisecond decide.

    Args:
        pass_cost: rows -> milliseconds of a pass of the backbone over so many rows.
        prior: probability that the next token of a match is right, by kind of match, before this text has shown any.
        corpus: a static text besides.
    """

    name = "lookup"

    def __init__(
        self, pass_cost: Callable[[int], float], prior: Sequence[float] = PRIOR, corpus: Corpus | None = None
    ) -> None:
        self.passes = PassShares(pass_cost)
        self.prior = prior
        self.corpus = corpus
        self.sources: list[_Source] = []
        self.drafting: _Source | None = None

    def begin(self, prompt_ids: list[int], chooser: Chooser = GREEDY) -> None:
        matchers: list[Matcher] = [SuffixAutomaton()]
        if self.corpus is not None:
            matchers.append(CorpusCursor(self.corpus))
        for matcher in matchers:
            matcher.extend(prompt_ids)
        self.sources = [_Source(matcher, self.prior) for matcher in matchers]
        self.drafting = None

    def expected_rate(self, limit: int) -> float:
        return self._best(limit)[2]

    def draft(self, engine: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        self.drafting, count, _ = self._best(limit)
        if self.drafting is None or count == 0:
            return Draft()
        tokens = self.drafting.matcher.predict(count)
        for place, token in enumerate(tokens):
            if token in stop_ids:
                tokens = tokens[: place + 1]
                break
        return Draft(tokens=tokens, reasons=[Match(self.drafting.matcher.match_length)] * len(tokens))

    def timed(self, draft: Draft, milliseconds: float) -> bool:
        is_ours = bool(draft.tokens) and isinstance(draft.reasons[0], Match)
        if is_ours and self.times is not None:
            self.times.observe(self.name, milliseconds, self.passes.in_batch(1)[len(draft.tokens) + 1])
        return is_ours

    def accept(self, draft: Draft, tokens: list[int], accepted: int) -> None:
        if self.drafting is not None and draft.tokens and isinstance(draft.reasons[0], Match):
            self.drafting.count(len(draft.tokens), accepted)
        for source in self.sources:
            source.matcher.extend(tokens)

    def _best(self, limit: int) -> tuple[_Source | None, int, float]:
        """Where to draft from, the draft length of the highest expected tokens per millisecond, 0 where plain decoding has
        it, and that rate; none, 0 and 0.0 where nothing matches. The text itself comes before a corpus."""
        found: tuple[_Source | None, int, float] = (None, 0, 0.0)
        for source in self.sources:
            if limit >= 1 and source.matcher.match_length:
                count, rate = self._best_length(source.chance, limit)
                if rate > found[2]:
                    found = (source, count, rate)
        return found

    def _best_length(self, chance: float, limit: int) -> tuple[int, float]:
        """The best draft length for tokens that are each right with this chance, and its rate."""
        passes, extra = (
            self.passes.in_batch(self.batch_size),
            0.0 if self.times is None else self.times.extra(self.name),
        )
        best, best_rate = 0, 1 / passes[1]
        expected = survives = 1.0
        for count in range(1, limit + 1):
            survives *= chance
            expected += survives
            rate = expected / (passes[count + 1] + extra)
            if rate > best_rate:
                best, best_rate = count, rate
        return best, best_rate
