"""What a training run needs of its surroundings: tracker, launcher, and being asked to stop."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from early_exit_cli.errors import ConfigError


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed, before anything loads.

    Raises:
        ConfigError: with the package to install.
    """
    package = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}.get(name)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"training.report_to = {name}: the package {package} is not installed", hint=f"pip install {package}"
        )


def check_launcher() -> None:
    """Refuse launchers that shard the model: 4-bit weights cannot be, and heads are small (bitsandbytes#1945).

    Raises:
        ConfigError
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise ConfigError(
                f"training runs under DDP only, and accelerate was told to use {name}",
                hint="accelerate launch --config_file configs/ddp_config.yaml -m early_exit_cli train",
            )


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a question to ask between steps; a second one ends the process at once.

    An interrupt raised in the middle of a step may fall into a callback of a library and be lost there.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
