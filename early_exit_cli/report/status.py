"""The line at the foot of a terminal that says what is being done, and for how long.

It is on stderr, in a terminal only. Whatever else is written takes it away first; as long as the step goes on, it comes back.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.cells import set_cell_size

from early_exit_cli.steps import Step, told_to

TICK_SECONDS = 1.0
DEFAULT_COLUMNS = 80
ERASE = "\r\x1b[K"


def terminal_columns(stream: IO[str]) -> int | None:
    """Of the terminal that a stream goes to; None where it is none, or one that cannot move its cursor."""
    if not stream.isatty() or os.environ.get("TERM") == "dumb":
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or DEFAULT_COLUMNS
    except (OSError, ValueError):
        return DEFAULT_COLUMNS


class StatusLine:
    """One line, drawn again each second with the seconds that its step has taken. A step with bars of its own is named on a
    line above them."""

    def __init__(self) -> None:
        self.stream = sys.stderr  # whatever it is while a library is kept quiet
        self.step: Step | None = None
        self.since = 0.0
        self.drawn = False
        self.lock = threading.RLock()
        self.ended = threading.Event()
        self.ticking = threading.Thread(target=self._tick, daemon=True)
        self.ticking.start()

    def show(self, step: Step | None) -> None:
        """What is done now; None: nothing that takes long."""
        with self.lock:
            if step is not self.step:
                self.since = time.monotonic()
            self.step = step
            if step is None:
                self.erase()
            elif step.has_bars:
                self.erase()
                self.stream.write(f"{step.text}\n")
            else:
                self.draw()

    def draw(self) -> None:
        """Show the step."""
        with self.lock:
            if self.step is not None and not self.step.has_bars and not _pauses:
                seconds = int(time.monotonic() - self.since)
                line = f"{self.step.text} ..." + (f" {seconds} s" if seconds else "")
                width = terminal_columns(self.stream) or DEFAULT_COLUMNS
                shown = line if len(line) < width else set_cell_size(line, width - 1)
                self.stream.write(f"{ERASE}{shown}")
                self.stream.flush()
                self.drawn = True

    def erase(self) -> None:
        """Take the line away, for something else to be written."""
        with self.lock:
            if self.drawn:
                self.stream.write(ERASE)
                self.stream.flush()
                self.drawn = False

    def close(self) -> None:
        """No more of it."""
        self.ended.set()
        self.ticking.join()
        with self.lock:
            self.step = None
            self.erase()

    def _tick(self) -> None:
        while not self.ended.wait(TICK_SECONDS):
            self.draw()


_shown: list[StatusLine] = []
_pauses: list[None] = []


def make_room() -> None:
    """Before anything is written to the terminal."""
    for line in _shown:
        line.erase()


@contextmanager
def paused() -> Iterator[None]:
    """In the block no line is drawn: something else shows how far things are."""
    make_room()
    _pauses.append(None)
    try:
        yield
    finally:
        _pauses.pop()


@contextmanager
def status_line() -> Iterator[None]:
    """In the block a line says what is done, unless nobody watches: stderr is no terminal, or cannot move its cursor. Of
    several processes the first one speaks."""
    if terminal_columns(sys.stderr) is None or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    line = StatusLine()
    _shown.append(line)
    try:
        with told_to(line.show):
            yield
    finally:
        _shown.remove(line)
        line.close()
