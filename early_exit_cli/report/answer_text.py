"""Answers on stdout as they come: in the drafters' colours, and in a terminal broken between words."""

from __future__ import annotations

import sys

from rich.cells import cell_len

from early_exit_cli.report import console
from early_exit_cli.report.status import terminal_columns

TAB = 8
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""Characters that would move the cursor or ring a bell, and what a terminal is shown in their place."""


class AnswerWriter:
    """Writes the pieces of an answer.

    In a terminal a word that does not fit the line any more is taken back and written on the next one. What is longer than
    a line, and text without spaces, is broken by the terminal. What would move the cursor is shown as a sign.

    Args:
        coloured: paint each piece by its drafter.
    """

    def __init__(self, coloured: bool) -> None:
        self.coloured = coloured
        self.columns = terminal_columns(sys.stdout)
        self.column = 0
        """Cells that the line holds."""
        self.word: list[tuple[str, str]] = []
        """The word at its end, as pieces and who decided each."""
        self.word_cells = 0
        self.ends_line = True

    def write(self, piece: str, decider: str) -> None:
        """A piece of the answer, and who decided it."""
        self.ends_line = piece.endswith("\n")
        if self.columns is None:
            console.stream_text(self._painted(piece, decider))
            return
        piece, start = piece.translate(CONTROLS), 0
        for end in range(1, len(piece) + 1):
            if end == len(piece) or piece[end - 1].isspace() != piece[end].isspace() or piece[end - 1] == "\n":
                self._write_part(piece[start:end], decider)
                start = end

    def end(self) -> None:
        """The answer is over: what follows begins a line of its own."""
        if not self.ends_line:
            console.stream_text("\n")
        self.column, self.word, self.word_cells, self.ends_line = 0, [], 0, True

    def _write_part(self, part: str, decider: str) -> None:
        """A piece that is all space, or without any."""
        cells = TAB - self.column % TAB if part == "\t" else cell_len(part)
        if part.isspace():
            self.word, self.word_cells = [], 0
            self.column = 0 if "\n" in part else self.column + cells
            console.stream_text(self._painted(part, decider))
            return
        self.word.append((part, decider))
        columns, moved = self.columns or 0, self.word_cells
        self.word_cells += cells
        fits_a_line = self.word_cells < columns
        if self.column + cells >= columns and fits_a_line and moved < self.column:
            back = f"\x1b[{moved}D\x1b[K" if moved else ""
            console.stream_text(f"{back}\n" + "".join(self._painted(*piece) for piece in self.word))
            self.column = self.word_cells
        else:
            console.stream_text(self._painted(part, decider))
            self.column = (self.column + cells - 1) % columns + 1

    def _painted(self, piece: str, decider: str) -> str:
        return console.paint(piece, decider) if self.coloured else piece
