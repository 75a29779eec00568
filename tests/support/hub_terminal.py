"""A process that runs commands one after another against a Hub on localhost, as in a terminal that is set up for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from commands import Answer, words_of
from hub_server import READER, WRITER, HubServer

TOKENS = (WRITER, READER, "hf_unknownToken")


class Terminal:
    """Stays, since the client reads the Hub's address once; and checks that no token is ever shown."""

    def __init__(self, server: HubServer, home: Path, folder: Path | None = None) -> None:
        self.home = home
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home / "hf"),
            "EEXIT_HOME": str(home / "eexit"),
        }
        self.log = open(home / "stderr", "w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "command_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=self.environment,
            cwd=folder,
        )

    def run(self, *arguments: object, token: str = WRITER, stdin: str = "") -> Answer:
        """Run one command."""
        request = {"arguments": words_of(*arguments), "environment": {"HF_TOKEN": token}, "stdin": stdin}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        self.log.seek(0)
        assert not any(secret in text for secret in TOKENS for text in (out, err, self.log.read()))
        assert "Traceback" not in err
        return code, out, err

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()
        self.log.close()
