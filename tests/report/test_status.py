"""The line that says what is being done: in a terminal only, and never in the way of anything else."""

import os
import sys

import pytest
from terminal import Terminal

from early_exit_cli.report import console, status
from early_exit_cli.steps import step


@pytest.fixture
def make_terminal(monkeypatch):
    """Makes stderr a terminal, in the test itself: pytest sets its own stream again before that begins."""

    def make():
        screen = Terminal(60)
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(screen, "fileno", lambda: 2)
        monkeypatch.setattr(os, "get_terminal_size", lambda *number: os.terminal_size((60, 24)))
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "60")
        return screen

    return make


def test_the_innermost_step_is_shown_until_it_ends(make_terminal):
    terminal = make_terminal()
    with status.status_line():
        with step("loading a model"):
            assert terminal.lines == ["loading a model ..."]
            with step("compiling") as compiling:
                assert terminal.lines == ["compiling ..."]
                compiling.say("compiling, 2 of 3")
                assert terminal.lines == ["compiling, 2 of 3 ..."]
            assert terminal.lines == ["loading a model ..."]
        assert terminal.lines == [""]


def test_a_step_that_takes_long_shows_its_seconds(make_terminal, monkeypatch):
    terminal = make_terminal()
    clock = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])
    with status.status_line(), step("measuring"):
        clock[0] += 61.0
        (line,) = status._shown
        line.draw()
        assert terminal.lines == ["measuring ... 61 s"]


def test_what_is_written_meanwhile_stands_on_a_line_of_its_own(make_terminal):
    terminal = make_terminal()
    with status.status_line(), step("loading a model"):
        console.note("a note")
        console.warn("a warning")
        assert terminal.lines == ["a note", "warning: a warning", ""]
        (line,) = status._shown
        line.draw()
        assert terminal.lines == ["a note", "warning: a warning", "loading a model ..."]
    assert terminal.lines == ["a note", "warning: a warning", ""]


def test_a_step_with_bars_of_its_own_is_named_above_them(make_terminal):
    terminal = make_terminal()
    with status.status_line(), step("downloading", has_bars=True):
        (line,) = status._shown
        line.draw()
        assert terminal.lines == ["downloading", ""]


def test_a_long_step_is_cut_at_the_edge(make_terminal):
    terminal = make_terminal()
    with status.status_line(), step("loading " + "x" * 100):
        assert len(terminal.lines) == 1
        assert len(terminal.lines[0]) < 60


def test_nothing_is_drawn_beside_a_progress_bar_and_notes_stand_above_it(make_terminal):
    terminal = make_terminal()
    with status.status_line(), step("training"):
        with console.progress("training", 4) as ticker:
            for done in range(1, 5):
                ticker.update(done, "423 tokens/s")
                console.note(f"step {done}: better")
        said = [line for line in terminal.getvalue().replace("\r", "\n").split("\n") if "better" in line]
        assert len(said) == 4
        assert not any("tokens/s" in line for line in said)
        assert "training ..." not in terminal.getvalue().replace("training ...", "", 1)


def test_elsewhere_than_in_a_terminal_nothing_is_said(capsys):
    with status.status_line(), step("loading"):
        pass
    assert capsys.readouterr() == ("", "")
