"""`eexit chat`: a conversation with a model that stays loaded. Answers go to stdout, all else to stderr."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from early_exit_cli.cli import show
from early_exit_cli.cli.conversation import Conversation, OnText, totals
from early_exit_cli.cli.options import configured
from early_exit_cli.cli.prepare import prepare
from early_exit_cli.config import InferenceConfig
from early_exit_cli.errors import ConfigError, EexitError, StepError, doing
from early_exit_cli.files.environment import kept_path
from early_exit_cli.report import console
from early_exit_cli.report.answer_text import AnswerWriter
from early_exit_cli.report.line_editor import piped_turns, typed_turns
from early_exit_cli.report.numbers import rate
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.decoding.answer import Generation

HELP = {
    "/new": "begin another conversation; what the system says stays",
    "/retry": "answer the last turn again; sampled, with the next seed",
    "/undo": "take back the last turn and its answer",
    "/stats": "speed and size of this session",
    "/save FILE": "write the conversation to a new file",
    "/load FILE": "go on with a conversation from a file",
    "/help": "this list",
}
COMMANDS = [line.split()[0] for line in HELP]


@configured(
    *("chat", "sampling", "bundle", "backbone"),
    examples=('eexit chat --system "Be brief."', "eexit chat --temperature 0.8 < questions.txt"),
)
def command(resolved: Resolved, as_json: bool) -> None:
    """Talk with the model: a line is a turn, /help lists commands, Ctrl-C stops an answer, Ctrl-D ends."""
    settings = resolved.config.chat
    asked = {name: getattr(settings, name) for name in ("drafter", "max_tokens", "stop", "color")}
    config = resolved.config.model_copy(update={"inference": InferenceConfig(**asked)})
    job = prepare(dataclasses.replace(resolved, config=config), as_json)
    from early_exit_cli.decoding.prefixes import Prefixes

    chat = Chat(Conversation(job, Prefixes(int(settings.prefix_gb * 1e9)), settings.system))
    if settings.load is not None:
        chat.conversation.load(settings.load)
    chat.talk()


class Chat:
    """What is typed, and what is shown of it."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation, self.job = conversation, conversation.job
        self.writer = AnswerWriter(self.job.coloured)
        self.explained = False
        self.failed = 0
        self.is_typed = sys.stdin.isatty()

    def talk(self) -> None:
        """Until the input ends.

        Raises:
            StepError: turns of a pipe that have no answer, after all were read.
        """
        if self.is_typed:
            console.note(f"{self.job.title}: /help lists commands, Alt-Enter begins a line, Ctrl-D ends")
        turns = typed_turns(kept_path("chat", "history"), COMMANDS) if self.is_typed else piped_turns()
        for turn in turns:
            if not turn.strip():
                continue
            try:
                with doing("answering"):
                    self.take(turn)
            except EexitError as error:
                self.failed += 1
                console.error(error.message, error.hint)
        if self.failed and not self.is_typed:
            raise StepError(f"{self.failed} lines were not answered")

    def take(self, turn: str) -> None:
        """A turn, or a command; `//` begins a turn with a slash."""
        if turn.startswith("/") and not turn.startswith("//"):
            self.obey(turn)
        else:
            self.show_answer(lambda on_text: self.conversation.ask(turn.removeprefix("/"), on_text))

    def obey(self, line: str) -> None:
        """Run a command.

        Raises:
            ConfigError: no such command, or without what it needs.
        """
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise ConfigError(f"{line}: {error}") from error
        if name not in COMMANDS:
            raise ConfigError(f"no command {name}", hint="/help; a turn that begins with a slash begins with two")
        takes_file = name in ("/save", "/load")
        if len(words) != takes_file:
            raise ConfigError(f"{name} takes {'one file' if takes_file else 'nothing'}")
        conversation = self.conversation
        if name == "/new":
            conversation.start()
        elif name == "/retry":
            self.show_answer(conversation.retry)
        elif name == "/undo":
            console.note(f"taken back: {console.shortened(conversation.undo())}")
        elif name == "/stats":
            self.show_statistics()
        elif name == "/save":
            conversation.save(Path(words[0]).expanduser())
            console.note(f"written: {words[0]}")
        elif name == "/load":
            conversation.load(Path(words[0]).expanduser())
            console.note(f"{len(conversation.messages)} turns of {words[0]}")
        else:
            console.table("", ["", ""], list(HELP.items()))

    def show_answer(self, answer: Callable[[OnText], Generation]) -> None:
        """An answer as it comes, and a line about it. Ctrl-C stops it and keeps the session."""
        from early_exit_cli.decoding.answer import Interrupted

        as_json = self.job.as_json
        try:
            run = answer((lambda piece, decider: None) if as_json else self.writer.write)
        except Interrupted as interruption:
            run = interruption.generation
        except KeyboardInterrupt:
            console.note("stopped before the first token")
            return
        finally:
            if not as_json:
                self.writer.end()
        if as_json:
            console.emit_json_line(run.record())
            return
        if not self.explained:
            show.legend(run.stats, self.job.coloured)
            self.explained = True
        console.note(self.line_of(run))

    def line_of(self, run: Generation) -> str:
        """Speed of an answer, and of plain decoding by what passes cost here."""
        stats = run.stats
        parts = [f"{stats.total_tokens_generated} tokens, {rate(stats.tokens_per_second)} tokens/s"]
        parts.append(f"first token after {stats.time_to_first_token_seconds * 1000:,.0f} ms")
        if stats.tokens_drafted:
            plain = self.conversation.plain_seconds(run)
            parts.append(f"accept length {stats.accept_length:.2f}")
            parts.append(f"plain decoding, undisturbed: {rate(stats.total_tokens_generated / plain)}")
        if run.finish_reason != "stop":
            parts.append("interrupted" if run.finish_reason is None else "cut at the limit (--max-tokens)")
        return "; ".join(parts)

    def show_statistics(self) -> None:
        """Of the session."""
        found, prefixes = totals(self.conversation.answers), self.conversation.prefixes
        used, context = self.conversation.context_used()
        rows = [
            ("answers", str(found["answers"])),
            ("tokens", f"{found['tokens']:,}"),
            ("tokens/s", rate(found["tokens_per_second"])),
            ("accept length", "-" if found["accept_length"] is None else f"{found['accept_length']:.2f}"),
            ("context", f"{used:,} of {context:,} tokens"),
            ("kept of earlier turns", f"{prefixes.bytes / 1e6:,.1f} MB"),
        ]
        console.table("", ["", ""], rows)
