"""The library's own decoder blocks, for any supported family."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.runtime.alibi import with_distances
from early_exit_cli.runtime.block_state import Columns, StateAt, use_block_states
from early_exit_cli.runtime.blocks import LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.experts import use_wide_experts
from early_exit_cli.runtime.kv_cache import KVCache, Rows


class HFBlocks(Blocks):
    """The library's own decoder blocks, fed a KV cache object of ours."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        use_wide_experts(backbone.model, LARGEST_WIDTH)
        if backbone.blocks_with_state:
            use_block_states(backbone.model)
            self.candidate_widths = tuple(width for width in self.candidate_widths if width % 2 == 0)
            """A delta net has a few gates a token, functions of single numbers: PyTorch computes those of a whole vector of 16
            or 32 at once, and what is left over by other instructions, which give other bits."""
        inner = backbone.blocks[0].modules()  # a block may be wrapped in something that passes its arguments on
        forwards = [inspect.signature(type(module).forward).parameters for module in inner]
        names = ("cache", "past_key_values", "layer_past")
        self.cache_argument = next(name for forward in forwards for name in names if name in forward)
        self.takes = {name for forward in forwards for name in forward}
        self.attends = [backbone.attends(block) for block in range(self.num_blocks)]
        self.is_chunked = [backbone.layer_kind(block) == "chunked_attention" for block in range(self.num_blocks)]
        self.chunk = int(backbone.config.attention_chunk_size) if any(self.is_chunked) else None
        self.input_size = int(getattr(backbone.config, "hidden_size_per_layer_input", None) or 0)
        """Numbers that each block is given of a token besides its state (Gemma 4 E2B and E4B)."""
        shared = getattr(backbone.config, "num_kv_shared_layers", None) or 0
        self.keys_of = {backbone.layer_kind(block): block for block in range(self.num_blocks - shared)}
        """Kind of block -> the last one that keeps keys: those after it read its."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """[width] int64 -> [width, hidden]; behind each state what blocks are given of the token, where they are."""
        embedded = super().embed(token_ids)
        if not self.input_size:
            return embedded
        looked_up = self.backbone.trunk.get_per_layer_inputs(token_ids[None], embedded[None])[0]
        return torch.cat((embedded, looked_up.flatten(1)), 1)

    def new_cache(self, limit: int) -> KVCache:
        cache = super().new_cache(limit)
        if self.input_size:  # zeros: a pass may run on from a block over padding that never was in block 0
            shape = (cache.limit, self.num_blocks, self.input_size)
            cache.block_inputs = torch.zeros(shape, dtype=self.backbone.dtype, device=self.backbone.device)
        return cache

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        if hidden.shape[0] == 1 and cache.states:  # the library would take another way, which keeps one state only
            return self.run(hidden.expand(2, -1), cache, position, first, last)[:1]
        rows = self.rows(cache, position, hidden.shape[0])
        positions = torch.arange(position, position + hidden.shape[0], device=hidden.device)
        if first == 0:
            if cache.block_inputs is not None:
                hidden = self._keep_inputs(hidden, cache.block_inputs[rows.place])
            hidden = self.backbone.add_positions(hidden, positions)
        arguments: dict[str, Any] = {
            "position_ids": positions[None].clamp(max=self.backbone.context_length - 1),  # behind it stands padding
            self.cache_argument: _LibraryCache(cache, rows, position),
        }
        tables: dict[str | None, Any] = {
            kind: (cos[None, :, 0], sin[None, :, 0]) for kind, (cos, sin) in rows.rotary.items()
        }
        if self.backbone.family.complex_rotary:
            tables = {kind: torch.complex(*table) for kind, table in tables.items()}
        masks = dict(rows.masks)
        if self.takes & {"alibi", "position_bias"}:
            masks[None], distances = with_distances(self.backbone, masks[None])
            arguments |= distances
        chunked = None if self.chunk is None else _within_chunks(masks[None], positions, self.chunk)
        if "shared_kv_states" in self.takes:
            arguments["shared_kv_states"] = _SharedKeys(cache, rows, self.keys_of)
        hidden = hidden[None]
        for block in range(first, last):
            if tables:
                arguments["position_embeddings"] = tables[self.rotary_kinds[block]]
            if cache.block_inputs is not None:
                arguments["per_layer_input"] = cache.block_inputs[None, rows.place, block]
            mask = chunked if self.is_chunked[block] else masks[self.windows[block]]
            mask = mask if self.attends[block] else None
            output = self.backbone.blocks[block](hidden, attention_mask=mask, **arguments)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden[0]

    def _keep_inputs(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """What `embed` gives -> states [width, hidden]; what blocks are given besides goes to `kept` [width, blocks, numbers]."""
        hidden, looked_up = hidden.split((self.backbone.hidden_size, kept.shape[1] * kept.shape[2]), 1)
        kept.copy_(self.backbone.trunk.project_per_layer_inputs(hidden[None], looked_up.view(kept.shape)[None])[0])
        return hidden


def _within_chunks(mask: Tensor, positions: Tensor, size: int) -> Tensor:
    """A mask [1, 1, width, keys] that also hides what lies before the chunk of `size` tokens that a row is in."""
    keys = torch.arange(mask.shape[-1], device=mask.device)
    return mask.masked_fill(keys < (positions // size * size)[:, None], float("-inf"))


class _SharedKeys:
    """Keys and values by the kind of block, for blocks that read an earlier one's: the library's dictionary of a pass."""

    def __init__(self, cache: KVCache, rows: Rows, keys_of: dict[str | None, int]) -> None:
        self.cache = cache
        self.keys = rows.keys
        self.keys_of = keys_of

    def __setitem__(self, kind: str, keys: Any) -> None:
        """Nothing: they lie in the KV cache, also for a pass that begins behind the block that keeps them."""

    def __getitem__(self, kind: str) -> tuple[Tensor, Tensor]:
        block = self.keys_of[kind]
        return self.cache.keys[block][None, :, : self.keys], self.cache.values[block][None, :, : self.keys]


class _LibraryCache:
    """The methods of `transformers.Cache` that the library's modules call: attention the first, those with a state the others."""

    def __init__(self, cache: KVCache, rows: Rows, position: int) -> None:
        self.cache = cache
        self.rows = rows
        self.position = position

    def update(self, keys: Tensor, values: Tensor, block: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write [1, kv_heads, width, head_dim] in place; give back all keys and values that may be read."""
        rows = self.rows
        stored_keys, stored_values = self.cache.keys[block], self.cache.values[block]
        stored_keys[:, rows.place] = keys[0]
        stored_values[:, rows.place] = values[0]
        return stored_keys[None, :, : rows.keys], stored_values[None, :, : rows.keys]

    def get_seq_length(self, *_: Any) -> int:
        """Tokens before this pass."""
        return self.position

    def get_conv_state(self, block: int, **_: Any) -> None:
        """None: the module then asks for the input of its convolution, `update_conv_state`."""

    def update_conv_state(self, columns: Tensor, block: int, conv_kernel_size: int, **_: Any) -> Columns:
        """[1, channels, width] -> these rows and those before that the convolution reaches."""
        rows = columns[0].t()
        return Columns(self.cache.states[block].with_earlier(rows, self.position, conv_kernel_size - 1))

    def get_recurrent_state(self, block: int, **_: Any) -> StateAt:
        """What the recurrence continues from."""
        return StateAt(self.cache.states[block], self.position)

    def update_recurrent_state(self, *_: Any, **__: Any) -> None:
        """Nothing: the recurrence has kept its states (`BlockState.scan`)."""
