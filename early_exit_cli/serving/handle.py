"""What passes between the server and the thread that decodes: a request with its handle one way, events the other.

An `Exchange` is the event loop's end of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from early_exit_cli.decoding.text import FinishReason, Request
from early_exit_cli.errors import EexitError


class QueueFull(EexitError):
    """As many requests wait as may."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.retry_after = retry_after


class Stopping(EexitError):
    """The server takes no more requests, or gives up the ones it has."""


class HungUp(EexitError):
    """Nobody waits for the answer any more."""


class TooLate(EexitError):
    """The request took longer than any may."""


@dataclass(frozen=True)
class Piece:
    """A round of an answer. text: what became certain with it. record: `round_record`, where that was asked for."""

    text: str
    record: dict[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """What was decoded, as plain data.

    finish_reason: None where it is not whole. reused: tokens of the prompt that an earlier request had computed.
    first_seconds: from the request to the first token. plain_seconds: what plain decoding would have taken from the prefill
    to the end, by measured costs; None where these are not known, or where other answers shared the passes.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    reused: int
    drafted: int
    accepted: int
    accept_length: float
    first_seconds: float
    plain_seconds: float | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of a request: in the queue, of its prefill, of its rounds. The last hold the rows of others in its passes."""

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0

    @property
    def whole(self) -> float:
        """All of them."""
        return self.queue + self.prefill + self.decode


@dataclass(frozen=True)
class Ended:
    """An answer is over; nothing comes after it.

    text: the rest of it, which no `Piece` had. answer: as far as it came; None where nothing was decoded. error: why it is
    not whole.
    """

    text: str = ""
    answer: Answer | None = None
    times: Times = field(default_factory=Times)
    error: Exception | None = None


Event = Piece | Ended


class Handle:
    """One request, from when it was asked to its `Ended`.

    Args:
        on_event: called in the thread that decodes with each `Piece`, and at last with `Ended`.
        trace: whether pieces say who decided each token.
    """

    def __init__(self, request: Request, on_event: Callable[[Event], None], trace: bool = False) -> None:
        self.request, self.on_event, self.trace = request, on_event, trace
        self.asked = time.perf_counter()
        self.reason: EexitError | None = None
        """Why it was cancelled."""

    def cancel(self, reason: EexitError) -> None:
        """It ends before its next round, with this error; nothing where it is over already."""
        self.reason = self.reason or reason


class Answering(Protocol):
    """What the server asks of whoever decodes; `Scheduler` is it."""

    def submit(self, handle: Handle) -> None:
        """Take a request.

        Raises:
            QueueFull, Stopping
        """

    @property
    def waiting(self) -> int:
        """Requests in the queue."""

    @property
    def live(self) -> int:
        """Texts that are decoded."""

    @property
    def draining(self) -> bool:
        """Whether new requests are refused."""

    @property
    def kept_bytes(self) -> int:
        """What is kept of earlier requests."""


class Exchange:
    """Submits a request, and cancels it where the client hangs up or it takes longer than `seconds`.

    Args:
        gone: returns when the client has hung up.
        on_ended: called once, in the event loop, when it is over, whoever still listens.

    Raises:
        QueueFull, Stopping: it was not taken.
    """

    def __init__(
        self,
        answering: Answering,
        request: Request,
        *,
        gone: Callable[[], Awaitable[None]],
        trace: bool,
        seconds: float,
        on_ended: Callable[[Ended], None],
    ) -> None:
        self.loop, self.on_ended = asyncio.get_running_loop(), on_ended
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.handle = Handle(request, self._from_thread, trace)
        answering.submit(self.handle)
        late = TooLate(f"no whole answer within {seconds:g} s")
        self.timer = self.loop.call_later(seconds, self.handle.cancel, late)
        self.watcher = asyncio.create_task(self._watch(gone))

    async def events(self) -> AsyncIterator[Event]:
        """Every `Piece`, and at last `Ended`."""
        try:
            while True:
                event = await self.queue.get()
                yield event
                if isinstance(event, Ended):
                    return
        finally:  # also where whoever reads these is cancelled
            self.handle.cancel(HungUp("nobody listens"))

    def _from_thread(self, event: Event) -> None:
        self.loop.call_soon_threadsafe(self._take, event)

    def _take(self, event: Event) -> None:
        self.queue.put_nowait(event)
        if isinstance(event, Ended):
            self.timer.cancel()
            self.watcher.cancel()
            self.on_ended(event)

    async def _watch(self, gone: Callable[[], Awaitable[None]]) -> None:
        await gone()
        self.handle.cancel(HungUp("the client hung up"))
