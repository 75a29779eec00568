"""Numbers as people read them."""

from __future__ import annotations

ENDS = {"stop": "by itself", "length": "at the limit", None: "interrupted"}
"""How a text ended, by its finish reason."""


def verdict(identical: bool, bit_exact: bool) -> str:
    """How an answer compares with that of plain decoding."""
    return "bit-exact" if bit_exact else "same" if identical else "DIFFERENT"


def share(value: float | None) -> str:
    """A share in percent, a dash for none."""
    return "-" if value is None else f"{value:.1%}"


def rate(tokens_per_second: float | None) -> str:
    """Tokens a second, a dash for none."""
    if tokens_per_second is None:
        return "-"
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 1000 else f"{tokens_per_second:.1f}"
