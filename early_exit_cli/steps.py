"""What is being done right now, told to whoever shows it: the commands in a terminal; nobody where this is a library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LONG_PROMPT = 512
"""Tokens of a prompt that is worth a word while it is read."""


@dataclass
class Step:
    """Something that may take seconds.

    has_bars: the library that does it draws how far it is.
    """

    text: str
    has_bars: bool = False

    def say(self, text: str) -> None:
        """How far it is, instead of what it was called."""
        self.text = text
        _tell()


Listener = Callable[[Step | None], None]
"""Called with what is being done, whenever that changes; with None where nothing is that takes long."""

_listeners: list[Listener] = []
_steps: list[Step] = []


@contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """In the block, a listener hears of all steps."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def step(text: str, *, has_bars: bool = False) -> Iterator[Step]:
    """Say what the block does: "loading the model"."""
    now = Step(text, has_bars)
    _steps.append(now)
    _tell()
    try:
        yield now
    finally:
        _steps.remove(now)
        _tell()


def _tell() -> None:
    for listener in _listeners:
        listener(_steps[-1] if _steps else None)
