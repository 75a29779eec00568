"""`Engine`: a backbone, its block runner, its heads and their thresholds."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.errors import BundleError, ConfigError
from early_exit_cli.files.schemas import RecordForm
from early_exit_cli.heads.assistant import AssistantHead
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.exit_runner import ExitRunner, exit_runner
from early_exit_cli.heads.mtp import MtpHead
from early_exit_cli.heads.uncertainty import Thresholds
from early_exit_cli.runtime.blocks import LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.runtime.passes import Passes
from early_exit_cli.runtime.prefix import Prefix
from early_exit_cli.runtime.round_times import RoundTimes
from early_exit_cli.steps import LONG_PROMPT, step

OwnHead = MtpHead | AssistantHead
"""What a model brings to draft with."""
DEFAULT_WIDTH = 8
OnStates = Callable[[list[int], list[Tensor]], None]
Row = dict[int, Tensor]
"""States of one token by the number of blocks run, [1, hidden] each: what verification may resume from."""


@dataclass
class Engine:
    """A backbone with exit heads, ready to decode one text at a time."""

    backbone: Backbone
    blocks: Blocks
    heads: ExitHeads | None = None
    thresholds: Thresholds | None = None
    eagle: EagleHead | None = None
    mtp: OwnHead | None = None
    """The MTP layer that the backbone's checkpoint brings, or the assistant that was named, where it was to be loaded."""
    without_mtp: str | None = None
    """Why the layer that is there is not read."""
    record: RecordForm | None = None
    """eexit.json of the bundle."""
    round_times: RoundTimes = field(default_factory=RoundTimes)
    """Learned while it decodes."""

    @functools.cached_property
    def passes(self) -> Passes:
        """Blocks and LM head over any number of rows."""
        return Passes(self.blocks)

    @functools.cached_property
    def exit_runner(self) -> ExitRunner:
        """Reads the exit heads while drafting."""
        return exit_runner(require_heads(self))

    def prefill(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        exit_layers: Sequence[int] = (),
        on_states: OnStates | None = None,
    ) -> KVCache:
        """The KV cache of a whole `Prefill`."""
        return Prefill(self, prompt_ids, max_new_tokens, exit_layers, on_states).finish()

    def check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse an empty prompt, and one that does not fit the context together with its answer."""
        if prompt_tokens == 0:
            raise ConfigError("the prompt is empty")
        context = self.backbone.context_length
        if prompt_tokens + max_new_tokens > context:
            raise ConfigError(
                f"the prompt's {prompt_tokens} tokens and {max_new_tokens} new ones exceed the context of {context}",
                hint="shorten the prompt, or lower --max-tokens",
            )

    def embed(self, tokens: list[int]) -> Tensor:
        """Token ids -> [len(tokens), hidden]."""
        return self.blocks.embed_tokens(tokens)

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        """Blocks first .. last - 1 over [rows, hidden] at `position`."""
        return self.passes.run_through(hidden, cache, position, [last], first)[0]

    def run_through(
        self, hidden: Tensor, cache: KVCache, position: int, stops: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        """`Passes.run_through`."""
        return self.passes.run_through(hidden, cache, position, stops, first)

    def run_tokens(self, tokens: list[int], cache: KVCache, position: int, stops: Sequence[int]) -> list[Tensor]:
        """`Passes.run_tokens`."""
        return self.passes.run_tokens(tokens, cache, position, stops)

    def run_batch(
        self, texts: list[Tensor], caches: list[KVCache], positions: list[int], stops: Sequence[int]
    ) -> list[list[Tensor]]:
        """`Passes.run_batch`."""
        return self.passes.run_batch(texts, caches, positions, stops)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`Passes.finish`."""
        return self.passes.finish(hidden)

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`Passes.logits`."""
        return self.passes.logits(hidden)


class Prefill:
    """A prompt being read into a KV cache, pass by pass: all but its last token, the first to be run by decoding.

    The number of keys read may decide a token's last bits, so the capacity depends on the request alone.

    Args:
        on_states: called with each pass's following tokens, and its states after `exit_layers` and the final normed ones
            (`Drafter.process`).
        prefix: of an earlier text, whose first `reused` positions (`Prefix.reusable`) are not computed again.

    Raises:
        ConfigError: empty prompt, a token that is none, or prompt and new tokens beyond the context.
    """

    def __init__(
        self,
        engine: Engine,
        prompt_ids: list[int],
        max_new_tokens: int,
        exit_layers: Sequence[int] = (),
        on_states: OnStates | None = None,
        prefix: Prefix | None = None,
        reused: int = 0,
    ) -> None:
        engine.check_length(len(prompt_ids), max_new_tokens)
        outside = [token for token in prompt_ids if not 0 <= token < len(engine.backbone.embedding_weight)]
        if outside:
            raise ConfigError(f"token {outside[0]} of the prompt is not in the vocabulary")
        self.engine, self.prompt_ids, self.on_states = engine, prompt_ids, on_states
        self.stops = [*exit_layers, engine.blocks.num_blocks]
        self.cache = engine.blocks.new_cache(len(prompt_ids) + max_new_tokens + LARGEST_WIDTH)
        length = len(prompt_ids) - 1
        self.kept_at = engine.blocks.shared_positions(length + 1, length, length) if self.cache.states else 0
        """Where the states of blocks that have one are kept for later texts."""
        self.reused = reused
        if prefix is not None:
            prefix.copy_to(self.cache, reused)
            if on_states:
                on_states(prompt_ids[1 : reused + 1], prefix.states_of(exit_layers, reused))
        cuts = engine.blocks.prompt_pieces(length)
        self.left = deque(slice(max(cut.start, reused), cut.stop) for cut in cuts if cut.stop > reused)
        self._end()

    @property
    def done(self) -> bool:
        """Whether all is read."""
        return not self.left

    def run(self) -> None:
        """The next pass."""
        piece = self.left.popleft()
        *deep, final = self.engine.run_tokens(self.prompt_ids[piece], self.cache, piece.start, self.stops)
        if self.on_states:
            following = self.prompt_ids[piece.start + 1 : piece.stop + 1]
            self.on_states(following, [*deep, self.engine.blocks.final_norm(final)])
        if piece.stop == self.kept_at:
            self.cache.keep_states(self.kept_at)
        self._end()

    def finish(self) -> KVCache:
        """All passes that are left; a long prompt is announced."""
        tokens = len(self.prompt_ids)
        with step("reading the prompt") if tokens - self.reused > LONG_PROMPT else nullcontext() as reading:
            while not self.done:
                if reading is not None:
                    reading.say(f"reading the prompt, {self.left[0].start:,} of {tokens:,} tokens")
                self.run()
        return self.cache

    def _end(self) -> None:
        if self.done:
            self.cache.length = len(self.prompt_ids) - 1


def require_heads(engine: Engine) -> ExitHeads:
    """The model's heads.

    Raises:
        BundleError: loaded without a bundle.
    """
    if engine.heads is None:
        raise BundleError("this needs trained heads", hint="name a bundle with --bundle")
    return engine.heads


def default_width(engine: Engine) -> int:
    """Rows of a verifying pass when nobody asks for another number: 8, or the largest invariant width below."""
    return min(DEFAULT_WIDTH, engine.blocks.widths[-1])


def checked_width(engine: Engine, width: int) -> int:
    """A width that was asked for, cut to what the device has.

    Raises:
        ConfigError: out of range.
    """
    if not 1 <= width <= LARGEST_WIDTH:
        raise ConfigError(f"width {width} is out of range", hint=f"--width takes 2 to {LARGEST_WIDTH}")
    return min(width, engine.blocks.widths[-1])


def catch_up(engine: Engine, cache: KVCache, rows: list[Row], layer: int) -> None:
    """Bring all rows to `layer` blocks, in passes over those that stopped earlier.

    Rows stand one after another from the pending token on, and no row has run deeper than one before it: its keys and
    values would have been missing there. So the rows behind are always the last ones, and no block runs twice. A pass
    takes LARGEST_WIDTH rows at most: what it leaves in the KV cache are the bits that any other pass would have left.
    """
    while layer not in rows[-1]:
        start = max(rows[-1])
        first = next(place for place, row in enumerate(rows) if max(row) == start)
        target = min(layer, max(rows[first - 1])) if first else layer
        if target <= start:
            raise RuntimeError(f"row {first} stands at {start} blocks and its neighbour at {target}: rows out of order")
        for place in range(first, len(rows), LARGEST_WIDTH):
            part = rows[place : place + LARGEST_WIDTH]
            hidden = engine.run(torch.cat([row[start] for row in part]), cache, cache.length + place, start, target)
            for row, state in zip(part, hidden.split(1), strict=True):
                row[target] = state
