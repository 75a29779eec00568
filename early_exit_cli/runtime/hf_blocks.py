"""The library's own decoder blocks, for any supported family."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.runtime.blocks import LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.experts import use_wide_experts
from early_exit_cli.runtime.kv_cache import KVCache, Rows


class HFBlocks(Blocks):
    """The library's own decoder blocks, fed a KV cache object of ours."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        use_wide_experts(backbone.model, LARGEST_WIDTH)
        inner = backbone.blocks[0].modules()  # a block may be wrapped in something that passes its arguments on
        forwards = [inspect.signature(type(module).forward).parameters for module in inner]
        names = ("cache", "past_key_values", "layer_past")
        self.cache_argument = next(name for forward in forwards for name in names if name in forward)
        self.takes = {name for forward in forwards for name in forward}

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        rows = self.rows(cache, position, hidden.shape[0])
        positions = torch.arange(position, position + hidden.shape[0], device=hidden.device)
        if first == 0:
            hidden = self.backbone.add_positions(hidden, positions)
        arguments: dict[str, Any] = {"position_ids": positions[None], self.cache_argument: _LibraryCache(cache, rows)}
        tables = {kind: (cos[None, :, 0], sin[None, :, 0]) for kind, (cos, sin) in rows.rotary.items()}
        if "alibi" in self.takes:
            arguments["alibi"] = None
        if "shared_kv_states" in self.takes:  # which later blocks may read, in models that are refused
            arguments["shared_kv_states"] = {}
        hidden = hidden[None]
        for block in range(first, last):
            if tables:
                arguments["position_embeddings"] = tables[self.rotary_kinds[block]]
            output = self.backbone.blocks[block](hidden, attention_mask=rows.masks[self.windows[block]], **arguments)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden[0]


class _LibraryCache:
    """The one method of `transformers.Cache` that attention modules call."""

    def __init__(self, cache: KVCache, rows: Rows) -> None:
        self.cache = cache
        self.rows = rows

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, width, head_dim] in place; give back all keys and values that may be read."""
        rows = self.rows
        stored_keys, stored_values = self.cache.keys[block], self.cache.values[block]
        stored_keys[:, rows.place] = keys[0]
        stored_values[:, rows.place] = values[0]
        return stored_keys[None, :, : rows.keys], stored_values[None, :, : rows.keys]
