"""Commands in a terminal: what a person sees in the end, and what was written."""

import fcntl
import os
import pty
import struct
import subprocess
import termios

from commands import command_line
from terminal import Terminal


def in_terminal(arguments, columns: int = 80, code: int = 0, **environment: str) -> tuple[list[str], str]:
    """Run a command whose stdout and stderr are one terminal.

    Returns:
        (the lines that stand there in the end, all that was written).
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        command_line(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", "COLORTERM": "truecolor"} | environment,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    text = written.decode().replace("\r\n", "\n")
    assert process.wait(timeout=60) == code, text
    screen = Terminal(columns)
    screen.write(text)
    return screen.lines, text
