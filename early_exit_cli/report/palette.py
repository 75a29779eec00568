"""How deciders look, in the terminal and on the page: who decides in colour, the backbone in the reader's own.

The colours keep apart under the three kinds of colour blindness and are neither too light for a white background nor too
dark for a black one; lines under the text tell lookup and eagle from heads where colours do not show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

HEADS = ("#D9775C", "#C21BB0", "#3A94F5", "#8B6BD9", "#A87A2B")


@dataclass(frozen=True)
class Look:
    """A colour, and the line under the text."""

    colour: str
    line: Literal["none", "single", "double"] = "none"


LOOKS = {"lookup": Look("#1C8C82", "single"), "eagle": Look("#8A9E0C", "double")}
OTHER = Look("#7A7A7A", "double")


def look(decider: str) -> Look | None:
    """The look of a decider (`head 0`, `lookup` ...); None for the backbone, whose tokens stay plain."""
    if decider == "backbone":
        return None
    kind, _, number = decider.partition(" ")
    return Look(HEADS[int(number) % len(HEADS)]) if kind == "head" and number.isdigit() else LOOKS.get(decider, OTHER)


def decider_of(token: Mapping[str, Any]) -> str:
    """The decider that the record of a token names (`decoding.token_record`)."""
    return f"head {token['head']}" if token["decided_by"] == "head" else str(token["decided_by"])
