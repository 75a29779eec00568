"""`eexit` commands, run by their entry point: here in the tests' process, or in a process of their own.

Importing torch and transformers takes a process seconds, so a command runs here unless what is tested is the process: its
two streams, a signal, a terminal, a launcher. Both ways name the CPU wherever a test names no device.
"""

import contextlib
import io
import os
import signal
import subprocess
import sys
import warnings
from functools import cache
from typing import Any
from unittest import mock

import typer

from early_exit_cli.cli import app

Answer = tuple[int, str, str]
"""Exit code, stdout, stderr."""
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
"""For each of the launcher's processes."""


def words_of(*arguments: Any) -> list[str]:
    """A command's words, with the CPU named where the command takes a device and names none."""
    words = [str(argument) for argument in arguments]
    names_one = any(word.startswith(("--device", "backbone.device=")) for word in words)
    return words if names_one or not _takes_a_device(*words[:2]) else [*words, "--device", "cpu"]


@cache
def _takes_a_device(*words: str) -> bool:
    command: Any = typer.main.get_command(app.app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return any("--device" in option.opts for option in command.params)


def command_line(*arguments: Any, launcher: tuple[str, ...] = ()) -> list[str]:
    """What starts the command in a process of its own, or in those of a launcher."""
    return [sys.executable, *launcher, "-m", "early_exit_cli", *words_of(*arguments)]


def eexit(*arguments: Any, stdin: str = "", **environment: str) -> Answer:
    """Run a command in this process. What is no clear error is raised.

    Args:
        environment: added for this command. What a library reads once, as it is imported, needs a process.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["eexit", *words_of(*arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            app.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()


def output_of(*arguments: Any) -> str:
    """stdout of a command that runs in this process and succeeds."""
    code, out, err = eexit(*arguments)
    assert code == 0, err
    return out


def eexit_process(*arguments: Any, stdin: str = "", launcher: tuple[str, ...] = (), **environment: str) -> Answer:
    """Run a command in a process of its own, or in those of a launcher."""
    result = subprocess.run(
        command_line(*arguments, launcher=launcher),
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )
    return result.returncode, result.stdout, result.stderr


def two_processes(*arguments: Any, **environment: str) -> Answer:
    """Run a command as `accelerate launch` does: that needs MPI for processes on a CPU, torch's launcher does not."""
    return eexit_process(*arguments, launcher=LAUNCHER, **{**ONE_THREAD, **environment})


def hear_ctrl_c() -> None:
    """In a process of its own: what a shell started in the background ignores Ctrl-C, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*arguments: Any, launcher: tuple[str, ...] = (), **options: Any) -> subprocess.Popen[str]:
    """A command that goes on in a process of its own; `options` are those of `Popen`."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {**pipes, "preexec_fn": hear_ctrl_c, **options}
    return subprocess.Popen(command_line(*arguments, launcher=launcher), **options)


def one_line(err: str) -> str:
    """The error of a command; there is one, and no traceback."""
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    return line
