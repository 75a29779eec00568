"""A server on a free port, in threads of the tests' process; and drafters that hold decoding up until a test lets it go on."""

import json
import threading
import urllib.error
import urllib.request

from early_exit_cli.config import ServeConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import Draft, Drafter, NoDrafter
from early_exit_cli.serving.app import make_app
from early_exit_cli.serving.scheduler import Scheduler
from early_exit_cli.serving.server import Server, address_of, listening_socket

SECONDS = 30


class LiveServer:
    """`with LiveServer(engine, drafter, queue=2) as server`: settings are those of `eexit serve`."""

    def __init__(self, engine, drafter=None, *, key=None, width=4, plain_pass=None, **settings):
        self.engine = engine
        self.settings = ServeConfig(port=0, **settings)
        self.lines = []
        self.scheduler = Scheduler(
            engine,
            drafter or NoDrafter(),
            width,
            batch=self.settings.batch,
            queue=self.settings.queue,
            prefix_bytes=int(self.settings.prefix_gb * 1e9),
            plain_pass=plain_pass,
        )
        app = make_app(engine, self.scheduler, self.settings, key=key, log=self.lines.append)
        self.socket = listening_socket("127.0.0.1", 0)
        self.server = Server(app, self.scheduler)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.socket.listen()
        self.address = address_of(self.socket)
        self.scheduler.start()
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.scheduler.close()
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()

    def ask(self, path, body=None, **headers):
        """Status, headers and the body of a response; what is JSON is read."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                status, found, text = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            status, found, text = error.code, error.headers, error.read()
        is_json = found.get_content_type() == "application/json"
        return status, found, json.loads(text) if is_json else text.decode()

    def metric(self, name):
        """A number of /metrics."""
        page = self.ask("/metrics")[2]
        return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} "))


def alone(engine, prompt_ids, tokens=16, drafter=None, **more):
    """The answer of a request by itself, as `eexit infer` makes it."""
    return generate(engine, Request(prompt_ids, tokens, **more), drafter or NoDrafter(), mode="x", width=4)


class Held(Drafter):
    """Proposes nothing, and waits before each round until it may go on."""

    name = "held"

    def __init__(self):
        self.allowed = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.free = threading.Event()

    def fork(self):
        return self

    def draft(self, engine, cache, pending, limit, stop_ids):
        self.asked.release()
        while not self.free.is_set() and not self.allowed.acquire(timeout=0.01):
            pass
        return Draft()

    def wait(self):
        """Until a round was begun."""
        assert self.asked.acquire(timeout=SECONDS)
