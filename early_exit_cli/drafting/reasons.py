"""Why a token was drafted, and by whom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


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
    """Why a token was drafted: a step of the EAGLE head, 1 for the first, its entropy (nats), and the calibrated
    probability that the backbone says the same, given that it agreed with the steps before."""

    decider: ClassVar[str] = "eagle"
    number: int
    entropy: float
    chance: float


@dataclass(frozen=True)
class MtpStep(Step):
    """Why a token was drafted: a step of the checkpoint's MTP layer, or of the assistant."""

    decider: ClassVar[str] = "mtp"


Reason = Exit | Match | Step
"""Why a token was drafted."""


def decider(reason: Reason | None) -> str:
    """Who decided a token, in words: `head 0`, `lookup` ..., or `backbone` where there is no other reason."""
    return "backbone" if reason is None else reason.decider
