"""Errors a person sees: what happened, and the next thing to do.

Every class carries its exit code: 1 the run failed, 2 usage or configuration, 3 a quality target was missed.
They are raised anywhere and caught in one place, `cli.app.main`.
"""

from __future__ import annotations


class EexitError(Exception):
    """Base of all errors that are shown as one line. `hint` is the next command or flag to try."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


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


class TargetMissedError(EexitError):
    """A demanded quality was not reached (`--strict`)."""

    exit_code = 3
