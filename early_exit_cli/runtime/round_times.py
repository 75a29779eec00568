"""What rounds take here beyond their measured parts."""

from __future__ import annotations

from collections import deque
from statistics import median


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
