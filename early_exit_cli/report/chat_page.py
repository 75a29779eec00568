"""The page of `eexit serve`: a conversation in a browser, each token in the look of who decided it.

`chat.html`, `chat.css` and `chat.js` become one page that asks nobody but its own server, and nothing of it depends on the
model or the key. What the two pages share stands in `tokens.css`, `tip.js` and `palette.py`.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

from early_exit_cli.report.palette import HEADS, LOOKS
from early_exit_cli.report.templates import class_of, colour_of, line_classes, render

OTHER = "other"
"""In place of a decider that the palette does not name."""


@dataclass(frozen=True)
class ChatPage:
    """policy: the Content-Security-Policy that the page is to be sent with; it runs under no looser one."""

    html: str
    policy: str


def render_chat_page() -> ChatPage:
    """The page, the same for every model."""
    from markupsafe import Markup

    deciders = [*(f"head {number}" for number in range(len(HEADS))), *LOOKS, OTHER, "backbone"]
    style = Markup(render("chat.css", {"colours": {decider: colour_of(decider) for decider in deciders}}))
    script = Markup(render("chat.js", {}))
    looks = {decider: " ".join(["t", class_of(decider), *line_classes(decider)]) for decider in deciders}
    known = {"looks": looks, "heads": len(HEADS), "other": OTHER}
    rules = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        *(f"{name} 'none'" for name in ("base-uri", "form-action", "frame-ancestors")),
    ]
    html = render("chat.html", {"style": style, "script": script, "known": known})
    return ChatPage(html, "; ".join(rules))


def _hash(source: str) -> str:
    """How a policy names the one inline style or script that may be used."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"
