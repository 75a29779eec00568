"""A terminal as far as answers and status lines need one: text, line breaks at the edge, moving left, erasing."""

import io
import re

from rich.cells import cell_len

CONTROL = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[[\d;]*m")


class Terminal(io.StringIO):
    """What is written to it is drawn: `lines` is what a person then sees."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns
        self.cells: list[list[str]] = [[]]
        self.column = 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        place = 0
        while place < len(text):
            control = CONTROL.match(text, place)
            if control:
                self._control(control[1], control[2])
                place = control.end()
            else:
                self._character(text[place])
                place += 1
        return super().write(text)

    @property
    def lines(self) -> list[str]:
        return ["".join(line).rstrip() for line in self.cells]

    def _control(self, number: str | None, command: str | None) -> None:
        if command == "D":
            self.column = max(0, min(self.column, self.columns - 1) - int(number or 1))
        elif command == "K":
            del self.cells[-1][self.column :]

    def _character(self, character: str) -> None:
        if character == "\n":
            self.cells.append([])
            self.column = 0
        elif character == "\r":
            self.column = 0
        else:
            if self.column + cell_len(character) > self.columns:
                self.cells.append([])
                self.column = 0
            line = self.cells[-1]
            line += [" "] * (self.column - len(line))
            line[self.column : self.column + cell_len(character)] = [character, *[""] * (cell_len(character) - 1)]
            self.column += cell_len(character)
