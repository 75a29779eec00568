"""The process of `eexit`, and of `python -m early_exit_cli`, so that `accelerate launch -m early_exit_cli train ...` works.

Libraries and a model make objects by the million while they load, and nearly all of them stay. Python would search them for
garbage again and again, a second or two of every start, and once more at the end. So what has loaded is set aside.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from early_exit_cli.steps import Step


def main() -> None:
    """Entry point of `eexit`."""
    if "LOCAL_RANK" not in os.environ:  # one process of several may wait for the others where no handler runs
        signal.signal(signal.SIGTERM, _end)
    gc.disable()
    atexit.register(gc.freeze)
    try:
        from early_exit_cli.cli import app  # now: it takes half a second, in which somebody may press Ctrl-C
        from early_exit_cli.steps import told_to

        with told_to(_search_between_steps):
            app.main()
    except KeyboardInterrupt:
        sys.exit(130)


def _search_between_steps(now: Step | None) -> None:
    """Garbage is searched for only where nothing loads, among what came since."""
    if now is not None:
        gc.disable()
    else:
        gc.freeze()
        gc.enable()


def _end(number: int, _frame: Any) -> NoReturn:
    """End as a shell expects it of a signal, with what is half written removed and child processes ended."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
