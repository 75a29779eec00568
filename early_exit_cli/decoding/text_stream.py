"""Token ids to text, piece by piece, up to a text that ends it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from early_exit_cli.engine import Engine

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
"""How byte fallback names a byte."""


class TextStream:
    """Token ids to text, piece by piece; never half a character, and the pieces joined are the final text.

    A piece is what a token adds to the text of the tokens of the piece before it. It waits while a character may be
    incomplete: where the text ends in U+FFFD, or in a byte token, since a decoder with byte fallback shows a run of
    bytes as a whole. Bytes that are no text become U+FFFD, as the tokenizer decodes them.

    Args:
        stop: texts that end the text: it goes up to the first of them, and what may become one waits.
    """

    def __init__(self, engine: Engine, stop: Sequence[str] = ()) -> None:
        tokenizer = engine.backbone.tokenizer
        self.decoder, self.known = tokenizer.backend_tokenizer, len(tokenizer)
        added = self.decoder.get_added_tokens_decoder()
        self.silent = {number for number, token in added.items() if token.special}
        self.ids: list[int] = []
        self.text = ""
        self.stop = stop
        self.stopped = False
        """Whether one of `stop` was met."""
        self.held = ""
        """The end of the text that may go on to be one of `stop`."""
        self.window: list[int] = []
        """Tokens of the last piece, and of the one to come."""
        self.before = 0
        """How many of the window's tokens are of the last piece."""
        self.shown = ""
        """Their text."""

    def push(self, tokens: list[int]) -> str:
        """Text that became certain with these tokens."""
        self.ids += tokens
        said = [
            token for token in tokens if token < self.known and token not in self.silent
        ]  # padded vocabularies have rows without one
        return self._up_to_stop("".join(map(self._add, said)))

    def finish(self) -> str:
        """What is left; a character whose bytes never became complete is dropped."""
        rest = self._up_to_stop(self._decoded(self.window)[len(self.shown) :].rstrip(REPLACEMENT)) + self.held
        self.text += self.held
        self.held = ""
        return rest

    def _add(self, token: int) -> str:
        self.window.append(token)
        text = self._decoded(self.window)
        may_go_on = text.endswith(REPLACEMENT) or BYTE_TOKEN.fullmatch(self._name(token))
        if may_go_on or len(text) <= len(self.shown):
            return ""
        piece = text[len(self.shown) :]
        self.window = self.window[self.before :]
        self.before, self.shown = len(self.window), self._decoded(self.window)
        return piece

    def _up_to_stop(self, piece: str) -> str:
        """What of a further piece is certain to stand before all of `stop`."""
        waiting = "" if self.stopped else self.held + piece
        met = [place for place in map(waiting.find, self.stop) if place >= 0]
        self.stopped |= bool(met)
        certain = min(met) if met else len(waiting) - max((_overlap(waiting, stop) for stop in self.stop), default=0)
        self.held = "" if met else waiting[certain:]
        self.text += waiting[:certain]
        return waiting[:certain]

    def _decoded(self, ids: list[int]) -> str:
        return self.decoder.decode(ids, skip_special_tokens=True)

    def _name(self, token: int) -> str:
        return self.decoder.id_to_token(token) or ""


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
