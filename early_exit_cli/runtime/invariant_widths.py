"""The widths at which a token's bits depend on nothing but the tokens before it: measured, not assumed."""

from __future__ import annotations

import torch
from torch import Tensor

from early_exit_cli.runtime.block_state import BlockState
from early_exit_cli.runtime.blocks import KEY_STEP, LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.exact_argmax import ExactArgmax, faster_widths, usable
from early_exit_cli.runtime.kv_cache import KVCache
from early_exit_cli.runtime.native_blocks import NativeBlocks
from early_exit_cli.runtime.nf4_widths import fused_widths


def measure_widths(blocks: Blocks) -> None:
    """Find the widths at which a token's bits depend on nothing but the tokens before it, and set them on `blocks`.

    Candidates are those of `fused_widths`. The same tokens are run at the largest one, then at every other one in
    windows that put each token into other rows with other neighbours: `probed_blocks` and the LM head, compared bit for
    bit; and one block over random keys, at many lengths and positions. Where even the largest width disagrees with itself in
    other rows, it is the only one used and `is_invariant` is false: nothing is promised there.
    """
    *others, largest = fused_widths(blocks, blocks.candidate_widths)
    probe = _Probe(blocks, largest)
    blocks.is_invariant = probe.agrees(largest)
    found = [width for width in others if probe.agrees(width)] if blocks.is_invariant else []
    blocks.widths = (*found, largest)
    blocks.any_length = blocks.is_invariant and probe.same_at_every_length(blocks.widths)
    head = blocks.backbone.lm_head
    if not isinstance(blocks, NativeBlocks) and blocks.reads_lm_head and usable(head.weight):
        blocks.argmax_widths = faster_widths(ExactArgmax(head.weight), probe.reference[0], blocks.widths)


class _Probe:
    """Random tokens through all blocks, and random states through one block over long random keys.

    largest: the width that all others are compared with.
    """

    offset = 3
    far = tuple(
        (capacity, int(capacity * share))
        for capacity in (128, 256, 320, 512, 768, 832, 1024, 2048)
        for share in (0.4, 0.85)
    )
    """(keys in the buffer, position of the first row) of the passes over random keys."""

    def __init__(self, blocks: Blocks, largest: int) -> None:
        self.blocks = blocks
        self.largest = largest
        self.far_caches: dict[tuple[int, bool], KVCache] = {}
        self.length = -(-2 * LARGEST_WIDTH // largest) * largest
        backbone = blocks.backbone
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype)

        self.ids = torch.randint(backbone.vocab_size, (self.length,), generator=generator).to(backbone.device)
        self.block = blocks.has_keys.index(True)
        """The first with attention."""
        self.hidden = random(largest, blocks.embed(self.ids[:1]).shape[1] if self.block == 0 else backbone.hidden_size)
        shapes = blocks.kv_shapes[self.block]
        self.far_keys, self.far_values = (random(heads, self.far[-1][0], size) for heads, size in shapes)
        self.reference = self._outputs(largest, 0, self._cache(), self.length)
        self.far_reference = self._far(largest, 0)

    def _outputs(self, width: int, offset: int, cache: KVCache, most: int) -> tuple[Tensor, Tensor]:
        """Normed states of tokens `offset` and on, in windows of `width`, over a KV cache that holds those before; logits of
        `most` of them, or a few more.
        """
        blocks = self.blocks
        starts = range(offset, self.length - width + 1, width)
        states = torch.cat([blocks.final_norm(self._window(start, width, cache)) for start in starts])
        read = range(0, min(len(states), most), width)
        return states, torch.cat([blocks.logits(states[start : start + width]) for start in read])

    def _cache(self) -> KVCache:
        return self.blocks.new_cache(self.length + KEY_STEP)

    def _window(self, start: int, width: int, cache: KVCache) -> Tensor:
        """States after the probed blocks of `width` tokens from `start` on."""
        blocks = self.blocks
        return blocks.run(blocks.embed(self.ids[start : start + width]), cache, start, 0, blocks.probed_blocks)

    def _far(self, width: int, offset: int) -> list[Tensor]:
        """`width` of the random states, from the `offset`-th on, through one block over the random keys."""
        results = []
        for capacity, position in self.far:
            cache = self._far_cache(capacity)
            if offset:  # the rows before are there already
                self._block(self.hidden, cache, position)
            results.append(self._block(self.hidden[offset : offset + width], cache, position + offset))
        return results

    def _far_cache(self, limit: int, end: int | None = None) -> KVCache:
        """The random keys and values in that block of a cache for `limit` tokens; its buffers just hold `end`."""
        cache = self.far_caches.get((limit, end is None))
        if cache is None:  # made once: it has buffers for all blocks, which only a large model's memory notices
            cache = self.far_caches[limit, end is None] = self.blocks.new_cache(limit)
        cache.states = {block: BlockState() for block in cache.states}
        capacity = limit if end is None else -(-end // KEY_STEP) * KEY_STEP
        cache.keys, cache.values = (
            [far[: len(held), :capacity].clone() for held in buffers[: self.block + 1]]
            for far, buffers in ((self.far_keys, cache.keys), (self.far_values, cache.values))
        )
        return cache

    def _block(self, hidden: Tensor, cache: KVCache, position: int) -> Tensor:
        return self.blocks.run(hidden, cache, position, self.block, self.block + 1)

    def agrees(self, width: int) -> bool:
        """Whether this width gives the reference's bits, in windows shifted against it."""
        cache = self._cache()
        self._window(0, self.largest, cache)  # the rows before `offset`
        found = self._outputs(width, self.offset, cache, LARGEST_WIDTH)
        return (
            all(
                torch.equal(ours, theirs[self.offset :][: len(ours)])
                for ours, theirs in zip(found, self.reference, strict=True)
            )
            and self._far_agrees(width, 0)
            and (width == self.largest or self._far_agrees(width, min(self.offset, self.largest - width)))
        )

    def same_at_every_length(self, widths: tuple[int, ...]) -> bool:
        """Whether a block over random keys gives the same bits however large the buffer is."""
        limit = self.far[-1][0]
        for end in range(61, limit, 131):
            whole, tight = self._far_cache(limit), self._far_cache(limit, end)
            for width in widths:
                hidden, position = self.hidden[:width], end - width
                if not torch.equal(*(self._block(hidden, cache, position) for cache in (whole, tight))):
                    return False
        return True

    def _far_agrees(self, width: int, offset: int) -> bool:
        pairs = zip(self._far(width, offset), self.far_reference, strict=True)
        return all(torch.equal(rows, whole[offset : offset + width]) for rows, whole in pairs)
