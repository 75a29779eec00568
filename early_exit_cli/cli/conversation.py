"""A conversation with a loaded model: its turns, what is asked next, and what earlier turns have computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from early_exit_cli.backbone.chat import Message
from early_exit_cli.cli.job import Job
from early_exit_cli.errors import ConfigError, DataError
from early_exit_cli.files.atomic import parse_json, read_text, write_json

if TYPE_CHECKING:
    from early_exit_cli.decoding.answer import Generation
    from early_exit_cli.decoding.prefixes import Prefixes

OnText = Callable[[str, str], None]


@dataclass
class Conversation:
    """Turns of a system, a user and an assistant, answered one after another.

    messages: as chat templates read them. prefixes: keys and values of earlier turns, which the next one takes over.
    """

    job: Job
    prefixes: Prefixes
    system: str | None
    messages: list[Message] = field(default_factory=list)
    answers: list[Generation] = field(default_factory=list)
    """Of this session, in their order, taken back ones too."""
    tries: int = 0
    """How often the last turn was answered before."""
    file: Path | None = None
    """Where it was saved to or loaded from."""

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forget the turns, but for what the system says."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.file = None

    def ask(self, text: str, on_text: OnText) -> Generation:
        """A turn of the user, and its answer. What cannot be asked leaves the conversation as it was.

        Raises:
            ConfigError: beyond the context. BackboneError: the chat template refuses it.
            Interrupted: the answer was stopped; what there is of it stays.
        """
        self.tries = 0
        self.messages.append({"role": "user", "content": text})
        try:
            return self._answer(on_text)
        except BaseException:
            if self.messages[-1]["role"] == "user":  # not even a part of an answer
                self.messages.pop()
            raise

    def retry(self, on_text: OnText) -> Generation:
        """Another answer to the last turn: with the next seed where tokens are sampled, else the same.

        Raises:
            ConfigError: there is none. As for `ask`.
        """
        if self._asked() is None:
            raise ConfigError("nothing was asked yet")
        taken = self.messages.pop() if self.messages[-1]["role"] == "assistant" else None
        self.tries += 1
        try:
            return self._answer(on_text)
        except BaseException:
            if taken and self.messages[-1]["role"] == "user":
                self.messages.append(taken)
            raise

    def undo(self) -> str:
        """Take back the last turn of the user and its answer; returns what the user had said.

        Raises:
            ConfigError: there is none.
        """
        asked = self._asked()
        if asked is None:
            raise ConfigError("nothing was asked yet")
        text: str = self.messages[asked]["content"]
        del self.messages[asked:]
        return text

    def save(self, path: Path) -> None:
        """Write the turns as JSON.

        Raises:
            ConfigError: the file is there already and is no conversation of this session, or cannot be written.
        """
        if path.exists() and path != self.file:
            raise ConfigError(f"{path} exists already")
        try:
            write_json(path, {"model": self.job.engine.backbone.name, "messages": self.messages})
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        self.file = path

    def load(self, path: Path) -> None:
        """Go on with a conversation as `save` writes it, or in another usual form (`data.conversations`).

        Raises:
            DataError: not readable, or no conversation.
        """
        from early_exit_cli.data.conversations import UnreadableRow, read_row

        try:
            row = parse_json(read_text(path))
            sample = read_row(row if isinstance(row, dict) else {"messages": row})
        except UnreadableRow as error:
            raise DataError(f"{path} is no conversation: {error}") from error
        except ValueError as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        if not sample.messages:
            raise DataError(f"{path} is no conversation: it holds one text")
        self.messages, self.file = [dict(message) for message in sample.messages], path

    def plain_seconds(self, run: Generation) -> float:
        """What plain decoding would have taken for an answer, by the costs of passes measured here."""
        from early_exit_cli.decoding.answer import plain_seconds
        from early_exit_cli.drafting.costs import plain_pass_seconds

        return plain_seconds(run.rounds, run.stats.time_to_first_token_seconds, plain_pass_seconds(self.job.engine))

    def context_used(self) -> tuple[int, int]:
        """Tokens of the conversation so far, and of the model's context."""
        backbone = self.job.engine.backbone
        return len(backbone.encode_prompt(self.messages)) if self.messages else 0, backbone.context_length

    def _asked(self) -> int | None:
        """Where the last turn of the user stands."""
        return max((place for place, turn in enumerate(self.messages) if turn["role"] == "user"), default=None)

    def _answer(self, on_text: OnText) -> Generation:
        from early_exit_cli.decoding.answer import Interrupted

        job = self.job
        ids = job.engine.backbone.encode_prompt(self.messages)
        room = job.engine.backbone.context_length - len(ids)
        if room < 1:
            raise ConfigError(
                f"the conversation's {len(ids):,} tokens fill the context of {job.engine.backbone.context_length:,}",
                hint="/undo takes a turn back, /new begins another conversation",
            )
        sampling = job.sampling.model_copy(update={"seed": job.sampling.seed + self.tries})
        request = dataclasses.replace(job, sampling=sampling).request(ids, self.messages)
        request = dataclasses.replace(request, max_new_tokens=min(job.settings.max_tokens, room))
        try:
            run = job.generate(request, prefixes=self.prefixes, on_text=on_text)
        except Interrupted as interruption:
            self._take(interruption.generation)
            raise
        self._take(run)
        return run

    def _take(self, run: Generation) -> None:
        self.messages.append({"role": "assistant", "content": run.text})
        self.answers.append(run)


def totals(answers: list[Generation]) -> dict[str, Any]:
    """What the answers of a session add up to."""
    tokens = sum(run.stats.total_tokens_generated for run in answers)
    seconds = sum(run.stats.total_time_seconds for run in answers)
    rounds = sum(len(run.rounds) for run in answers)
    return {
        "answers": len(answers),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "accept_length": tokens / rounds if rounds else None,
    }
