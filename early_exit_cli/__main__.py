"""The process of `eexit`, and of `python -m early_exit_cli`, so that `accelerate launch -m early_exit_cli train ...` works."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, NoReturn


def main() -> None:
    """Entry point of `eexit`."""
    if "LOCAL_RANK" not in os.environ:  # one process of several may wait for the others where no handler runs
        signal.signal(signal.SIGTERM, _end)
    try:
        from early_exit_cli.cli import app  # now: it takes half a second, in which somebody may press Ctrl-C

        app.main()
    except KeyboardInterrupt:
        sys.exit(130)


def _end(number: int, _frame: Any) -> NoReturn:
    """End as a shell expects it of a signal, with what is half written removed and child processes ended."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
