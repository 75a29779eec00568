"""The colours of terminal, page and pictures: who decides in colour, the backbone in the reader's own.

None of them needs red told from green. The colours of deciders keep apart under the three kinds of colour blindness and are neither too light for a white background nor too
dark for a black one; lines under the text tell lookup and eagle from heads where colours do not show.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

HEADS = ("#D9775C", "#C21BB0", "#3A94F5", "#8B6BD9", "#A87A2B")


@dataclass(frozen=True)
class Look:
    """A colour, and the line under the text."""

    colour: str
    line: Literal["none", "single", "double"] = "none"


LOOKS = {
    "lookup": Look("#1C8C82", "single"),
    "eagle": Look("#8A9E0C", "double"),
    "mtp": Look("#543CF0", "double"),
}
OTHER = Look("#7A7A7A", "double")
PLAIN = "#7A7A7A"
"""The baseline in pictures."""
PEERS = ("#3A94F5", "#A87A2B", "#8B6BD9", "#4C4A46", "#E0A93B")
METHODS = {"full": PLAIN, "auto": HEADS[1], "adaptive": HEADS[0]} | {name: seen.colour for name, seen in LOOKS.items()}


@dataclass(frozen=True)
class Shades:
    """A colour on a light ground, and on a dark one."""

    light: str
    dark: str


GOOD, BAD = Shades("#2463B5", "#7FB2F0"), Shades("#B3500F", "#F0A05A")
"""What holds, what is right; what does not."""


def method_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each method of a comparison: our own ones, the same at several levels, and peers in their order."""
    names = list(names)
    peers = itertools.cycle(PEERS)
    return {name: METHODS.get(name.partition("@")[0]) or next(peers) for name in names}


def look(decider: str) -> Look | None:
    """The look of a decider (`head 0`, `lookup` ...); None for the backbone, whose tokens stay plain."""
    if decider == "backbone":
        return None
    kind, _, number = decider.partition(" ")
    return Look(HEADS[int(number) % len(HEADS)]) if kind == "head" and number.isdigit() else LOOKS.get(decider, OTHER)


def decider_of(token: Mapping[str, Any]) -> str:
    """The decider that the record of a token names (`decoding.token_record`)."""
    return f"head {token['head']}" if token["decided_by"] == "head" else str(token["decided_by"])
