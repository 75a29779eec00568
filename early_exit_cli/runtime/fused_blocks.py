"""Our own lean block runner for the Llama shape and those near it.

Merged projections, grouped-query attention with the query heads of one key head laid side by side as rows (no repeated
keys), no module overhead. What a library has, we write here and only here, because speed is what this program is for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.runtime.blocks import LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.cuda_graphs import Graphs, kv_bucket
from early_exit_cli.runtime.kv_cache import KVCache, Part, Rotary, Rows
from early_exit_cli.runtime.llama_block import LlamaBlock
from early_exit_cli.runtime.nf4_linear import SCALED_TOGETHER, VOCAB_TILE

SHORT_BUFFER = 512
"""Up to so many keys the library's attention kernel is the faster one on a CPU (docs/measurements/passes.md)."""
KEYS_AT_ONCE = 1024
"""A product over more keys is summed in an order that depends on their number (docs/measurements/passes.md)."""


UNTURNED = "unturned"
"""The kind of rotary table that leaves heads as they are."""


class FusedBlocks(Blocks):
    """Our own lean path for the Llama shape and what departs from it as `BlockLayout` says.

    RMSNorm, rotary embedding, grouped-query attention, gated MLP; with a norm on queries and keys (Qwen3), bias on the
    projections (Qwen2), sliding windows (Mistral), norms behind attention and MLP (Gemma 2, OLMo 2), multipliers (Granite).
    Queries, keys and values are one product, gate and up another.
    """

    def __init__(self, backbone: Backbone) -> None:
        reason = backbone.without_layout
        if reason is not None:
            raise UnsupportedBackboneError(
                f"{backbone.name}: the fused runner is for blocks of the Llama shape or near it, and {reason}",
                hint="--runner hf",
            )
        super().__init__(backbone)
        from transformers.activations import ACT2FN

        self.layout = layout = backbone.block_layout
        self.eps, self.scale = layout.eps, layout.scale
        self.rotary_kinds = [
            UNTURNED if block in layout.without_rotary else kind for block, kind in enumerate(self.rotary_kinds)
        ]
        self.table_kinds = sorted(set(self.rotary_kinds), key=str)
        """The kinds of rotary tables that blocks read, in the order of `rotary_tables`."""
        self.longest_short = SHORT_BUFFER if backbone.device.type == "cpu" else math.inf
        self.graphs: Graphs | None = None
        """Recorded passes, where `select.use_graphs` found them to give the same bits."""
        activation = ACT2FN[layout.activation]
        self.layers = [LlamaBlock.merged(block, layout, activation) for block in backbone.blocks]

    @property
    def name(self) -> str:
        return f"{super().name}{'' if self.graphs is None else ', graphs'}"

    def new_cache(self, limit: int) -> KVCache:
        """On a GPU its length is a bucket's, with recorded passes or without: bits may depend on the keys read."""
        if self.graphs is None:
            return super().new_cache(limit if self.backbone.device.type == "cpu" else kv_bucket(limit))
        bucket = kv_bucket(limit)
        return self.graphs.lease(bucket, super().new_cache) or super().new_cache(bucket)

    def rotary_tables(self, limit: int) -> Rotary:
        """As wide as a head, whatever part of it is turned; sin carries the sign of rotate_half."""
        half, rest = self.layout.rotary_dim // 2, self.head_dim - self.layout.rotary_dim
        found: Rotary = {}
        tables = super().rotary_tables(limit)
        for kind in self.table_kinds:
            cos, sin = tables.get(kind) or next((cos.new_ones(cos.shape), sin * 0) for cos, sin in tables.values())
            sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            found[kind] = F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))
        return found

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        if self.graphs is not None:
            replayed = self.graphs.run(self.run_at, hidden, cache, position, first, last)
            if replayed is not None:
                return replayed
        rows = self.rows(cache, position, hidden.shape[0])
        return self._through(hidden, rows.rotary, [(cache, rows)], first, last)

    def run_batch(self, hidden: Tensor, parts: list[Part], stops: Sequence[int]) -> list[Tensor]:
        """Every product is over the rows of all texts; attention is each text's own."""
        texts = [(part.cache, self.rows(part.cache, part.position, part.width)) for part in parts]
        padding = hidden.shape[0] - sum(part.width for part in parts)
        rotary: Rotary = {}
        for kind in self.table_kinds:
            cos, sin = (torch.cat(parts) for parts in zip(*(rows.rotary[kind] for _, rows in texts), strict=True))
            rotary[kind] = F.pad(cos, (0, 0, 0, 0, 0, padding)), F.pad(sin, (0, 0, 0, 0, 0, padding))
        states = [hidden]
        for first, last in itertools.pairwise([0, *stops]):
            states.append(self._through(states[-1], rotary, texts, first, last))
        return [state[: hidden.shape[0] - padding] for state in states[1:]]

    def run_at(self, hidden: Tensor, cache: KVCache, position: Tensor, first: int, last: int) -> Tensor:
        """`run` as a function of tensors only: `position` is [] int64 on the device, and the whole buffer is read."""
        rows = self.rows_at(cache, position, hidden.shape[0])
        return self._through(hidden, rows.rotary, [(cache, rows)], first, last)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        replayed = None if self.graphs is None else self.graphs.finish(super().finish, hidden)
        return super().finish(hidden) if replayed is None else replayed

    def _through(
        self,
        hidden: Tensor,
        rotary: Rotary,
        texts: list[tuple[KVCache, Rows]],
        first: int,
        last: int,
    ) -> Tensor:
        for block in range(first, last):
            attention = partial(self._attention, block, texts)
            hidden = self.layers[block].run(hidden, hidden.shape[:1], rotary[self.rotary_kinds[block]], attention)
        return hidden

    def _attention(self, block: int, texts: list[tuple[KVCache, Rows]], qk: Tensor, values: Tensor) -> Tensor:
        """Each text's own attention over its rows, one text's behind another's; rows behind the last are padding."""
        if len(texts) == 1 and texts[0][1].width == qk.shape[0]:
            return self._attend_text(block, *texts[0], qk, values)
        sizes = [rows.width for _, rows in texts]
        padding = qk.shape[0] - sum(sizes)
        own = zip(qk.split([*sizes, padding]), values.split([*sizes, padding]), texts)  # noqa: B905 (padding)
        parts = [self._attend_text(block, *text, own_qk, own_values) for own_qk, own_values, text in own]
        return F.pad(torch.cat(parts), (0, 0, 0, padding))

    def _attend_text(self, block: int, cache: KVCache, rows: Rows, qk: Tensor, values: Tensor) -> Tensor:
        """One text's attention in a block, with its new keys and values written first.

        Args:
            qk: [width, query_heads + kv_heads, head_dim]. values: [width, kv_heads, head_dim].

        Returns:
            [width, query_heads * head_dim].
        """
        width, group = qk.shape[0], self.query_heads // self.kv_heads
        stored_keys, stored_values = cache.keys[block], cache.values[block]
        stored_keys[:, rows.place] = qk[:, self.query_heads :].transpose(0, 1)
        stored_values[:, rows.place] = values.transpose(0, 1)
        # Rows (token, query head) of one key head side by side: [kv_heads, width * group, head_dim]
        query = (
            qk[:, : self.query_heads]
            .reshape(width, self.kv_heads, group, self.head_dim)
            .transpose(0, 1)
            .reshape(self.kv_heads, width * group, self.head_dim)
        )
        read = slice(0, rows.keys)
        is_long = cache.limit > self.longest_short and width <= LARGEST_WIDTH
        attended = self._attend(
            query, stored_keys[:, read], stored_values[:, read], rows.grouped[self.windows[block]], is_long
        )
        return attended.view(self.kv_heads, width, group * self.head_dim).transpose(0, 1).reshape(width, -1)

    def grows(self, limit: int) -> bool:
        return self.graphs is None and self.any_length and limit > self.longest_short

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, is_long: bool) -> Tensor:
        """Attention of [kv_heads, width * group, head_dim] queries over [kv_heads, keys, head_dim].

        Over long buffers two plain products: slower than the library's kernel on few keys, faster on many, and the
        bits of a row do not depend on how many masked keys stand behind it: these add exact zeros, as long as a
        product sums its keys in one go. The library's kernel knows no cap of scores.
        """
        cap = self.layout.score_cap
        if not is_long and cap is None:
            return F.scaled_dot_product_attention(
                query[None], keys[None], values[None], attn_mask=mask, scale=self.scale
            )
        if cap is None:
            scores = torch.baddbmm(mask[0], query, keys.transpose(1, 2), alpha=self.scale)
        else:  # rounded where the library's modules round
            scores = torch.tanh(torch.bmm(query, keys.transpose(1, 2)) * self.scale / cap) * cap + mask[0]
        weights = torch.softmax(scores, -1)
        if keys.shape[1] <= KEYS_AT_ONCE:
            return torch.bmm(weights, values)
        first, *rest = zip(weights.split(KEYS_AT_ONCE, -1), values.split(KEYS_AT_ONCE, 1), strict=True)
        attended = torch.bmm(first[0], first[1].contiguous())
        for part, part_values in rest:
            attended = attended + torch.bmm(part, part_values.contiguous())
        return attended


def why_no_code(
    backbone: Backbone, why_not: Callable[[list[Any]], str | None], activations: Sequence[str]
) -> str | None:
    """Why no code of our own, for CPUs or GPUs, takes this backbone's blocks and LM head; None where some may.

    Args:
        why_not: why that code cannot read the weights of these linear maps, None where it can. activations: those it knows.
    """
    reason = backbone.without_layout
    if reason is not None:
        return f"they are for blocks of the Llama shape, and {reason}"
    reason = why_not([module for module in backbone.blocks.modules() if isinstance(module, nn.Linear)])
    if reason is not None:
        return reason
    activation = backbone.block_layout.activation
    if activation not in activations:
        return f"they know the activation {' and '.join(activations)}, not {activation}"
    head = backbone.lm_head
    norms = (cast(Any, backbone.blocks[0]).post_attention_layernorm.weight, backbone.norm.weight)
    if {backbone.dtype, backbone.embedding_weight.dtype, *(norm.dtype for norm in norms)} != {torch.bfloat16}:
        return "they compute in bfloat16"
    if head.bias is not None or head.weight.dtype != torch.bfloat16 or head.weight.shape[0] % VOCAB_TILE:
        return "its LM head has another form"
    return None


def why_not_nf4(products: list[Any], is_nf4: Callable[[Any], bool], where: str) -> str | None:
    """Why these linear maps are none over NF4 weights that code of our own reads; None where they are.

    Args:
        is_nf4: whether a weight is packed as that code reads it. where: on what such code runs, or what else it reads.
    """
    if not all(map(is_nf4, products)):
        return f"they are for weights in 4 bit (NF4) {where}"
    if any(module.weight.quant_state.blocksize != SCALED_TOGETHER for module in products):
        return f"they are for weights of which {SCALED_TOGETHER} share a scale"
    return None
