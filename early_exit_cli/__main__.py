"""The process of `eexit`, and of `python -m early_exit_cli`, so that `accelerate launch -m early_exit_cli train ...` works.

Libraries and a model make objects by the million while they load, and nearly all of them stay. Python would search them for
garbage again and again, a second or two of every start, and once more at the end. So what has loaded is set aside.
"""

from __future__ import annotations

import atexit
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from early_exit_cli.steps import Step


def main() -> None:
    """Entry point of `eexit`."""
    gc.disable()
    atexit.register(gc.freeze)
    from early_exit_cli.cli import app  # now: its libraries, too, load unsearched
    from early_exit_cli.steps import told_to

    with told_to(_search_between_steps):
        app.main()


def _search_between_steps(now: Step | None) -> None:
    """Garbage is searched for only where nothing loads, among what came since."""
    if now is not None:
        gc.disable()
    else:
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    main()
