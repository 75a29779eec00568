"""Answers in the form of OpenAI's API, with llama-server's `timings` beside them."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from early_exit_cli.serving.handle import Answer, Piece, Times

DONE = b"data: [DONE]\n\n"


@dataclass
class Form:
    """One answer of a route, whole or in chunks.

    fingerprint: of the model and this program. includes_usage: whether a stream ends with a chunk of the usage.
    returns_ids: whether token ids are wanted; in a stream they come at its end.
    """

    is_chat: bool
    model: str
    fingerprint: str
    includes_usage: bool = False
    returns_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}"

    def whole(self, answer: Answer, times: Times, records: list[dict[str, Any]] | None) -> dict[str, Any]:
        """The answer of a request that is not streamed."""
        text = answer.text
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            "choices": [self._choice(said | self._ids(answer), answer.finish_reason)],
            "usage": usage(answer),
            "timings": timings(answer, times),
            **({} if records is None else {"eexit": {"rounds": records}}),
        }

    def first(self) -> bytes:
        """The chunk before all text; nothing where the route has none."""
        if not self.is_chat:
            return b""
        return self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def piece(self, piece: Piece) -> bytes:
        """The chunk of a round; nothing where it has nothing to say."""
        if not piece.text and piece.record is None:
            return b""
        own = {} if piece.record is None else {"eexit": {"rounds": [piece.record]}}
        return self._chunk([self._text_choice(piece.text)], **own)

    def last(self, rest: str, answer: Answer, times: Times) -> bytes:
        """What follows the last round; `rest`: of the text."""
        begin = self._chunk([self._text_choice(rest)]) if rest else b""
        nothing: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        end = [self._choice(nothing | self._ids(answer), answer.finish_reason)]
        known = {"timings": timings(answer, times)}
        if not self.includes_usage:
            return begin + self._chunk(end, **known) + DONE
        return begin + self._chunk(end) + self._chunk([], **known | {"usage": usage(answer)}) + DONE

    def _ids(self, answer: Answer) -> dict[str, Any]:
        return {"token_ids": answer.token_ids} if self.returns_ids else {}

    def _text_choice(self, text: str) -> dict[str, Any]:
        return self._choice({"delta": {"content": text}} if self.is_chat else {"text": text}, None)

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        usage = {"usage": None} if self.includes_usage else {}
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return event({**head, "choices": choices, **usage, **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(answer: Answer) -> dict[str, Any]:
    """Tokens of prompt and answer."""
    written = len(answer.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": answer.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": answer.reused},
    }


def timings(answer: Answer, times: Times) -> dict[str, Any]:
    """As llama-server names them: `prompt_n` tokens were read, besides `cache_n` that were known; draft_n drafted. Ours is
    `plain_ms`, what `predicted_ms` would be of plain decoding."""
    plain = answer.plain_seconds
    return {
        "cache_n": answer.reused,
        **_rate("prompt", answer.prompt_tokens - answer.reused, times.prefill),
        **_rate("predicted", len(answer.token_ids), times.decode),
        "draft_n": answer.drafted,
        "draft_n_accepted": answer.accepted,
        "plain_ms": None if plain is None else round(plain * 1000, 3),
    }


def _rate(name: str, count: int, seconds: float) -> dict[str, Any]:
    return {
        f"{name}_n": count,
        f"{name}_ms": round(seconds * 1000, 3),
        f"{name}_per_token_ms": round(seconds * 1000 / count, 3) if count else None,
        f"{name}_per_second": round(count / seconds, 3) if seconds else None,
    }
