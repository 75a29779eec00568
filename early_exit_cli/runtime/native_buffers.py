"""Tensors as compiled code reads them: by address, in its own tiles, kept alive."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.output import AttentionShape
from early_exit_cli.numerics import one_thread
from early_exit_cli.runtime.exact_argmax import int8_rows
from early_exit_cli.runtime.kv_cache import KVCache, Part
from early_exit_cli.runtime.native_code import Attention, Int8, Norm, Product
from early_exit_cli.runtime.native_code import Part as NativePart
from early_exit_cli.runtime.nf4_linear import VOCAB_TILE, Int8Rows, MergedNF4, PlainRows

TILE, SCALES_TOGETHER = 32, 4
ROWS_AT_ONCE = 4096
BF16, INT8 = 1, 2
"""Kinds of weights, as in `blocks.c`; 0 is NF4."""


class Held:
    """Tensors that compiled code reads by address, kept alive, in the tiles that its instruction set wants."""

    def __init__(self, code: ctypes.CDLL) -> None:
        self.code = code
        self.tensors: list[Tensor] = []

    def address(self, tensor: Tensor | None) -> int | None:
        """Where its numbers lie, one after another."""
        if tensor is None:
            return None
        self.tensors.append(tensor.detach().contiguous())
        return self.tensors[-1].data_ptr()

    def norm(self, weight: Tensor | None) -> Norm:
        """A norm by its weight, which says how it rounds (`llama_block.Norm`); none where there is none."""
        once = weight is not None and weight.dtype == torch.float32
        return Norm(None if once else self.address(weight), self.address(weight) if once else None)

    def int8_of(self, *weights: Tensor) -> Int8:
        """A product over weights [out, in], one behind another."""
        whole = torch.cat(weights).detach()
        tiles, scale = torch.empty(whole.shape, dtype=torch.uint8), torch.empty(len(whole))
        with one_thread():
            for part in parts_of(len(whole)):
                tiles[part], scale[part], _ = self.int8_tiles(whole[part].float())
        return self.int8(tiles, scale)

    def attention(
        self,
        shape: AttentionShape,
        projections: tuple[Tensor, Tensor, Tensor, Tensor],
        norms: tuple[Tensor | None, Tensor | None] = (None, None),
        eps: float = 0.0,
    ) -> Attention:
        """An attention of a head's own.

        Args:
            projections: weights [out, in] of query, key, value and output. norms: of queries and of keys, [head_dim].
        """
        query, key, value, output = projections
        products = (self.int8_of(key, value), self.int8_of(query), self.int8_of(output))
        sizes = (shape.query_heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5)
        return Attention(*products, *map(self.address, norms), *sizes, eps)

    def int8_tiles(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows [out, in] float32 in int8.

        Returns:
            Integers plus 128 in tiles of 16 rows and 4 inputs, or 2, [out, in] uint8, scales [out] float32, what they
            stand for [out, in] float32.
        """
        (out, size), inputs = rows.shape, int(self.code.int8_inputs)
        whole, scales = int8_rows(rows)
        scale = scales.float()
        tiles = (whole.view(torch.uint8) ^ 128).view(out // VOCAB_TILE, VOCAB_TILE, size // inputs, inputs)
        return tiles.transpose(1, 2).reshape(out, size), scale, whole.float() * scale[:, None]

    def product(self, product: Any) -> Product:
        """A product over a linear map's weights (`nf4_linear`), which are those of the library's own modules wherever the
        code reads them as they lie.
        """
        sizes = product.in_features, product.out_features
        if isinstance(product, PlainRows):
            return Product(self.address(product.weight), None, self.address(product.bias), *sizes, BF16)
        if isinstance(product, Int8Rows):
            whole, scales = map(self.address, product.joined())
            return Product(whole, None, self.address(product.bias), *sizes, INT8, scales)
        if isinstance(product, MergedNF4):
            weight, scale = product.packed, product.scales.view(product.out_features, -1)
        elif self.code.packs_outputs:
            weight, scale = product.weight, product.scales
        else:
            weight, scale = by_rows(product.weight, product.scales)
        if not self.code.packs_outputs:  # [out, in / 64] to [out / 4, in / 64, 4]
            scale = scale.to(torch.bfloat16).unflatten(0, (-1, SCALES_TOGETHER)).transpose(1, 2)
        return Product(*map(self.address, (weight, scale, product.bias)), *sizes)

    def int8(self, tiles: Tensor, scale: Tensor) -> Int8:
        """A product over what `int8_tiles` made."""
        return Int8(self.address(tiles), self.address(scale), tiles.shape[1], tiles.shape[0])


def parts_of(rows: int) -> Iterator[slice]:
    """Of so many rows, to be made int8 one after another: float32 copies of all would take several times their memory."""
    return (slice(start, min(start + ROWS_AT_ONCE, rows)) for start in range(0, rows, ROWS_AT_ONCE))


def by_rows(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' packing for CPUs with AVX512-BF16 -> its plain one.

    Args:
        packed: [out, in / 2] uint8, two inputs of 32 outputs together. scales: [in / 64, out].

    Returns:
        [out, in / 2] uint8, the first of two inputs in the upper half; [out, in / 64].
    """
    out, half = packed.shape
    pairs = packed.view(out // TILE, half, TILE)
    codes = torch.cat((pairs & 15, pairs >> 4), 2).view(out // TILE, half, TILE, 2)
    plain = codes[..., 0] << 4 | codes[..., 1]
    return plain.transpose(1, 2).reshape(out, half), scales.T


def native_part(part: Part) -> NativePart:
    cache, position = part.cache, part.position
    if cache.addresses is None or cache.addresses.keys_of is not cache.keys[0]:
        cache.addresses = Addresses(cache)
    found = cache.addresses
    if position + part.width > found.capacity:
        raise IndexError(f"rows up to {position + part.width} in a KV cache of {found.capacity}")
    return NativePart(*found.buffers, found.capacity, position, part.width)


class Addresses:
    """Where a KV cache's buffers and rotary tables are, kept with it until the buffers change."""

    def __init__(self, cache: KVCache) -> None:
        self.keys_of = cache.keys[0]
        cos, sin = zip(*cache.rotary.values(), strict=True)
        self.arrays = [
            (ctypes.c_void_p * len(held))(*(b.data_ptr() for b in held))
            for held in (cache.keys, cache.values, cos, sin)
        ]
        self.buffers = [ctypes.addressof(array) for array in self.arrays]
        self.capacity = cache.capacity
