"""A small OpenAI-compatible server in front of a tiny model, with faults that a test asks for."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from early_exit_cli.data.answers import answer_together
from early_exit_cli.runtime.fused_blocks import FusedBlocks

OPENAIS = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream"}


class OpenAIServer(ThreadingHTTPServer):
    """A context manager. It tells token ids where it is asked to, as vLLM does.

    faults: taken from the front, one a request for an answer: a status, (429, seconds) with Retry-After, or "reset".
    is_strict: fields that OpenAI has not are refused. texts: what is answered instead of the model's own words.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, backbone, name="org/tiny") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.backbone, self.names = backbone, [name]
        self.faults: list = []
        self.is_strict, self.texts = False, None
        self.lock = threading.Lock()
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.now = self.most_at_once = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no fault."""

    def answer(self, body: dict) -> dict:
        prompt, most, temperature = body["prompt"], body["max_tokens"], body["temperature"]
        if self.texts is not None:
            return {"text": self.texts[len(self.asked) % len(self.texts)], "finish_reason": "stop"}
        generator = torch.Generator().manual_seed(body["seed"])
        with self.lock:
            (ids,) = answer_together(FusedBlocks(self.backbone), [prompt], most, temperature or None, generator)
        ended = ids[-1] in self.backbone.eos_token_ids
        told = {"token_ids": ids} if body.get("return_token_ids") else {}
        return {"text": self.backbone.tokenizer.decode(ids), "finish_reason": "stop" if ended else "length", **told}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OpenAIServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
            server.now += 1
            server.most_at_once = max(server.most_at_once, server.now)
        try:
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()
            elif fault is not None:
                status, wait = fault if isinstance(fault, tuple) else (fault, None)
                message = f"injected for {self.headers.get('Authorization', 'nobody')}"
                self.reply(
                    {"error": {"message": message}}, status, **({} if wait is None else {"Retry-After": str(wait)})
                )
            elif server.is_strict and set(body) - OPENAIS:
                self.reply({"error": {"message": "unknown fields"}}, 400)
            else:
                time.sleep(0.005)  # so that several are seen at once
                self.reply({"object": "text_completion", "choices": [{"index": 0, **server.answer(body)}]})
        finally:
            with server.lock:
                server.now -= 1

    def reply(self, value: object, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)
