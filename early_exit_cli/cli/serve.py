"""`eexit serve`: the model behind an address, for the clients that people have. A line a request goes to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os

from early_exit_cli.cli.job import warm_up
from early_exit_cli.cli.options import configured
from early_exit_cli.cli.prepare import prepare
from early_exit_cli.config import InferenceConfig
from early_exit_cli.errors import ConfigError
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved
from early_exit_cli.steps import step

LIBRARIES = ("starlette", "uvicorn", "prometheus_client")


@configured(
    *("serve", "bundle", "backbone"),
    examples=("eexit serve", "EEXIT_API_KEY=... eexit serve --host 0.0.0.0"),
)
def command(resolved: Resolved, as_json: bool) -> None:
    """Serve OpenAI's API until Ctrl-C or SIGTERM, which finish what was asked."""
    settings = resolved.config.serve
    require_libraries()
    from early_exit_cli.serving.security import check_exposure
    from early_exit_cli.serving.server import Server, address_of, listening_socket

    key = os.environ.get("EEXIT_API_KEY") if settings.api_key is None else settings.api_key.get_secret_value()
    check_exposure(settings.host, key, settings.allow_without_key)
    with listening_socket(settings.host, settings.port) as bound:
        asked = InferenceConfig(drafter=settings.drafter)
        config = resolved.config.model_copy(update={"inference": asked})
        job = prepare(dataclasses.replace(resolved, config=config), as_json)
        from early_exit_cli.drafting.costs import plain_pass_seconds
        from early_exit_cli.drafting.drafter import NoDrafter
        from early_exit_cli.serving.app import make_app, model_id
        from early_exit_cli.serving.scheduler import Scheduler

        with step("warming up"):
            warm_up(job, job.engine.backbone.encode_prompt("Hello"), job.drafter)
        scheduler = Scheduler(
            job.engine,
            job.drafter,
            job.width,
            batch=settings.batch,
            queue=settings.queue,
            prefix_bytes=int(settings.prefix_gb * 1e9),
            plain_pass=None if isinstance(job.drafter, NoDrafter) else plain_pass_seconds(job.engine),
        )
        app = make_app(job.engine, scheduler, settings, key=key, log=log)
        scheduler.start()
        bound.listen()  # from now on nobody is refused, though the first may wait
        address = address_of(bound)
        if as_json:
            console.emit_json_line({"address": f"{address}/v1", "model": model_id(job.engine.backbone)})
        log(f"{job.title}: {address}/v1, and a page at {address}; Ctrl-C finishes what was asked, twice stops at once")
        try:
            Server(app, scheduler).run(sockets=[bound])
        finally:
            scheduler.close()


def log(line: str) -> None:
    """A line on stderr; none where nobody reads it any more, which is no reason to stop."""
    with contextlib.suppress(OSError, SystemExit):  # rich ends a program whose pipe is broken
        console.note(line)


def require_libraries() -> None:
    """
    Raises:
        ConfigError: the extra is not installed.
    """
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"eexit serve needs {', '.join(missing)}", hint="pip install 'eexit[serve]'")
