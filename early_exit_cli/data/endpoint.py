"""An OpenAI-compatible endpoint (vLLM, SGLang, llama-server, our own) that continues prompts.

A prompt goes as token ids to `/completions`, so that the server reads what the tokenizer and chat template here give, and
none of its own. Where it tells the ids of its answer (vLLM), these are taken; elsewhere its text is tokenised here.

Servers take their sampling defaults from the model's own files, a repetition penalty among them. So all that changes the
choice of a token is told, in fields that OpenAI does not have too; a server that refuses those is asked again without.

Busy servers and broken connections are tried again, with waits that double, or as long as `Retry-After` says.
"""

from __future__ import annotations

import email.utils
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx2
from pydantic import Field

from early_exit_cli.errors import DataError, said, shown
from early_exit_cli.files.forms import Form
from early_exit_cli.files.schemas import Read, require_form

KEYS = ("EEXIT_ANSWERS_KEY", "OPENAI_API_KEY")
BUSY = {408, 425, 429, 500, 502, 503, 504}
RETRIES, FIRST_WAIT, LONGEST_WAIT = 6, 1.0, 120.0
"""Further tries of a request, and seconds before the first of them; no wait is longer than the last."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 900.0
"""An answer may wait for many others."""
BEYOND_OPENAI = {
    "return_token_ids": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "repetition_penalty": 1.0,
    "top_k": -1,
    "min_p": 0.0,
}
"""Fields of vLLM, SGLang and llama-server; who does not know them ignores or refuses them."""


class Choice(Form):
    """A completion."""

    text: str
    finish_reason: str | None = None
    stop_reason: Any = None
    token_ids: list[int] | None = None


class Completion(Form):
    """An answer of `/completions`."""

    choices: list[Choice] = Field(min_length=1)


class ModelForm(Form):
    """A model of an endpoint."""

    id: str


class ModelList(Form):
    """An answer of `/models`."""

    data: list[ModelForm]


@dataclass(frozen=True)
class Said:
    """A prompt's continuation: its text, its token ids where the server tells them, whether it came to its end, and with
    which token where the server tells that."""

    text: str
    token_ids: list[int] | None
    ended: bool
    end_token: int | None


class Endpoint:
    """A server's address; may be used by several threads. A context manager.

    Args:
        at_once: connections at most.
    """

    def __init__(self, url: str, at_once: int) -> None:
        self.url = url
        self.key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        self.extra = dict(BEYOND_OPENAI)
        self.closed = threading.Event()
        self.client = httpx2.Client(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=at_once, max_keepalive_connections=at_once),
        )

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody waits any longer, in no thread."""
        self.closed.set()
        self.client.close()

    def model(self, asked: str | None, likely: str) -> str:
        """What it calls the model.

        Args:
            asked: by a person. likely: the backbone's name.

        Raises:
            DataError: out of reach, or it has several models of which none has the likely name.
        """
        if asked is not None:
            return asked
        there = [model.id for model in self._asked("GET", "/models", None, ModelList, retries=0).data]
        if len(there) != 1 and likely not in there:
            named = ", ".join(map(shown, there[:5])) or "none"
            raise DataError(f"{self.url} has no model {likely!r}; it has {named}", hint="--answers-model NAME")
        return there[0] if len(there) == 1 else likely

    def complete(self, model: str, ids: list[int], max_tokens: int, temperature: float, seed: int) -> Said:
        """Continue a prompt of token ids.

        Raises:
            DataError: refused, or still busy or out of reach after all tries.
        """
        body = {
            "model": model,
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": 1.0,
            "seed": seed,
            "stream": False,
        }
        choice = self._asked("POST", "/completions", body, Completion).choices[0]
        end = choice.stop_reason if type(choice.stop_reason) is int else None
        return Said(choice.text, choice.token_ids, choice.finish_reason == "stop", end)

    def _asked(
        self, method: str, path: str, body: dict[str, Any] | None, form: type[Read], retries: int = RETRIES
    ) -> Read:
        """The answer to a request, in its form."""
        wait, tries_left = FIRST_WAIT, retries
        while True:
            extra = self.extra
            try:
                reply = self.client.request(method, self.url + path, json=None if body is None else {**body, **extra})
            except (httpx2.TransportError, httpx2.InvalidURL) as error:
                fault = f"{self.url} cannot be reached ({type(error).__name__}: {self._masked(said(error))})"
                again, told = isinstance(error, httpx2.TransportError), None
            else:
                if reply.status_code == 200:
                    try:
                        value = reply.json()
                    except ValueError as error:
                        raise DataError(
                            f"{self.url}{path} answers no JSON", hint="--answers-from http://HOST:PORT/v1"
                        ) from error
                    return require_form(value, form, f"{self.url}{path}", DataError)
                if reply.status_code in (400, 422) and body is not None and extra:
                    self.extra = {}  # a strict server: what OpenAI has, and no more
                    continue
                fault = f"{self.url}{path} answers {reply.status_code}: {self._masked(_message(reply))}"
                again, told = reply.status_code in BUSY, _seconds(reply.headers.get("Retry-After"))
            if not again or tries_left == 0:
                raise DataError(fault, hint=self._hint(fault, again))
            if self.closed.wait(min(wait * (1 + random.random() / 4) if told is None else told, LONGEST_WAIT)):
                raise DataError(fault)
            wait, tries_left = wait * 2, tries_left - 1

    def _hint(self, fault: str, is_passing: bool) -> str:
        if is_passing:
            return "is it running? The same command goes on where it was: answers that came are kept"
        if " 401" in fault or " 403" in fault:
            return f"set {' or '.join(KEYS)}"
        if " 404" in fault:
            return "--answers-from http://HOST:PORT/v1 of a server with /completions, which takes token ids"
        return "answers that came are kept"

    def _masked(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def _message(reply: httpx2.Response) -> str:
    """What a server says of a refusal, in a line."""
    try:
        found = reply.json()
        found = found.get("error", found) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        found = reply.text
    return " ".join(str(found).split())[:300]


def _seconds(told: str | None) -> float | None:
    """`Retry-After`: seconds, or a date."""
    if told is None:
        return None
    try:
        return max(float(told), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
