"""Pages from Jinja templates of this folder: everything that is filled in is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from early_exit_cli.report.palette import BAD, GOOD, look

HERE = Path(__file__).parent


def render(name: str, known: dict[str, Any]) -> str:
    """A template of this folder, with what it asks for."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def finalize(value: Any) -> Markup:
        """Escaped for elements and attributes; a carriage return would otherwise become a newline, a NUL is no text."""
        if isinstance(value, Markup):
            return value
        return Markup(str(escape(value)).replace("\r", "&#13;").replace("\0", "&#65533;"))

    frame = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    frame.filters |= {"class": class_of}
    return frame.get_template(name).render(known, good=GOOD, bad=BAD)


def class_of(decider: str) -> str:
    """What elements of a decider are marked with."""
    return "by-" + "".join(character if character.isalnum() else "-" for character in decider)


def line_classes(decider: str) -> list[str]:
    """What the elements of its tokens have besides, for the line under them."""
    seen = look(decider)
    if seen is None:
        return []
    return ["d"] if seen.line == "none" else ["d", seen.line]


def colour_of(decider: str) -> str:
    seen = look(decider)
    return seen.colour if seen else "var(--backbone)"
