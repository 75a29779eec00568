"""A static text that lookup may draft from: where in it the end of the growing text stands, and what follows there."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

LONGEST = 32
"""Tokens that a match is looked for with, at most."""


class Corpus:
    """The suffixes of a text in order of their first LONGEST tokens (a suffix array, Manber & Myers 1993, cut short).

    Args:
        tokens: of the text.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        count = len(self.tokens)
        rank = np.unique(np.asarray(self.tokens, dtype=np.int64), return_inverse=True)[1] if count else np.empty(0)
        order = np.arange(count)
        known = 1  # tokens that the ranks tell apart
        while count and known < LONGEST:
            behind = np.full(count, -1, dtype=np.int64)
            behind[:-known] = rank[known:]
            key = rank.astype(np.int64) * (count + 1) + behind + 1
            order = np.argsort(key, kind="stable")
            ordered = key[order]
            rank = np.empty(count, dtype=np.int64)
            rank[order] = np.concatenate(([0], np.cumsum(ordered[1:] != ordered[:-1])))
            known *= 2
        self.order = order.tolist()

    def find(self, pattern: list[int]) -> int | None:
        """Where a pattern of at most LONGEST tokens stands; of several places the middle one in the order of what
        follows there, which many others share."""
        size = len(pattern)

        def beginning(start: int) -> list[int]:
            return self.tokens[start : start + size]

        low = bisect.bisect_left(self.order, pattern, key=beginning)
        high = bisect.bisect_right(self.order, pattern, lo=low, key=beginning)
        return self.order[(low + high) // 2] if low < high else None


class CorpusCursor:
    """The longest end of a growing text that stands in a corpus, as `lookup.SuffixAutomaton` says it of the text itself."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.recent: list[int] = []
        self.match_length = 0
        self.continuation = 0

    def extend(self, tokens: list[int]) -> None:
        """The text goes on with these tokens; what matters is its end."""
        longest = min(self.match_length + len(tokens), LONGEST)
        self.recent = [*self.recent, *tokens][-LONGEST:]
        shortest, self.match_length = 0, 0
        while shortest < longest:  # a match of some length is one of every smaller length
            middle = (shortest + longest + 1) // 2
            place = self.corpus.find(self.recent[-middle:])
            if place is None or middle > len(self.recent):
                longest = middle - 1
            else:
                shortest = self.match_length = middle
                self.continuation = place + middle

    def predict(self, count: int) -> list[int]:
        """At most `count` tokens that follow in the corpus."""
        return self.corpus.tokens[self.continuation : self.continuation + count] if self.match_length else []
