"""What a person sees: results on stdout, everything else on stderr. The only user of rich.

Progress is drawn on a terminal only; elsewhere a plain line now and then says how far things are. Tables keep all their
words: one that is wider than the terminal is written as a list.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.color import ColorSystem
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.style import Style
from rich.table import Table

from early_exit_cli.report import palette
from early_exit_cli.report.status import make_room, paused

PLAIN_LINE_SECONDS = 15.0
WIDEST = 10_000
NUMBER = re.compile(r"-|-?[\d,.]+ ?(%|x|k?i?[KMG]?B|ms|s|h|min)?( \([\d.]+%\))?|")
"""What stands on the right in a table: a number with its unit, or none."""
MOST_LINES, LONGEST_LINE = 30, 1000


_bars: list[Progress] = []
"""The progress bar that is on the terminal, if one is."""


def stdout() -> Console:
    """Results."""
    make_room()
    return Console(file=sys.stdout, highlight=False)


def stderr() -> Console:
    """Progress, notes, statistics, errors; where a progress bar is, above it."""
    make_room()
    return _bars[-1].console if _bars else Console(file=sys.stderr, highlight=False)


def _write_line(line: str, style: str | None = None, whole: bool = False) -> None:
    """A line on stderr; in a terminal it breaks between words, unless it is to be copied `whole`."""
    console = stderr()
    console.print(line, style=style, markup=False, soft_wrap=whole or not console.is_terminal)


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
    make_room()
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not _is_unicode()) + "\n")
    sys.stdout.flush()


def emit_json_line(value: Any) -> None:
    """One JSON document in a line on stdout, with escapes where that is not Unicode."""
    make_room()
    sys.stdout.write(json.dumps(value, ensure_ascii=not _is_unicode()) + "\n")
    sys.stdout.flush()


def _is_unicode() -> bool:
    return (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")


def shortened(text: str, most: int = 80) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."


def stream_text(piece: str) -> None:
    """Answer text, as it comes."""
    make_room()
    sys.stdout.write(piece)
    sys.stdout.flush()


def wants_colour(choice: str) -> bool:
    """Whether answers are coloured: `always`, `never`, or `auto`, which means in a terminal without NO_COLOR."""
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return choice == "always"


def legend(counts: dict[str, int], coloured: bool) -> None:
    """A line on stderr: tokens by drafter, in their colours where the answer was coloured.

    Where the answer is in a terminal and stderr is not, the legend is plain.
    """
    painted = coloured and (sys.stderr.isatty() or not sys.stdout.isatty())
    words = {decider: f"{decider} {count}" for decider, count in counts.items()}
    parts = [paint(text, decider) if painted else text for decider, text in words.items()]
    make_room()
    sys.stderr.write(f"tokens by drafter: {', '.join(parts)}\n")


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


def paint(text: str, decider: str) -> str:
    """Text in the colour of its drafter, which ends with it: an interruption leaves the terminal as it was."""
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
    _write_line(plain(message), "dim")


def warn(message: str) -> None:
    """One line that deserves attention."""
    _write_line(f"warning: {plain(message)}", "yellow")


def error(message: str, hint: str | None) -> None:
    """What went wrong, and the next thing to try."""
    lines = plain(message).split("\n")
    if len(lines) == 1:
        _write_line(f"error: {lines[0]}", "red")
    else:
        _write_line(f"error: {len(lines)} faults", "red")
        for line in lines:
            _write_line(f"  {line}", "red")
    if hint:
        _write_line(f"  try: {plain(hint)}", whole=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, result: bool = False) -> None:
    """A small table; numbers right, text left. `result` puts it on stdout.

    Where the terminal is too narrow, the columns' names are written a word a line; where it still is, each row as a list
    of its cells, below what its first one says.
    """
    console = stdout() if result else stderr()
    if title:
        console.print(title, style="italic", markup=False, soft_wrap=not console.is_terminal)
    for names in (columns, [column.replace(" ", "\n") for column in columns]):
        drawn = _grid(names, rows)
        width = Measurement.get(console, console.options.update(max_width=WIDEST), drawn).maximum
        if not console.is_terminal:
            console.width = max(width, 1)
        if width <= console.width:
            console.print(drawn)
            return
    _print_lists(console, columns, rows)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    drawn = Table(header_style="bold", box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        number = bool(rows) and all(isinstance(row[index], (int, float)) or _looks_numeric(row[index]) for row in rows)
        drawn.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    return drawn


def _print_lists(console: Console, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rows as lists: the first cell, then each other one behind its column's name. With two columns, a list in all."""
    whole = _list()
    for row in rows:
        cells = ["" if cell is None else escape(str(cell)) for cell in row]
        if len(columns) == 2:
            whole.add_row(*cells)
            continue
        console.print(f"{columns[0]} {cells[0]}".lstrip(), style="bold")
        below = _list()
        for column, cell in zip(columns[1:], cells[1:], strict=True):
            if cell:
                below.add_row(f"  {column}", cell)
        console.print(below)
    if whole.row_count:
        console.print(whole)


def _list() -> Table:
    drawn = Table(box=None, pad_edge=False, show_header=False)
    drawn.add_column(no_wrap=True)
    drawn.add_column(overflow="fold")
    return drawn


def _looks_numeric(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and NUMBER.fullmatch(cell) is not None)


class Ticker:
    """Progress of one task: `update(done, text)`. Time counts from the last update of nothing done."""

    def __init__(self, label: str, total: int, bar: Progress | None) -> None:
        self.label, self.total, self.bar = label, total, bar
        self.task = bar.add_task(label, total=total, detail="", left="") if bar else None
        self.started = self.last_line = time.monotonic()

    def update(self, done: int, detail: str = "", total: int | None = None) -> None:
        """Say that `done` of the total is done."""
        self.total = total or self.total
        now = time.monotonic()
        if not done:
            self.started = now
        left = time_left((now - self.started) / done * (self.total - done)) if done else ""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=self.total, detail=detail, left=left)
        elif self.total and (done >= self.total or now - self.last_line > PLAIN_LINE_SECONDS):
            self.last_line = now
            note(" ".join(filter(None, (self.label, f"{done}/{self.total}", detail, left))))


def time_left(seconds: float) -> str:
    """Nothing where it is over."""
    if seconds >= 90:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds:.0f} s left" if seconds >= 1 else ""


def heading(text: str) -> None:
    """A line on stdout that says what follows."""
    stdout().print(f"--- {plain(text)} ---", style="dim", markup=False)


@contextmanager
def progress(label: str, total: int, *, beside_results: bool = False) -> Iterator[Ticker]:
    """A progress bar on a terminal, plain lines elsewhere.

    Args:
        beside_results: results are written to stdout meanwhile: where that is a terminal, they show how far things are.
    """
    console = stderr()
    if beside_results and sys.stdout.isatty():
        yield Ticker(label, 0, None)
        return
    if not console.is_terminal:
        yield Ticker(label, total, None)
        return
    if _bars:  # one bar at a time
        yield Ticker(label, total, _bars[-1])
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[detail]}"),
    )
    with paused(), Progress(*columns, console=console, transient=True) as bar:
        _bars.append(bar)
        try:
            yield Ticker(label, total, bar)
        finally:
            _bars.remove(bar)
