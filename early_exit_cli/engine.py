"""`Engine`: a backbone, its block runner, its heads and their thresholds, loaded from a bundle and saved as one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.errors import BundleError, ConfigError
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.heads.exit_runner import ExitRunner, exit_runner
from early_exit_cli.heads.uncertainty import Thresholds
from early_exit_cli.numerics import not_finite, require_finite
from early_exit_cli.runtime.blocks import LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.kv_cache import KVCache, Part

DEFAULT_WIDTH = 8
OnStates = Callable[[list[int], list[Tensor]], None]


@dataclass
class Engine:
    """A backbone with exit heads, ready to decode one text at a time."""

    backbone: Backbone
    blocks: Blocks
    heads: ExitHeads | None = None
    thresholds: Thresholds | None = None
    eagle: EagleHead | None = None
    record: dict[str, Any] = field(default_factory=dict)
    round_times: Any = None
    """What rounds take here beyond their parts (`drafters.RoundTimes`), learned while it decodes."""

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
        """A KV cache holding the prompt but for its last token, which is the first one to be run by decoding.

        The number of keys read may decide a token's last bits, so the capacity depends on the request alone.

        Args:
            see: called with the prompt's states after `exit_layers` and the final normed ones (`Drafter.process`).

        Raises:
            ConfigError: empty prompt, or prompt and new tokens beyond the context.
        """
        self.check_length(len(prompt_ids), max_new_tokens)
        outside = [token for token in prompt_ids if not 0 <= token < self.backbone.embedding.num_embeddings]
        if outside:
            raise ConfigError(f"token {outside[0]} of the prompt is not in the vocabulary")
        cache = self.blocks.new_cache(len(prompt_ids) + max_new_tokens + LARGEST_WIDTH)
        for piece in self.blocks.prompt_pieces(len(prompt_ids) - 1):
            stops = [*exit_layers, self.blocks.num_blocks]
            *deep, final = self.run_tokens(prompt_ids[piece], cache, piece.start, stops)
            if on_states:
                following = prompt_ids[piece.start + 1 : piece.stop + 1]
                on_states(following, [*deep, self.blocks.final_norm(final)])
        cache.length = len(prompt_ids) - 1
        return cache

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
        """Blocks first .. last - 1 over [rows, hidden] at `position`, padded to an invariant width.

        What padding rows leave in the KV cache lies behind the last row and is overwritten before any real row can
        see it.
        """
        return self.run_through(hidden, cache, position, [last], first)[0]

    def run_through(
        self, hidden: Tensor, cache: KVCache, position: int, stops: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        """States of [rows, hidden] at `position` after each of `stops` blocks, as `run` gives them."""
        rows, largest = hidden.shape[0], self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:  # a device whose invariant widths end earlier takes several passes
            parts = ((hidden[:largest], position), (hidden[largest:], position + largest))
            found = (self.run_through(part, cache, place, stops, first) for part, place in parts)
            return [torch.cat(pair) for pair in zip(*found, strict=True)]
        states = self.blocks.run_through(self._padded(hidden), cache, position, stops, first)
        return [state[:rows] for state in states]

    def run_tokens(self, tokens: list[int], cache: KVCache, position: int, stops: Sequence[int]) -> list[Tensor]:
        """States of embedded tokens at `position` after each of `stops` blocks, [rows, hidden] each, as `run` gives them."""
        rows, largest = len(tokens), self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:
            return self.run_through(self.embed(tokens), cache, position, stops)
        width = self.blocks.pass_width(rows) if rows <= LARGEST_WIDTH else rows
        states = self.blocks.run_tokens(tokens + tokens[-1:] * (width - rows), cache, position, stops)
        return states if width == rows else [state[:rows] for state in states]

    def run_batch(
        self, texts: list[Tensor], caches: list[KVCache], positions: list[int], stops: Sequence[int]
    ) -> list[list[Tensor]]:
        """`run_through` for several texts, [rows, hidden] each, in as few passes as their widths allow; the same bits.

        Returns:
            For each text its states after each of `stops` blocks.
        """
        widths = [self.blocks.pass_width(hidden.shape[0]) for hidden in texts]
        outputs: list[list[Tensor]] = []
        while len(outputs) < len(texts):
            start = end = len(outputs)
            while end < len(texts) and sum(widths[start : end + 1]) <= self.blocks.batch_rows:
                end += 1
            if end <= start + 1:  # alone, or wider than any pass
                outputs.append(self.run_through(texts[start], caches[start], positions[start], stops))
                continue
            parts = [Part(caches[text], positions[text], widths[text]) for text in range(start, end)]
            rows = self._padded(torch.cat([self._padded(hidden) for hidden in texts[start:end]]))
            split = [state.split(widths[start:end]) for state in self.blocks.run_batch(rows, parts, stops)]
            for number, hidden in enumerate(texts[start:end]):
                outputs.append([states[number][: hidden.shape[0]] for states in split])
        return outputs

    def _padded(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] with its last row repeated up to an invariant width."""
        rows = hidden.shape[0]
        width = self.blocks.pass_width(rows) if rows <= LARGEST_WIDTH else rows
        return hidden if width == rows else torch.cat((hidden, hidden[-1:].expand(width - rows, -1)))

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last block -> (normed states [rows, hidden], the backbone's choices [rows] on the CPU).

        Raises:
            NumericsError: a NaN or infinite state.
        """
        rows, largest = hidden.shape[0], self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:
            (head, first), (tail, others) = self.finish(hidden[:largest]), self.finish(hidden[largest:])
            return torch.cat((head, tail)), torch.cat((first, others))
        normed, choices = self.blocks.finish(self._padded(hidden))
        choices = choices[:rows].cpu()  # the one time that a pass waits for the device
        if min(choices.tolist()) < 0:
            raise not_finite()
        return normed[:rows], choices

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last block -> (normed states [rows, hidden], the backbone's logits [rows, vocab]).

        Raises:
            NumericsError: a NaN or infinite state.
        """
        rows, largest = hidden.shape[0], self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:
            (head, first), (tail, others) = self.logits(hidden[:largest]), self.logits(hidden[largest:])
            return torch.cat((head, tail)), torch.cat((first, others))
        normed = self.blocks.final_norm(self._padded(hidden))
        logits = self.blocks.logits(normed)[:rows]
        require_finite(logits.amax(-1))
        return normed[:rows], logits


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
