"""One thread decodes for all: requests wait in one line, join between rounds, share passes, and leave when they are over.

Every answer is the one that its request would have alone (`decoding.batch`). What goes wrong in one ends that one.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import torch

from early_exit_cli.decoding.answer import collect_stats, plain_seconds
from early_exit_cli.decoding.batch import Batch
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.records import round_record
from early_exit_cli.decoding.text import Round, Text
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.drafter import Drafter
from early_exit_cli.engine import Engine
from early_exit_cli.numerics import synchronize
from early_exit_cli.serving.handle import Answer, Ended, Event, Handle, Piece, QueueFull, Stopping, Times

PATIENCE_SECONDS = 60
"""The longest that a client is told to wait before it asks again."""


class Live:
    """What there is of a live request's answer."""

    def __init__(self, engine: Engine, handle: Handle, text: Text, stream: TextStream, joined: float) -> None:
        self.engine, self.handle, self.text, self.stream = engine, handle, text, stream
        self.rounds: list[Round] = []
        self.joined = joined
        self.prefilled: float | None = None
        """When its prefill was finished."""
        self.first = 0.0
        """Seconds from the question to the first round's end."""
        self.is_alone = True
        """Whether no other one's passes were its own, or stood between them."""

    def push(self, step: Round) -> Piece:
        """A further round."""
        self.first = self.first or time.perf_counter() - self.handle.asked
        record: dict[str, Any] | None = None
        if self.handle.trace:
            position = self.text.prompt_tokens + sum(len(known.tokens) for known in self.rounds)
            record = round_record(self.engine, step, position)
        self.rounds.append(step)
        return Piece("".join(step.pieces), record)

    def end(self, mode: str, error: Exception | None, plain_pass: float | None) -> Ended:
        """It is over, and how it went."""
        now = time.perf_counter()
        prefilled = now if self.prefilled is None else self.prefilled
        times = Times(self.joined - self.handle.asked, prefilled - self.joined, now - prefilled)
        if not self.rounds:
            return Ended(times=times, error=error)
        rest = self.stream.finish()
        stats = collect_stats(
            self.engine, mode, self.rounds, self.text.prompt_tokens, times.whole, self.first, waited=True
        )
        answer = Answer(
            text=self.stream.text,
            token_ids=self.stream.ids,
            finish_reason=self.rounds[-1].finish_reason,
            prompt_tokens=stats.prompt_tokens,
            reused=self.text.prefill.reused,
            drafted=stats.tokens_drafted,
            accepted=stats.tokens_accepted,
            accept_length=stats.accept_length,
            first_seconds=stats.time_to_first_token_seconds,
            plain_seconds=self._plain_seconds(prefilled, plain_pass) if self.is_alone else None,
        )
        return Ended(rest, answer, times, error)

    def _plain_seconds(self, prefilled: float, a_pass: float | None) -> float | None:
        first_round = self.handle.asked + self.first - prefilled
        return None if a_pass is None else plain_seconds(self.rounds, first_round, a_pass)


class Scheduler:
    """Decodes what is submitted, `batch` texts at a time, in the order in which it came.

    Args:
        drafter: every text gets a fork of it.
        width: rows of one text in a pass, at most.
        queue: how many may wait.
        prefix_bytes: of what is kept of earlier texts; 0 keeps nothing.
        plain_pass: seconds of a pass of plain decoding, where answers are to be compared with it.
    """

    def __init__(
        self,
        engine: Engine,
        drafter: Drafter,
        width: int,
        *,
        batch: int,
        queue: int,
        prefix_bytes: int,
        plain_pass: float | None = None,
    ) -> None:
        self.engine, self.drafter, self.batch, self.queue = engine, drafter, batch, queue
        self.plain_pass = plain_pass
        self.prefixes = Prefixes(prefix_bytes) if prefix_bytes else None
        self.texts = Batch(engine, width=width, prefixes=self.prefixes)
        self.answers: dict[Text, Live] = {}
        self.line: deque[Handle] = deque()
        self.unfinished = 0
        """Requests that were taken and have no `Ended` yet."""
        self.draining = self.closing = False
        self.changed = threading.Condition()
        """Held where `line`, `unfinished` and `closing` are read and written."""
        self.thread = threading.Thread(target=self._work, name="decoding", daemon=True)

    def start(self) -> None:
        """From now on requests are answered."""
        self.thread.start()

    def submit(self, handle: Handle) -> None:
        """Take a request.

        Raises:
            QueueFull: as many wait as may. Stopping: `drain` or `close` was called.
        """
        with self.changed:
            if self.draining or self.closing:
                raise Stopping("the server is stopping")
            if len(self.line) >= self.queue:
                raise QueueFull(len(self.line), self._patience())
            self.line.append(handle)
            self.unfinished += 1
            self.changed.notify_all()

    def drain(self) -> None:
        """Take nothing more, finish what was taken. A signal handler may call it."""
        self.draining = True

    def close(self) -> None:
        """Give up what is not finished, with `Stopping`, and end the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join()

    @property
    def idle(self) -> bool:
        """Whether everything that was taken is over."""
        return self.unfinished == 0

    @property
    def waiting(self) -> int:
        return len(self.line)

    @property
    def live(self) -> int:
        return len(self.answers)

    @property
    def kept_bytes(self) -> int:
        return 0 if self.prefixes is None else self.prefixes.bytes

    def _patience(self) -> int:
        """Seconds after which there may be room: as long as the first in the line has waited."""
        return max(1, min(PATIENCE_SECONDS, round(time.perf_counter() - self.line[0].asked)))

    def _work(self) -> None:
        try:
            while self._wait():
                self._drop_cancelled()
                self._join_next()
                self._read()
                self._step()
        finally:  # closed, or by a fault of this file: nobody is left waiting
            with self.changed:
                self.draining = self.closing = True
            stopped = Stopping("the server was stopped before the answer was whole")
            for answer in [*self.answers.values()]:
                self._leave(answer, stopped)
            while self.line:
                self._tell(self.line.popleft(), Ended(error=stopped))

    def _wait(self) -> bool:
        """Until there is something to do; whether it is not the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.line or self.answers or self.closing)
            return not self.closing

    def _drop_cancelled(self) -> None:
        with self.changed:
            dropped = [handle for handle in self.line if handle.reason is not None]
            for handle in dropped:
                self.line.remove(handle)
        for handle in dropped:
            waited = Times(queue=time.perf_counter() - handle.asked)
            self._tell(handle, Ended(times=waited, error=handle.reason))
        for answer in [*self.answers.values()]:
            if answer.handle.reason is not None:
                self._leave(answer, answer.handle.reason, keep=True)

    def _join_next(self) -> None:
        """The first in the line, where there is room and no prompt is being read."""
        with self.changed:
            if not self.line or len(self.answers) >= self.batch or self._reading() is not None:
                return
            handle = self.line.popleft()
        joined = time.perf_counter()
        try:
            stream = TextStream(self.engine, handle.request.stop)
            text = self.texts.join(handle.request, self.drafter.fork(), prefill=False, stream=stream)
        except Exception as error:
            self._tell(handle, Ended(times=Times(queue=joined - handle.asked), error=error))
            return
        self.answers[text] = Live(self.engine, handle, text, stream, joined)

    def _reading(self) -> Live | None:
        """Whose prompt is being read; one at a time."""
        return next((answer for answer in self.answers.values() if answer.prefilled is None), None)

    def _read(self) -> None:
        """A pass of a prefill, so that a long prompt holds up the others for one pass a round."""
        answer = self._reading()
        if answer is None:
            return
        try:
            with torch.inference_mode():
                if not answer.text.prefill.done:
                    answer.text.prefill.run()
            for other in self.answers.values():
                other.is_alone &= other is answer
            if answer.text.prefill.done:
                synchronize(self.engine.backbone.device)
                answer.prefilled = time.perf_counter()
        except Exception as error:
            self._leave(answer, error)

    def _step(self) -> None:
        try:
            rounds = self.texts.step()
        except Exception:  # of one text, or of what they shared
            rounds = self.texts.step_apart()
        for text, step in rounds:
            answer = self.answers[text]
            answer.is_alone &= len(rounds) == 1
            try:
                if isinstance(step, Exception):
                    raise step
                piece = answer.push(step)
            except Exception as error:
                self._leave(answer, error)
                continue
            self._emit(answer.handle, piece)
            if text.ended:
                self._leave(answer, None, keep=True)

    def _leave(self, answer: Live, error: Exception | None, keep: bool = False) -> None:
        """An answer is over.

        Args:
            keep: what it computed is sound, and left to later ones.
        """
        del self.answers[answer.text]
        try:
            self.texts.leave(answer.text, keep=keep)
            ended = answer.end(self.drafter.name, error, self.plain_pass)
        except Exception as fault:
            ended = Ended(error=error or fault)
        self._tell(answer.handle, ended)

    def _tell(self, handle: Handle, ended: Ended) -> None:
        self._emit(handle, ended)
        with self.changed:
            self.unfinished -= 1

    def _emit(self, handle: Handle, event: Event) -> None:
        try:
            handle.on_event(event)
        except Exception as error:  # whoever listened is gone
            handle.cancel(Stopping(str(error)))
