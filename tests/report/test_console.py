"""Colours: when they are wanted, and that they never change or break the text."""

import re
import sys

import pytest

from early_exit_cli.report import console, palette

DECIDERS = ["head 0", "head 1", "head 2", "lookup", "eagle", "backbone"]
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize(
    ("choice", "terminal", "environment", "wanted"),
    [
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"NO_COLOR": ""}, True),
        ("auto", True, {"TERM": "dumb"}, False),
        ("auto", False, {"FORCE_COLOR": "1"}, False),
        ("always", False, {"NO_COLOR": "1"}, True),
        ("never", True, {}, False),
    ],
)
def test_colours_are_for_terminals_unless_said_otherwise(monkeypatch, choice, terminal, environment, wanted):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert console.wants_colour(choice) is wanted


@pytest.mark.parametrize("decider", DECIDERS)
def test_coloured_text_is_the_text_and_each_piece_ends_its_colour(decider):
    for text in ("naïve – ", "日本", "語 🙂\n", "\ttab\r\n", "[bold]not markup[/bold]", " end"):
        written = console.paint(text, decider)
        assert ESCAPE.sub("", written) == text
        assert ("\x1b" in written) == (decider != "backbone")
        assert not written.startswith("\x1b") or written.endswith("\x1b[0m")


def test_the_legend_names_every_decider_in_its_colour_on_stderr(capsys):
    for coloured in (True, False):
        console.legend({"head 0": 3, "lookup": 4, "backbone": 5}, coloured)
        out, err = capsys.readouterr()
        assert out == ""
        assert ESCAPE.sub("", err) == "tokens by drafter: head 0 3, lookup 4, backbone 5\n"
        assert err.count("\x1b[0m") == 2 * coloured


def test_every_decider_looks_different_and_the_backbone_plain():
    looks = [palette.look(decider) for decider in DECIDERS]
    assert len(set(looks)) == len(DECIDERS)
    assert looks[-1] is None
    assert palette.look("head 9") is not None
    assert palette.look("something new") == palette.OTHER


@pytest.mark.parametrize("colour", [*palette.HEADS[:3], *(look.colour for look in palette.LOOKS.values())])
def test_colours_can_be_read_on_white_and_on_black(colour):
    """Contrast of at least 3 with both (WCAG asks that of large text)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) >= 3
    assert (luminance + 0.05) / 0.05 >= 3


def test_a_message_cannot_draw_on_the_terminal_or_fill_it(capsys):
    console.error("a\x1b[31m\u202eb\r\n" + "x" * 9000 + "\n" + "line\n" * 3000, "try \x07this")
    err = capsys.readouterr().err
    assert "a\\x1b[31m\\u202eb\\r" in err
    assert "try \\x07this" in err
    assert len(err.splitlines()) < 40
    assert len(err) < 3000
