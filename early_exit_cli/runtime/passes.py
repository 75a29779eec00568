"""Any number of rows through a runner whose passes have few widths: padded to one, or cut into several passes.

Every pass of decoding goes through here, so that its width is one at which a row's bits do not depend on its
neighbours. Passes wider than `LARGEST_WIDTH` are the prompt's and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from early_exit_cli.numerics import not_finite, require_finite
from early_exit_cli.runtime.blocks import LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.kv_cache import KVCache, Part

RowsT = TypeVar("RowsT", Tensor, "list[int]")


class Passes:
    """Passes of a runner over rows [rows, hidden] or as many tokens; what comes back has no padding."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def run_through(
        self, hidden: Tensor, cache: KVCache, position: int, stops: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        """States of the rows at `position` after each of `stops` blocks, from block `first` on, [rows, hidden] each.

        What padding rows leave in the KV cache lies behind the last row and is overwritten before any real row can
        see it.
        """
        once = list(dict.fromkeys(stops))  # the last block may be asked for as an exit layer, and as the end
        found = self._by_width(
            hidden, lambda rows, start: self.blocks.run_through(rows, cache, position + start, once, first)
        )
        return [found[once.index(stop)] for stop in stops]

    def run_tokens(self, tokens: list[int], cache: KVCache, position: int, stops: Sequence[int]) -> list[Tensor]:
        """The same of embedded tokens, through all blocks."""
        once = list(dict.fromkeys(stops))
        found = self._by_width(tokens, lambda rows, start: self.blocks.run_tokens(rows, cache, position + start, once))
        return [found[once.index(stop)] for stop in stops]

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

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last block -> (normed states [rows, hidden], the backbone's choices [rows] on the CPU).

        Raises:
            NumericsError: a NaN or infinite state.
        """
        normed, choices = self._by_width(hidden, lambda rows, _: self.blocks.finish(rows))
        choices = choices.cpu()  # the one time that a pass waits for the device
        if min(choices.tolist()) < 0:
            raise not_finite()
        return normed, choices

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last block -> (normed states [rows, hidden], the backbone's logits [rows, vocab]).

        Raises:
            NumericsError: a NaN or infinite state.
        """
        normed, logits = self._by_width(hidden, lambda rows, _: self._logits(rows))
        require_finite(logits.amax(-1))
        return normed, logits

    def _logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.blocks.final_norm(hidden)
        return normed, self.blocks.logits(normed)

    def _by_width(self, rows: RowsT, run: Callable[[RowsT, int], Sequence[Tensor]]) -> list[Tensor]:
        """What `run` makes of rows of an invariant width, given the first one's number: [rows, ...] each."""
        count, largest = len(rows), self.blocks.widths[-1]
        if largest < count <= LARGEST_WIDTH:  # a device whose invariant widths end earlier takes several passes
            parts = [self._one_pass(rows[start : start + largest], start, run) for start in range(0, count, largest)]
            return [torch.cat(part) for part in zip(*parts, strict=True)]
        return self._one_pass(rows, 0, run)

    def _one_pass(self, rows: RowsT, start: int, run: Callable[[RowsT, int], Sequence[Tensor]]) -> list[Tensor]:
        padded = self._padded(rows)
        outputs = run(padded, start)
        return [output[: len(rows)] for output in outputs] if len(padded) > len(rows) else list(outputs)

    def _padded(self, rows: RowsT) -> RowsT:
        """Rows with the last one repeated up to an invariant width."""
        count = len(rows)
        missing = self.blocks.pass_width(count) - count if count <= LARGEST_WIDTH else 0
        if missing <= 0:
            return rows
        if isinstance(rows, list):
            return rows + rows[-1:] * missing
        return torch.cat((rows, rows[-1:].expand(missing, -1)))
