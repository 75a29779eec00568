"""An answer in a terminal: broken between words, coloured, and the same text as anywhere else."""

import os
import random
import sys

import pytest
from terminal import Terminal

from early_exit_cli.report.answer_text import AnswerWriter

WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "because",
    "air",
    "scatters",
    "short",
    "waves",
    "more",
    "than",
    "long",
    "ones",
    "incomprehensibilities",
    "日本語",
    "naïve",
    "🙂",
    "x",
]


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of so many columns as stdout."""

    def make(columns):
        screen = Terminal(columns)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(screen, "fileno", lambda: 1)
        monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((columns, 24)))
        monkeypatch.setenv("TERM", "xterm-256color")
        return screen

    return make


def pieces_of(text, draw):
    """As tokens come: from a part of a word to several words."""
    while text:
        size = draw.randrange(1, 9)
        yield text[:size]
        text = text[size:]


@pytest.mark.parametrize("coloured", [False, True], ids=["plain", "coloured"])
@pytest.mark.parametrize("columns", [24, 40, 61])
def test_lines_break_between_words(terminal, columns, coloured):
    draw = random.Random(columns)
    for _ in range(60):
        words = draw.choices(WORDS, k=40)
        screen = terminal(columns)
        writer = AnswerWriter(coloured)
        for piece in pieces_of(" ".join(words), draw):
            writer.write(piece, draw.choice(["head 0", "lookup", "backbone"]))
        writer.end()
        assert [word for line in screen.lines for word in line.split()] == words  # none is torn apart or lost
        assert screen.lines[-1] == ""


def test_what_is_longer_than_a_line_is_left_to_the_terminal(terminal):
    screen = terminal(10)
    writer = AnswerWriter(False)
    for piece in ("see ", "https", "://example.org/", "a/long/path", " and", " go on"):
        writer.write(piece, "backbone")
    writer.end()
    assert "".join(screen.lines).replace(" ", "") == "seehttps://example.org/a/long/pathandgoon"
    assert screen.lines[-2].split()[-1] == "on"


def test_lines_of_the_answer_stay_and_indentation_too(terminal):
    text = "def f(x):\n    return x\n\n\tdone"
    screen = terminal(40)
    writer = AnswerWriter(False)
    for piece in pieces_of(text, random.Random(0)):
        writer.write(piece, "backbone")
    assert screen.getvalue() == text


def test_an_answer_cannot_move_the_cursor(terminal):
    screen = terminal(40)
    writer = AnswerWriter(False)
    writer.write("a\x1b[2J\x07 b\rc\x9b3D", "backbone")
    assert screen.getvalue() == "a\u241b[2J\u2407 b\u240dc\ufffd3D"


def test_in_a_pipe_the_answer_is_the_text(capsys):
    text = "word " * 100
    writer = AnswerWriter(False)
    for piece in pieces_of(text, random.Random(0)):
        writer.write(piece, "lookup")
    writer.end()
    writer.write("next\n", "lookup")
    writer.end()
    assert capsys.readouterr().out == f"{text}\nnext\n"
