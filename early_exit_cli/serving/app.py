"""The routes: OpenAI's chat and text completions, the model, health, metrics and a page. What is refused is refused in one line."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from early_exit_cli import __version__
from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.config_serving import ServeConfig
from early_exit_cli.decoding.text import Request
from early_exit_cli.engine import Engine
from early_exit_cli.errors import ConfigError, EexitError, doing, said, shown
from early_exit_cli.report.chat_page import render_chat_page
from early_exit_cli.sampling import make_chooser
from early_exit_cli.serving.fields import ChatBody, Options, TextBody, read_body
from early_exit_cli.serving.forms import Form, event
from early_exit_cli.serving.handle import Answering, Ended, Exchange, HungUp, Piece, QueueFull, Stopping, TooLate
from early_exit_cli.serving.metrics import CONTENT_TYPE, Metrics
from early_exit_cli.serving.refusal import Refusal
from early_exit_cli.serving.security import LOCAL_NAMES, Guard, is_local

Log = Callable[[str], None]
PAGE, CHAT, TEXT, MODELS, LOAD_MODEL, HEALTH, METRICS = (
    "/",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/load_model",
    "/health",
    "/metrics",
)
QUIET = (HEALTH, METRICS)
"""Routes that machines ask every few seconds: not logged."""
METHODS = ("GET", "POST", "HEAD", "OPTIONS")
PATIENCE = 4
"""How many times the limit of a body is read, and thrown away, before the connection is closed."""
HUNG_UP = 499
"""nginx's status of a request whose client is gone."""


class Api:
    """One model and its routes.

    Args:
        log: called with a line for each request, which holds nothing of its text.
    """

    def __init__(self, engine: Engine, answering: Answering, settings: ServeConfig, log: Log) -> None:
        self.engine, self.answering, self.settings, self.log = engine, answering, settings, log
        self.metrics = Metrics(answering)
        self.page = render_chat_page()
        self.model = model_id(engine.backbone)
        self.fingerprint = f"fp_{engine.backbone.content[:10]}_{__version__}"
        self.started = int(time.time())
        self.tokenizer = copy.deepcopy(engine.backbone.tokenizer)
        """Its own: a tokenizer refuses to encode while another thread decodes with it."""
        self.encoding = threading.Lock()

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, ChatBody)

    async def complete(self, http: HttpRequest) -> Response:
        return await self._answer(http, TextBody)

    async def show_page(self, http: HttpRequest) -> Response:
        headers = {
            "Content-Security-Policy": self.page.policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(self.page.html, headers=headers)

    async def models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._about_model()]})

    async def model_by_name(self, http: HttpRequest) -> Response:
        if http.path_params["name"] != self.model:
            raise self._no_model(http.path_params["name"])
        return JSONResponse(self._about_model())

    async def load_model(self, http: HttpRequest) -> Response:
        """What `transformers chat` asks first: the model is here."""
        body = await self._body(http)
        try:
            name = json.loads(body)["model"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refusal(400, "the body must name a model", param="model") from None
        if name != self.model:
            raise self._no_model(name)
        ready = event({"status": "ready", "model": self.model, "cached": True})
        return Response(ready, media_type="text/event-stream")

    async def health(self, http: HttpRequest) -> Response:
        if self.answering.draining:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE)

    async def _answer(self, http: HttpRequest, kind: type[Options]) -> Response:
        try:
            body = await self._body(http)
            options, request = await run_in_threadpool(self._read, body, kind)
            form = Form(
                kind is ChatBody, self.model, self.fingerprint, options.includes_usage, bool(options.return_token_ids)
            )
            exchange = Exchange(
                self.answering,
                request,
                gone=lambda: hung_up(http),
                trace=options.traces,
                seconds=self.settings.timeout,
                on_ended=lambda ended: self._account(http, ended, bool(options.stream)),
            )
            http.scope["eexit"].append("submitted")
            if options.stream:
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                return StreamingResponse(self._stream(exchange, form), headers=headers, media_type="text/event-stream")
            return await self._whole(exchange, form)
        except (ClientDisconnect, HTTPException, Refusal):
            raise
        except Exception as error:
            raise refusal_of(error) from error

    async def _whole(self, exchange: Exchange, form: Form) -> Response:
        records: list[dict[str, Any]] = []
        async for happened in exchange.events():
            if isinstance(happened, Piece):
                records += [] if happened.record is None else [happened.record]
            elif happened.error is not None:
                raise refusal_of(happened.error)
            elif happened.answer is not None:
                if records:
                    records[-1]["tokens"][-1]["text"] += happened.text
                return JSONResponse(form.whole(happened.answer, happened.times, records or None))
        raise Refusal(500, "there is no answer")

    async def _stream(self, exchange: Exchange, form: Form) -> AsyncIterator[bytes]:
        if first := form.first():
            yield first
        async for happened in exchange.events():
            if isinstance(happened, Piece):
                if chunk := form.piece(happened):
                    yield chunk
            elif happened.error is not None:
                yield event(refusal_of(happened.error).body)
            elif happened.answer is not None:
                yield form.last(happened.text, happened.answer, happened.times)

    async def _body(self, http: HttpRequest) -> bytes:
        """
        Raises:
            Refusal: it is too long, or too slow. ClientDisconnect: the client is gone.
        """
        try:
            return await asyncio.wait_for(self._whole_body(http), self.settings.timeout)
        except asyncio.TimeoutError:
            raise Refusal(408, "the body did not come in time", code="timeout") from None

    async def _whole_body(self, http: HttpRequest) -> bytes:
        most = int(self.settings.body_mb * 1e6)
        parts: list[bytes] = []
        size = 0
        async for part in http.stream():
            size += len(part)
            if size <= most:
                parts.append(part)
            if size > PATIENCE * most:
                break
        if size > most:  # told when the body is over: a client that still sends would not hear it
            raise Refusal(413, f"the body has more than {most:,} bytes", code="body_too_large")
        return b"".join(parts)

    def _read(self, body: bytes, kind: type[Options]) -> tuple[Options, Request]:
        """In a thread of its own: long bodies take a while.

        Raises:
            Refusal
        """
        options = read_body(body, kind)
        backbone = self.engine.backbone
        if options.model not in (None, "", self.model):
            raise self._no_model(options.model)
        param = options.param
        try:
            with self.encoding, doing("reading it"):
                ids = options.encoded(self.tokenizer)
        except EexitError as error:
            raise Refusal(400, f"{param}: {error.message}", param=param) from None
        unknown = next((token for token in ids if not 0 <= token < len(backbone.embedding_weight)), None)
        if unknown is not None:
            raise Refusal(400, f"{param}: {shown(unknown)} is no token of this model", param=param)
        room = backbone.context_length - len(ids)
        limit = options.limit or max(1, min(self.settings.max_tokens, room))
        try:
            self.engine.check_length(len(ids), limit)
        except ConfigError as error:
            code = "context_length_exceeded" if ids else None
            raise Refusal(400, error.message, param=param, code=code) from None
        chooser = make_chooser(options.sampling(), options.bias(backbone.vocab_size))
        return options, Request(ids, limit, chooser, stop=options.ends(self.tokenizer))

    def _about_model(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self.started, "owned_by": "eexit"}

    def _no_model(self, name: Any) -> Refusal:
        return Refusal(404, f"{shown(name)} is not here: {self.model} is", param="model", code="model_not_found")

    def _account(self, http: HttpRequest, ended: Ended, streamed: bool) -> None:
        """Count an answer, and log it."""
        self.metrics.count(ended, isinstance(ended.error, HungUp))
        status = 200 if ended.error is None else refusal_of(ended.error).status
        answer, times = ended.answer, ended.times
        parts = [f"{'streamed, ' if streamed else ''}queued {times.queue:.2f} s"]
        if answer is not None:
            known = f" ({answer.reused} known)" if answer.reused else ""
            parts += [
                f"{answer.prompt_tokens} tokens read{known} in {times.prefill:.2f} s",
                f"{len(answer.token_ids)} written in {times.decode:.2f} s",
                f"first after {answer.first_seconds:.2f} s",
                f"accept length {answer.accept_length:.2f}",
                f"ends: {answer.finish_reason or 'cut off'}",
            ]
        if ended.error is not None:
            parts.append(said(ended.error))
        self.log(f"{line_of(http.scope, status)} {', '.join(parts)}")


async def hung_up(http: HttpRequest) -> None:
    """Until the client is gone; its body was read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def model_id(backbone: Backbone) -> str:
    """What clients call the model: its Hub id, or the name of its folder or file without where that lies."""
    return Path(backbone.name).name if Path(backbone.name).exists() else backbone.name


class Gate:
    """Around all routes: lets in who may ask, counts, and logs what was not taken."""

    def __init__(self, app: Any, api: Api, guard: Guard) -> None:
        self.app, self.api, self.guard = app, api, guard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        notes: list[str] = []
        scope["eexit"] = notes
        status = None

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self.guard.check(scope)
            await self.app(scope, receive, noting)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, noting)
        except asyncio.CancelledError:  # stopped at once; what has begun just ends
            if status is None:
                stopped = Refusal(503, "the server was stopped before the answer was whole", code="stopping")
                await refused(stopped)(scope, receive, noting)
        finally:
            route, status = route_of(scope), HUNG_UP if status is None else status
            self.api.metrics.requests.labels(route, str(status)).inc()
            if "submitted" not in notes and not (route in QUIET and status < 400):
                self.api.log(line_of(scope, status))


def make_app(engine: Engine, answering: Answering, settings: ServeConfig, *, key: str | None, log: Log) -> Starlette:
    """The whole application.

    Args:
        key: what requests must bring; None: nothing.
    """
    api = Api(engine, answering, settings, log)
    names: Sequence[str] = LOCAL_NAMES if key is None and is_local(settings.host) else ()
    origins = settings.cors_origin
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return Starlette(
        routes=[
            Route(PAGE, api.show_page),
            Route(CHAT, api.chat, methods=["POST"]),
            Route(TEXT, api.complete, methods=["POST"]),
            Route(MODELS, api.models),
            Route(MODELS + "/{name:path}", api.model_by_name),
            Route(LOAD_MODEL, api.load_model, methods=["POST"]),
            Route(HEALTH, api.health),
            Route(METRICS, api.show_metrics),
        ],
        middleware=[*([cors] if origins else []), Middleware(Gate, api=api, guard=Guard(key, origins, names))],
        exception_handlers={HTTPException: on_http_exception, Refusal: on_refusal, ClientDisconnect: on_disconnect},
    )


async def on_http_exception(http: HttpRequest, error: Exception) -> Response:
    """A path or a method that is not there."""
    assert isinstance(error, HTTPException)
    response = refused(Refusal(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def on_refusal(http: HttpRequest, error: Exception) -> Response:
    """What a route refuses."""
    assert isinstance(error, Refusal)
    return refused(error)


async def on_disconnect(http: HttpRequest, error: Exception) -> Response:
    """A client that went while it still sent; nobody reads this."""
    return Response(status_code=HUNG_UP)


def refused(refusal: Refusal) -> Response:
    """A refusal as the client gets it."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


def refusal_of(error: Exception) -> Refusal:
    """Whatever went wrong, as the client is told."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, QueueFull):
        return Refusal(429, error.message, code="queue_full", retry_after=error.retry_after)
    for kind, status, code in (
        (Stopping, 503, "stopping"),
        (HungUp, HUNG_UP, "hung_up"),
        (TooLate, 504, "timeout"),
        (ConfigError, 400, None),
    ):
        if isinstance(error, kind):
            return Refusal(status, said(error), code=code)
    if os.environ.get("EEXIT_DEBUG"):
        traceback.print_exception(error)
    return Refusal(500, said(error))


def route_of(scope: Any) -> str:
    """Which route a request is for, in the words of metrics and log."""
    path = MODELS if scope["path"].startswith(f"{MODELS}/") else scope["path"]
    return path if path in (PAGE, CHAT, TEXT, MODELS, LOAD_MODEL, *QUIET) else "other"


def line_of(scope: Any, status: int) -> str:
    """How a line of the log begins: nothing of it is the client's own words."""
    client, method = scope.get("client"), scope["method"]
    return f"{client[0] if client else '-'} {method if method in METHODS else 'other'} {route_of(scope)} {status}"
