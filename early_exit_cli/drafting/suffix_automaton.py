"""The longest suffix of a text that occurred before, and what followed it."""

from __future__ import annotations

import bisect

SHORTEST = (1, 2, 3, 5, 8, 16)
"""Matches are told apart by the largest of these lengths that they reach."""
PRIOR = (0.25, 0.5, 0.65, 0.75, 0.85, 0.92)
"""Probability that the next token of a match is right, by kind of match, where no calibration has measured it."""
PRIOR_STRENGTH = 6.0
"""Drafted tokens that a prior counts for."""


def kind_of_match(length: int) -> int:
    """Index into `SHORTEST` of a match of at least one token."""
    return bisect.bisect_right(SHORTEST, length) - 1


class SuffixAutomaton:
    """All substrings of a growing sequence, and the longest suffix that occurred before.

    A state stands for the substrings that end at the same places. `following[s]` is the position after one such place:
    the latest at which the cursor saw the state, else the first.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.transitions: list[dict[int, int]] = [{}]
        self.link: list[int] = [-1]
        self.longest: list[int] = [0]
        self.following: list[int] = [0]
        self.last = 0
        self.cursor = 0
        self.match_length = 0
        self.continuation = 0
        """Position of the token that followed the matched suffix where it occurred before."""

    def extend(self, tokens: list[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._follow(token)
            self._append(token)
            # appending may have split the cursor's state: stay with the one that holds the match
            while self.match_length <= self.longest[self.link[self.cursor]] and self.cursor:
                self.cursor = self.link[self.cursor]
            self.continuation = self.following[self.cursor]
            if self.cursor:
                self.following[self.cursor] = len(self.tokens)

    def _follow(self, token: int) -> None:
        """Move the cursor to the longest suffix of text + token that the text before it holds."""
        while self.cursor and token not in self.transitions[self.cursor]:
            self.cursor = self.link[self.cursor]
            self.match_length = self.longest[self.cursor]
        if token in self.transitions[self.cursor]:
            self.cursor = self.transitions[self.cursor][token]
            self.match_length += 1
        else:
            self.match_length = 0

    def _append(self, token: int) -> None:
        self.tokens.append(token)
        new = self._state(self.longest[self.last] + 1, {}, len(self.tokens))
        state = self.last
        while state >= 0 and token not in self.transitions[state]:
            self.transitions[state][token] = new
            state = self.link[state]
        if state < 0:
            self.link[new] = 0
        else:
            target = self.transitions[state][token]
            if self.longest[state] + 1 == self.longest[target]:
                self.link[new] = target
            else:
                clone = self._state(self.longest[state] + 1, dict(self.transitions[target]), self.following[target])
                self.link[clone] = self.link[target]
                self.link[target] = self.link[new] = clone
                while state >= 0 and self.transitions[state].get(token) == target:
                    self.transitions[state][token] = clone
                    state = self.link[state]
        self.last = new

    def _state(self, longest: int, transitions: dict[int, int], following: int) -> int:
        self.transitions.append(transitions)
        self.link.append(-1)
        self.longest.append(longest)
        self.following.append(following)
        return len(self.longest) - 1

    def predict(self, count: int) -> list[int]:
        """The `count` tokens after the earlier occurrence; they run on into themselves where it overlaps the end."""
        if self.match_length == 0:
            return []
        proposal: list[int] = []
        place = self.continuation
        while len(proposal) < count:
            proposal.append(self.tokens[place] if place < len(self.tokens) else proposal[place - len(self.tokens)])
            place += 1
        return proposal
