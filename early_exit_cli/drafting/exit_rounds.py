"""What a round of early exit is expected to bring on a device: tokens and milliseconds, by the tokens it drafts."""

from __future__ import annotations

from dataclasses import dataclass
from operator import mul


@dataclass(frozen=True)
class ExitRounds:
    """Rounds that draft 0, 1, 2 ... tokens.

    chances: of each. tokens: expected to be committed then, the backbone's own among them. milliseconds: it takes.
    plain: milliseconds of a pass without a draft.
    """

    chances: list[float]
    tokens: list[float]
    milliseconds: list[float]
    plain: float

    @property
    def mean(self) -> tuple[float, float]:
        """Tokens and milliseconds of a round."""
        return sum(map(mul, self.chances, self.tokens)), sum(map(mul, self.chances, self.milliseconds))

    @property
    def rate(self) -> float:
        """Tokens per millisecond."""
        tokens, milliseconds = self.mean
        return tokens / milliseconds
