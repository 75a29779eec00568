"""Errors a person sees: what happened, and the next thing to do.

Every class carries its exit code: 1 the run failed, 2 usage or configuration, 3 a quality target was missed.
They are raised anywhere and caught in one place, `cli.app.main`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class EexitError(Exception):
    """Base of all errors that are shown as one line. `hint` is the next command or flag to try."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class EexitWarning(UserWarning):
    """What a person should know although everything goes on; the command shows it as one line, once."""


class ConfigError(EexitError):
    """A flag, a configuration file or a prompt that cannot be used; nothing was loaded or written."""

    exit_code = 2


class BackboneError(EexitError):
    """The backbone cannot be found, loaded or run."""


class UnsupportedBackboneError(ConfigError):
    """The backbone's family has no block runner here."""


class BundleError(EexitError):
    """A bundle file is missing, damaged, or belongs to another backbone."""


class DataError(ConfigError):
    """A data set or prompt file that cannot be read, or that holds nothing usable."""


class NumericsError(EexitError):
    """NaN or infinity where a finite number is needed."""


class CheckpointError(EexitError):
    """A training checkpoint that cannot be written or resumed from."""


class CacheError(EexitError):
    """A cache of hidden states that is damaged, incomplete, made otherwise, or too large for the disk."""


class HubError(EexitError):
    """The Hub cannot be reached, refuses, or does not hold what was asked for."""


class StepError(EexitError):
    """A step in which a library failed in a way of its own, with its message."""


class TargetMissedError(EexitError):
    """A demanded quality was not reached (`--strict`)."""

    exit_code = 3


class _Short(reprlib.Repr):
    """`repr` of bounded length and depth, also of numbers of so many digits that Python refuses to write them."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"a number of {x.bit_length()} bits"


def shown(value: Any) -> str:
    """A value as a message shows it: `repr`, cut where it is long or deep. A file may hold anything."""
    return _Short().repr(value)


def said(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    text = " ".join(str(error).split())[:300]
    kind = type(error).__name__
    return (
        f"{kind}: {text}" if text and isinstance(error, LookupError | AssertionError | AttributeError) else text or kind
    )


@contextmanager
def doing(step: str) -> Iterator[None]:
    """Name a step: whatever a library raises in the block becomes one line with it. Errors of ours and of the operating
    system say themselves what happened.

    Raises:
        StepError: from the library's exception.
    """
    try:
        yield
    except (EexitError, OSError):
        raise
    except Exception as error:
        raise StepError(f"{step}: {said(error)}") from error
