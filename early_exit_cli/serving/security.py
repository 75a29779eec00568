"""Who may ask: with the key, from this machine, and not a page of the web that nobody named."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers

from early_exit_cli.errors import ConfigError
from early_exit_cli.serving.refusal import Refusal

OPEN_ROUTES = ("/health", "/")
"""That need no key: they say nothing of the model, and run nothing."""
MOST_HEADER_BYTES = 32 * 1024
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(host: str, key: str | None, allow_without_key: bool) -> None:
    """Refuse an address that others reach where no key is asked for.

    Raises:
        ConfigError
    """
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise ConfigError("the key must be printable ASCII without spaces")
    if not is_local(host) and key is None and not allow_without_key:
        raise ConfigError(
            f"{host} is reached from other machines, and no key is asked for",
            hint="EEXIT_API_KEY=... eexit serve --host ...; --allow-without-key lets everybody ask",
        )


class Guard:
    """Refuses what may not ask.

    A page of another origin is refused even where it could not read the answer: the model would run for it. Without a key,
    so is a request to another name than this machine's own, behind which such a page could hide (DNS rebinding).

    Args:
        origins: pages that may ask.
        names: hosts that a request may be for; all where it is empty.
    """

    def __init__(self, key: str | None, origins: Sequence[str], names: Sequence[str]) -> None:
        self.key, self.origins, self.names = None if key is None else key.encode(), origins, names

    def check(self, scope: Any) -> None:
        """
        Raises:
            Refusal: 401, 403, 431.
        """
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            message = f"the headers have more than {MOST_HEADER_BYTES:,} bytes"
            raise Refusal(431, message, code="headers_too_large")
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.names and _name_of(host) not in self.names:
            raise Refusal(403, "this server answers requests to localhost only", code="host_not_allowed")
        allowed = {"*", origin} & {*self.origins}
        if origin is not None and not allowed and origin.partition("://")[2] != host:
            raise Refusal(403, "this page's origin may not ask (--cors-origin)", code="origin_not_allowed")
        if self.key is not None and scope["path"] not in OPEN_ROUTES:
            kind, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), self.key)
            if kind.lower() != "bearer" or not is_right:
                raise Refusal(
                    401, "a key is needed, and this is none (Authorization: Bearer KEY)", code="invalid_api_key"
                )


def _name_of(host: str) -> str:
    """A Host header without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()
