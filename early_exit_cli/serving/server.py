"""The server's life: a socket before the model is loaded, then uvicorn; the first signal finishes what was taken."""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import Any, Protocol

import uvicorn

from early_exit_cli.errors import ConfigError
from early_exit_cli.serving.security import MOST_HEADER_BYTES

GRACE_SECONDS = 10
"""For answers that are whole to be sent, once nothing is decoded any more."""
IDLE_SECONDS = 30.0
"""After which a connection that has not sent the whole head of a request is closed."""


class Draining(Protocol):
    """Of a scheduler."""

    @property
    def idle(self) -> bool: ...

    def drain(self) -> None: ...


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound and not yet heard.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        is_v6 = ipaddress.ip_address(host).version == 6
    except ValueError:  # a name
        is_v6 = False
    # TCP by name: asyncio turns Nagle's algorithm off on such sockets alone, and with it a chunk may wait 40 ms for the client
    family = socket.AF_INET6 if is_v6 else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror}", hint="--port, --host") from error
    return found


def address_of(bound: socket.socket) -> str:
    """Where clients find a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Ends when a signal came and everything that was taken is over; at once with the second signal.

    Args:
        idle_seconds: after which a connection that asks nothing is closed.
    """

    def __init__(self, app: Any, scheduler: Draining, idle_seconds: float = IDLE_SECONDS) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,  # of a head that comes in pieces
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self.scheduler, self.idle_seconds = scheduler, idle_seconds
        self.signals = 0
        self.idle: dict[tuple[Any, Any], float] = {}
        """When each connection was first seen without a request, by its last one."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.signals += 1
        self.scheduler.drain()
        if self.signals > 1:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        if self.signals and self.scheduler.idle:
            self.should_exit = True
        self._close_idle()
        return await super().on_tick(counter)

    def _close_idle(self) -> None:
        now = time.monotonic()
        connections: list[Any] = [*self.server_state.connections]
        asking_nothing = [one for one in connections if one.cycle is None or one.cycle.response_complete]
        self.idle = {(one, one.cycle): self.idle.get((one, one.cycle), now) for one in asking_nothing}
        for (connection, _), since in self.idle.items():
            if now - since > self.idle_seconds:
                connection.transport.close()
