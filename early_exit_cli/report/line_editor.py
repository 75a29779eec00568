"""Lines that a person types: with history, several lines a turn, and completion of commands; or those of a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from early_exit_cli.errors import DataError
from early_exit_cli.report.status import make_room

PROMPT, CONTINUED = "> ", ". "


def typed_turns(history: Path, words: Sequence[str]) -> Iterator[str]:
    """What is typed in a terminal, a turn at a time, until Ctrl-D. Enter ends a turn, Alt-Enter a line of it; Ctrl-C empties
    the line.

    Args:
        history: file that remembers turns. words: commands to complete.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    remembered: History
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        remembered = FileHistory(str(history))
    except OSError:
        remembered = InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=remembered,
        key_bindings=keys,
        multiline=True,
        prompt_continuation=CONTINUED,
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        auto_suggest=AutoSuggestFromHistory(),
    )
    while True:
        make_room()
        try:
            yield session.prompt(PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def piped_turns() -> Iterator[str]:
    """The lines of standard input, a turn each.

    Raises:
        DataError: not text.
    """
    try:
        for line in sys.stdin:
            yield line.removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error
