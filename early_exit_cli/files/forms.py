"""What a JSON file's model is made of.

Nothing is converted: a number in quotes is a fault, and so are NaN and infinity. Keys that nobody here reads are left alone:
whoever changes a file changes the JSON itself, so that they stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**53)]
Positive = Annotated[int, Field(gt=0, le=2**53)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00]*$")]


class Form(BaseModel):
    """Base of all."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


def _never_null(value: Any) -> Any:
    if value is None:
        raise ValueError("it must hold a JSON object, found None")
    return value


Absent = BeforeValidator(_never_null)
"""Of an object that may be missing, and is then None, but may not stand there as null."""


def require_ascending(numbers: list[int], below: int, what: str) -> None:
    """Refuse numbers that do not rise, or that are not all between 0 and `below` - 1."""
    if any(b <= a for a, b in itertools.pairwise(numbers)) or (numbers and not 0 <= numbers[0] <= numbers[-1] < below):
        raise ValueError(f"{what} must be ascending, between 0 and {below - 1}")


def to_exit_layers(blocks: Sequence[int]) -> list[int]:
    """Exit layers, which are numbers of blocks run, from 0-based numbers of the blocks whose output is read.

    Files and settings name blocks, as DSSD does; the program counts in exit layers.
    """
    return [block + 1 for block in blocks]


def to_block_numbers(exit_layers: Sequence[int]) -> list[int]:
    """What files and settings say of exit layers: the inverse of `to_exit_layers`."""
    return [layer - 1 for layer in exit_layers]
