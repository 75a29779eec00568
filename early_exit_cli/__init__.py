"""eexit: early exits and self-speculative decoding for 4-bit causal language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from early_exit_cli.library import EarlyExitModel

__all__ = ["EarlyExitModel", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`EarlyExitModel` on first use: importing the package loads no torch."""
    if name == "EarlyExitModel":
        from early_exit_cli.library import EarlyExitModel

        return EarlyExitModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
