"""What a person sees: results on stdout, everything else on stderr. The only user of rich.

Progress is drawn on a terminal only; elsewhere a plain line now and then says how far things are.
"""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table

from early_exit_cli.report import palette

PLAIN_LINE_SECONDS = 15.0
PLAIN_WIDTH = 160
MOST_LINES, LONGEST_LINE = 30, 1000


def stdout() -> Console:
    """Results."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=True)


def stderr() -> Console:
    """Progress, notes, statistics, errors."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def accept_any_text() -> None:
    """Let a console that cannot show a character show a question mark, whatever its encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def show_warnings(category: type[Warning]) -> None:
    """Show warnings of a kind as `warn` does, each once."""
    plainly: Any = warnings.showwarning
    shown: set[str] = set()

    def show(message: Any, kind: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(kind, category):
            plainly(message, kind, *place, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            warn(str(message))

    warnings.simplefilter("always", category)
    showing: Any = show
    warnings.showwarning = showing


def emit_json(value: Any) -> None:
    """One JSON document on stdout; where that is not Unicode, with escapes, so that nothing is lost."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not is_unicode) + "\n")
    sys.stdout.flush()


def stream_text(piece: str) -> None:
    """Answer text, as it comes."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def wants_colour(choice: str) -> bool:
    """Whether answers are coloured: `always`, `never`, or `auto`, which means in a terminal without NO_COLOR."""
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"


def stream_coloured(piece: str, decider: str) -> None:
    """Answer text, as it comes, in the colour of its drafter. Each piece ends its colour, so that an interruption
    leaves the terminal as it was."""
    stream_text(_paint(piece, decider))


def legend(counts: dict[str, int], statistics: str) -> None:
    """Tokens by drafter, in their colours, and a line of statistics; for an answer that was coloured.

    Where the answer is in a terminal and stderr is not, the legend is plain.
    """
    painted = sys.stderr.isatty() or not sys.stdout.isatty()
    words = {decider: f"{decider}: {count}" for decider, count in counts.items()}
    parts = [_paint(text, decider) if painted else text for decider, text in words.items()]
    sys.stderr.write("  ".join(parts) + f"\n{statistics}\n")


@functools.cache
def _style(decider: str) -> Style | None:
    seen = palette.look(decider)
    if seen is None:
        return None
    return Style(color=seen.colour, underline=seen.line == "single", underline2=seen.line == "double")


@functools.cache
def _colour_system() -> ColorSystem:
    """What the terminal can show; 256 colours where it does not say."""
    found = Console(file=sys.stdout, force_terminal=True).color_system
    return ColorSystem[{"standard": "STANDARD", "truecolor": "TRUECOLOR"}.get(found or "", "EIGHT_BIT")]


def _paint(text: str, decider: str) -> str:
    style = _style(decider)
    return style.render(text, color_system=_colour_system()) if style else text


def plain(text: str) -> str:
    """Text without what would move a terminal's cursor or change its colours, and no longer than a person reads: messages
    quote files of any origin."""
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES} more"]
    cut = (line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..." for line in lines)
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in cut)


def note(message: str) -> None:
    """One line to the person."""
    stderr().print(plain(message), style="dim", markup=False)


def warn(message: str) -> None:
    """One line that deserves attention."""
    stderr().print(f"warning: {plain(message)}", style="yellow", markup=False)


def error(message: str, hint: str | None) -> None:
    """What went wrong, and the next thing to try."""
    lines = plain(message).split("\n")
    if len(lines) == 1:
        stderr().print(f"error: {lines[0]}", style="red", markup=False)
    else:
        stderr().print(f"error: {len(lines)} faults", style="red", markup=False)
        for line in lines:
            stderr().print(f"  {line}", style="red", markup=False)
    if hint:
        stderr().print(f"  try: {plain(hint)}", markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, result: bool = False) -> None:
    """A small table; numbers right, text left. `result` puts it on stdout."""
    drawn = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        number = bool(rows) and all(isinstance(row[index], (int, float)) or _looks_numeric(row[index]) for row in rows)
        drawn.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    console = stdout() if result else stderr()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(drawn, soft_wrap=False)


def _looks_numeric(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and cell[:1] in "0123456789-")


class Ticker:
    """Progress of one task: `update(done, text)`."""

    def __init__(self, label: str, total: int, bar: Progress | None) -> None:
        self.label, self.total, self.bar = label, total, bar
        self.task = bar.add_task(label, total=total, detail="") if bar else None
        self.started = self.last_line = time.monotonic()

    def update(self, done: int, detail: str = "", total: int | None = None) -> None:
        """Say that `done` of the total is done."""
        self.total = total or self.total
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=self.total, detail=detail)
        elif done >= self.total or time.monotonic() - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / done * (self.total - done) if done else 0.0
            eta = f"about {left / 60:.0f} min left" if left >= 60 else ""
            note(f"{self.label} {done}/{self.total} {detail} {eta}".rstrip())


@contextmanager
def progress(label: str, total: int) -> Iterator[Ticker]:
    """A progress bar on a terminal, plain lines elsewhere."""
    console = stderr()
    if not console.is_terminal:
        yield Ticker(label, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield Ticker(label, total, bar)
