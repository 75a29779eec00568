"""Passes over many texts side by side, padded on the left: a batch dimension that the single text's path does without.

The blocks are those of `FusedBlocks`, over the rows of all texts; only the attention, over a batch of buffers, is
another. Two ways in: `run` at a place that the host knows, for prompts; `run_at` at one that only the device knows, for
decoding steps that are recorded. Nothing is promised about bits here.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.llama_block import LlamaBlock
from early_exit_cli.runtime.nf4_linear import LinearMap, MergedNF4, PackedNF4

PRODUCTS = ("qkv", "output", "gate_up", "down")
COLUMNS_AT_ONCE = 1024


@dataclass(frozen=True)
class PaddedRows:
    """Texts, and their keys and values.

    starts: [rows] int64, where each text begins. keys, values: [rows, kv_heads, capacity, head_dim] per block.
    cos, sin: [capacity, 1, head_dim] each. layers: those of `blocks`, or these with unpacked weights (`dense_layers`).
    """

    blocks: FusedBlocks
    layers: list[LlamaBlock]
    starts: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cos: Tensor
    sin: Tensor

    @classmethod
    def allocate(cls, blocks: FusedBlocks, layers: list[LlamaBlock], starts: Tensor, capacity: int) -> PaddedRows:
        """Buffers of zeros for texts of up to `capacity` tokens, padding included."""
        backbone = blocks.backbone
        shape = (starts.numel(), blocks.kv_heads, capacity, blocks.head_dim)
        keys, values = (
            [torch.zeros(shape, dtype=backbone.dtype, device=backbone.device) for _ in range(blocks.num_blocks)]
            for _ in range(2)
        )
        return cls(blocks, layers, starts, keys, values, *blocks.rotary_tables(capacity)[None])

    def part(self, rows: slice | Tensor) -> PaddedRows:
        """Some of the rows: of a slice on the same memory, of numbers [count] int64 copies."""
        return dataclasses.replace(
            self,
            starts=self.starts[rows],
            keys=[keys[rows] for keys in self.keys],
            values=[values[rows] for values in self.values],
        )

    def run(self, ids: Tensor, position: int) -> Tensor:
        """All blocks over [rows, width] token ids at `position`; the last token's states, [rows, hidden]."""
        end = position + ids.shape[1]
        place = torch.arange(position, end, device=ids.device)
        masks = {window: self._seen(place, end, window) for window in set(self.blocks.windows)}
        return self._through(ids, slice(position, end), end, self.cos[position:end], self.sin[position:end], masks)

    def run_at(self, ids: Tensor, position: Tensor, end: int) -> Tensor:
        """`run` for [rows, 1] token ids as a function of tensors only: it can be recorded and replayed elsewhere.

        Args:
            position: [1] int64 on the device.
            end: how many keys are read; `position` must be below it.
        """
        masks = {}
        for window in set(self.blocks.windows):
            seen = self._seen(position, end, window)
            mask = torch.zeros(seen.shape, dtype=self.keys[0].dtype, device=seen.device)  # made once for all blocks
            masks[window] = mask.masked_fill_(~seen, float("-inf"))
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        return self._through(ids, position, end, cos, sin, masks)

    def _through(
        self, ids: Tensor, place: slice | Tensor, end: int, cos: Tensor, sin: Tensor, masks: dict[int | None, Tensor]
    ) -> Tensor:
        """All blocks over [rows, width] token ids, reading the first `end` keys; the last token's states."""
        hidden = self.blocks.embed(ids.flatten())  # [rows * width, hidden]
        for block, layer in enumerate(self.layers):
            mask = masks[self.blocks.windows[block]]
            attention = partial(self._attention, self.keys[block], self.values[block], place, end, mask)
            hidden = layer.run(hidden, ids.shape, (cos, sin), attention)
        return hidden.view(*ids.shape, -1)[:, -1]

    def _attention(
        self,
        keys: Tensor,
        values: Tensor,
        place: slice | Tensor,
        end: int,
        mask: Tensor,
        qk: Tensor,
        new_values: Tensor,
    ) -> Tensor:
        """The texts' attention in a block, with their new keys and values written first.

        Args:
            qk: [rows, width, query_heads + kv_heads, head_dim]. new_values: [rows, width, kv_heads, head_dim].
        """
        count, width = qk.shape[:2]
        query_heads, kv_heads = self.blocks.query_heads, self.blocks.kv_heads
        group = query_heads // kv_heads
        keys[:, :, place] = qk[:, :, query_heads:].transpose(1, 2)
        values[:, :, place] = new_values.transpose(1, 2)
        query = qk[:, :, :query_heads].unflatten(2, (kv_heads, group)).permute(0, 2, 1, 3, 4)
        attended = F.scaled_dot_product_attention(
            query.flatten(2, 3),  # [rows, kv_heads, width * group, head_dim]
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=mask,
            scale=self.blocks.scale,
        )
        attended = attended.unflatten(2, (width, group)).transpose(1, 2)  # the kernel decides how it lies in memory
        return attended.reshape(count * width, -1)

    def _seen(self, place: Tensor, end: int, window: int | None) -> Tensor:
        """[rows, 1, width * group, end] bool: causal, from the row's start on; padding sees itself, to stay finite."""
        row, key = place[:, None], torch.arange(end, device=place.device)
        seen = key <= row
        if window is not None:
            seen &= key > row - window
        seen = (seen & (key >= self.starts[:, None, None])) | (key == row)
        return seen.repeat_interleave(self.blocks.query_heads // self.blocks.kv_heads, 1)[:, None]


def dense_bytes(blocks: FusedBlocks) -> int:
    """What `dense_layers` allocates."""
    products = [getattr(layer, name) for layer in blocks.layers for name in PRODUCTS]
    packed = [product for product in products if isinstance(product, MergedNF4 | PackedNF4)]
    return sum(product.out_features * product.in_features for product in packed) * blocks.backbone.dtype.itemsize


def dense_layers(blocks: FusedBlocks) -> list[LlamaBlock]:
    """The blocks' layers with NF4 weights unpacked: for passes so wide that unpacking anew each time is what costs."""
    found = []
    for layer in blocks.layers:
        products: dict[str, Any] = {name: _dense(getattr(layer, name), blocks.backbone.dtype) for name in PRODUCTS}
        found.append(dataclasses.replace(layer, **products))
    return found


def _dense(product: LinearMap, dtype: torch.dtype) -> LinearMap:
    """The same product on a weight in `dtype`."""
    if not isinstance(product, MergedNF4 | PackedNF4):
        return product
    weight, bias = unpacked(product, dtype), product.bias
    return lambda x: F.linear(x, weight, bias)


def unpacked(product: MergedNF4 | PackedNF4, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`: NF4's product with the identity, each sum of which has one term."""
    bare = copy.copy(product)
    bare.bias = None  # added here and taken off again, it would cost bits
    device = product.scales.device
    weight = torch.empty(product.out_features, product.in_features, dtype=dtype, device=device)
    columns = torch.arange(product.in_features, device=device).split(COLUMNS_AT_ONCE)
    for part, into in zip(columns, weight.split(COLUMNS_AT_ONCE, 1), strict=True):
        into.copy_(bare(F.one_hot(part, product.in_features).to(dtype)).t())
    return weight
