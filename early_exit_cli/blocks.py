"""Running the backbone's decoder blocks a to b over a preallocated KV cache.

The contract of both runners, on which every promise of this program stands:

* A pass takes `width` rows: the tokens at `position .. position + width - 1`. Row i attends to keys 0 .. position + i.
* The KV cache is one preallocated buffer per block. A pass overwrites its rows there; what lies behind the last
  committed token is never read, so rolling back is forgetting a number.
* **Width invariance**: for widths of `widths`, a token's result has the same bits whatever its row, its neighbours
  (rejected drafts, padding) and the width. `measure_widths` checks this on the device at hand. The number of keys read
  may change the last bits, so a pass always reads the whole buffer, masked: one length for a request.

`HFBlocks` runs the library's own modules, for any supported family. `FusedBlocks` is our lean path for the Llama shape:
merged projections, grouped-query attention with the query heads of one key head laid side by side as rows (no repeated
keys), no module overhead. Both round at the same places, so they agree bit for bit where their products do.
"""

from __future__ import annotations

import ctypes
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from early_exit_cli.artifacts import (
    processor_name,
    read_json,
    sha256_of,
    user_cache_dir,
    versions,
    write_json,
)
from early_exit_cli.backbone import Backbone
from early_exit_cli.errors import BundleError, UnsupportedBackboneError
from early_exit_cli.lm_head import ExactArgmax, faster_widths, full_argmax, usable

CANDIDATE_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
LARGEST_WIDTH = 16
PREFILL_WIDTH = 64
KEY_STEP = 64

LinearMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """What a pass needs to know of its rows, made once and shared by all blocks.

    cos, sin: [width, 1, head_dim]; sin carries the sign of rotate_half.
    masks: window -> additive mask [1, 1, width, capacity]. grouped: the same with each row repeated for the query heads
    of a key head, [1, 1, width * group, capacity].
    """

    position: int
    width: int
    cos: Tensor
    sin: Tensor
    masks: dict[int | None, Tensor]
    grouped: dict[int | None, Tensor]


class KVCache:
    """Keys and values of every block, [kv_heads, capacity, head_dim] each, and the number of committed tokens."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], cos: Tensor, sin: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.cos = cos
        self.sin = sin
        self.length = 0
        self.rows: Rows | None = None

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]


class Blocks(ABC):
    """Interface of the runners."""

    def __init__(self, backbone: Backbone) -> None:
        config = backbone.config
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type", "default") not in ("default", "linear", "llama3", "yarn"):
            raise UnsupportedBackboneError(
                f"{backbone.name}: rotary scaling {rope['rope_type']!r} depends on the length of the text"
            )
        self.backbone = backbone
        self.num_blocks = backbone.num_blocks
        self.query_heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.query_heads)
        self.head_dim = int(getattr(config, "head_dim", None) or backbone.hidden_size // self.query_heads)
        self.windows = [backbone.window_of(block) for block in range(self.num_blocks)]
        self.widths: tuple[int, ...] = (LARGEST_WIDTH,)
        self.is_invariant = False
        self.argmax_widths: tuple[int, ...] = ()
        self.exact_argmax: ExactArgmax | None = None

    @abstractmethod
    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        """Run blocks first .. last - 1 on the rows at `position`, [width, hidden] to [width, hidden]."""

    def new_cache(self, capacity: int) -> KVCache:
        """A KV cache for `capacity` tokens, rounded up to whole steps of keys."""
        capacity = -(-capacity // KEY_STEP) * KEY_STEP
        device, dtype = self.backbone.device, self.backbone.dtype
        shape = (self.kv_heads, capacity, self.head_dim)
        positions = torch.arange(capacity, device=device)[None]
        cos, sin = self.backbone.rotary(
            torch.empty(0, dtype=dtype, device=device), positions
        )  # [1, capacity, head_dim]
        half = self.head_dim // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        return KVCache(
            keys=[torch.zeros(shape, dtype=dtype, device=device) for _ in range(self.num_blocks)],
            values=[torch.zeros(shape, dtype=dtype, device=device) for _ in range(self.num_blocks)],
            cos=cos[0, :, None],
            sin=signed[0, :, None],
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """[width] int64 -> [width, hidden]."""
        return self.backbone.embedding(token_ids)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm in front of the LM head, [width, hidden] -> [width, hidden]."""
        return self.backbone.norm(hidden)

    def logits(self, normed: Tensor) -> Tensor:
        """[width, hidden], final norm applied -> [width, vocab]."""
        return self.backbone.lm_head(normed)

    def choose(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's choice after each row, [width, hidden] -> ([width] int64, [width] best logits or near them).

        Always the argmax of `logits`; by `ExactArgmax` at the widths where that is faster on this device.
        """
        if self.exact_argmax is not None and normed.shape[0] in self.argmax_widths:
            return self.exact_argmax(normed)
        return full_argmax(self.backbone.lm_head.weight, normed)

    def rows(self, cache: KVCache, position: int, width: int) -> Rows:
        """Rotary tables and masks of a pass; the last one is kept, since a pass is often run in parts."""
        kept = cache.rows
        if kept is not None and kept.position == position and kept.width == width:
            return kept
        end = position + width
        device, dtype = self.backbone.device, self.backbone.dtype
        row = torch.arange(position, end, device=device)[:, None]
        key = torch.arange(cache.capacity, device=device)
        masks: dict[int | None, Tensor] = {}
        grouped: dict[int | None, Tensor] = {}
        for window in set(self.windows):
            hidden_keys = key > row
            if window is not None:
                hidden_keys |= key <= row - window
            mask = torch.zeros(width, cache.capacity, dtype=dtype, device=device).masked_fill_(
                hidden_keys, float("-inf")
            )
            masks[window] = mask[None, None]
            grouped[window] = mask.repeat_interleave(self.query_heads // self.kv_heads, 0)[None, None]
        cache.rows = Rows(position, width, cache.cos[position:end], cache.sin[position:end], masks, grouped)
        return cache.rows

    def pass_width(self, rows: int) -> int:
        """The smallest invariant width that holds `rows`."""
        return next(width for width in self.widths if width >= rows)


class HFBlocks(Blocks):
    """The library's own decoder blocks, fed a KV cache object of ours."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        forward = inspect.signature(type(backbone.blocks[0]).forward).parameters
        self.cache_argument = "cache" if "cache" in forward else "past_key_values"

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        rows = self.rows(cache, position, hidden.shape[0])
        half = self.head_dim // 2
        sin = torch.cat((-rows.sin[..., :half], rows.sin[..., half:]), -1)  # the library applies the sign itself
        arguments: dict[str, Any] = {
            "position_embeddings": (rows.cos[None, :, 0], sin[None, :, 0]),
            "position_ids": torch.arange(position, position + rows.width, device=hidden.device)[None],
            self.cache_argument: _LibraryCache(cache, rows),
        }
        hidden = hidden[None]
        for block in range(first, last):
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
        end = rows.position + rows.width
        stored_keys, stored_values = self.cache.keys[block], self.cache.values[block]
        stored_keys[:, rows.position : end] = keys[0]
        stored_values[:, rows.position : end] = values[0]
        return stored_keys[None], stored_values[None]


class FusedBlocks(Blocks):
    """Our own lean path for the Llama shape.

    RMSNorm, rotary embedding, grouped-query attention, gated MLP; with a norm on queries and keys (Qwen3), bias on the
    projections (Qwen2), sliding windows (Mistral). Queries, keys and values are one product, gate and up another.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        from transformers.activations import ACT2FN

        self.activation = ACT2FN[backbone.config.hidden_act]
        self.eps = float(backbone.config.rms_norm_eps)
        self.scale = self.head_dim**-0.5
        self.layers = [self._merge(block) for block in backbone.blocks]

    def _merge(self, block: Any) -> _FusedBlock:
        attention, mlp = block.self_attn, block.mlp
        qk_norm = None
        if getattr(attention, "q_norm", None) is not None:
            qk_norm = torch.cat(
                (
                    attention.q_norm.weight.expand(self.query_heads, -1),
                    attention.k_norm.weight.expand(self.kv_heads, -1),
                )
            )
        return _FusedBlock(
            input_norm=block.input_layernorm.weight,
            qkv=merged_linear([attention.q_proj, attention.k_proj, attention.v_proj]),
            qk_norm=qk_norm,
            output=merged_linear([attention.o_proj]),
            mlp_norm=block.post_attention_layernorm.weight,
            gate_up=merged_linear([mlp.gate_proj, mlp.up_proj]),
            down=merged_linear([mlp.down_proj]),
            inner=int(mlp.down_proj.in_features),
        )

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        width = hidden.shape[0]
        rows = self.rows(cache, position, width)
        end = position + width
        heads = self.query_heads + self.kv_heads
        group = self.query_heads // self.kv_heads
        split = self.query_heads * self.head_dim
        half = self.head_dim // 2
        shape = (hidden.shape[1],)
        for block in range(first, last):
            layer = self.layers[block]
            normed = layer.input_norm * F.rms_norm(hidden, shape, None, self.eps)
            qkv = layer.qkv(normed)  # [width, (query_heads + 2 kv_heads) * head_dim]
            qk = qkv[:, : heads * self.head_dim].view(width, heads, self.head_dim)
            if layer.qk_norm is not None:
                qk = layer.qk_norm * F.rms_norm(qk, (self.head_dim,), None, self.eps)
            qk = qk * rows.cos + qk.roll(half, -1) * rows.sin
            stored_keys, stored_values = cache.keys[block], cache.values[block]
            stored_keys[:, position:end] = qk[:, self.query_heads :].transpose(0, 1)
            stored_values[:, position:end] = (
                qkv[:, heads * self.head_dim :].view(width, self.kv_heads, self.head_dim).transpose(0, 1)
            )
            # Rows (token, query head) of one key head side by side: [1, kv_heads, width * group, head_dim]
            query = (
                qk[:, : self.query_heads]
                .reshape(width, self.kv_heads, group, self.head_dim)
                .transpose(0, 1)
                .reshape(1, self.kv_heads, width * group, self.head_dim)
            )
            attended = F.scaled_dot_product_attention(
                query,
                stored_keys[None],
                stored_values[None],
                attn_mask=rows.grouped[self.windows[block]],
                scale=self.scale,
            )
            attended = attended.view(self.kv_heads, width, group * self.head_dim).transpose(0, 1).reshape(width, split)
            hidden = hidden + layer.output(attended)
            normed = layer.mlp_norm * F.rms_norm(hidden, shape, None, self.eps)
            gate_up = layer.gate_up(normed)  # [width, 2 * inner]
            hidden = hidden + layer.down(self.activation(gate_up[:, : layer.inner]) * gate_up[:, layer.inner :])
        return hidden


@dataclass(frozen=True)
class _FusedBlock:
    input_norm: Tensor
    qkv: LinearMap
    qk_norm: Tensor | None
    output: LinearMap
    mlp_norm: Tensor
    gate_up: LinearMap
    down: LinearMap
    inner: int


def merged_linear(modules: list[Any]) -> LinearMap:
    """One linear map whose output rows are those of `modules` (same input), in order.

    NF4 weights that bitsandbytes has packed for the CPU are tiles of 32 rows with one scale per row and 64 inputs, so
    they merge exactly by concatenation. Kinds that do not merge keep their own products.
    """
    bias = None
    if any(getattr(module, "bias", None) is not None for module in modules):
        bias = torch.cat([module.bias for module in modules])
    if all(type(module) is nn.Linear for module in modules):
        weight = modules[0].weight if len(modules) == 1 else torch.cat([module.weight for module in modules])
        return lambda x: F.linear(x, weight, bias)
    if all(_is_packed_nf4(module) for module in modules):
        return PackedNF4(modules, bias)
    if len(modules) == 1:
        return modules[0]
    return lambda x: torch.cat([module(x) for module in modules], -1)


def _is_packed_nf4(module: Any) -> bool:
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return (
        state is not None
        and getattr(state, "packing_format_for_cpu", False)
        and state.quant_type == "nf4"
        and _nf4_kernel() is not None
    )


def _nf4_kernel() -> Any:
    """bitsandbytes' CPU kernel for packed NF4 weights; none where this build has none.

    The torch operator around it costs 16 us a call, half of what the product itself takes at small widths.
    """
    from bitsandbytes.cextension import lib

    return getattr(lib, "gemv_4bit_inference_cpu_nf4_bf16", None)


class PackedNF4:
    """x [width, in] bf16 -> [width, out] bf16 for NF4 weights packed by bitsandbytes for AVX512-BF16."""

    def __init__(self, modules: list[Any], bias: Tensor | None) -> None:
        states = [module.weight.quant_state for module in modules]
        one = len(modules) == 1
        self.weight = modules[0].weight.data if one else torch.cat([module.weight.data for module in modules])
        self.scales = states[0].absmax if one else torch.cat([state.absmax for state in states], 1)  # [in / 64, out]
        self.bias = bias
        self.out_features = sum(int(state.shape[0]) for state in states)
        self.in_features = int(states[0].shape[1])
        self.kernel = _nf4_kernel()
        self.arguments = (
            ctypes.c_int64(self.out_features),
            ctypes.c_int64(self.in_features),
            ctypes.c_void_p(self.weight.data_ptr()),
            ctypes.c_void_p(self.scales.data_ptr()),
            ctypes.c_int64(int(states[0].blocksize)),
        )

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        width = x.shape[0]
        out = torch.empty(width, self.out_features, dtype=torch.bfloat16)
        n, k, weight, scales, block = self.arguments
        self.kernel(
            ctypes.c_int64(width),
            n,
            k,
            ctypes.c_void_p(x.data_ptr()),
            weight,
            scales,
            ctypes.c_void_p(out.data_ptr()),
            block,
            k,
            n,
        )
        return out if self.bias is None else out + self.bias


def make_blocks(backbone: Backbone, runner: str = "auto") -> Blocks:
    """The runner asked for, with what was measured of it on this device.

    Measured once for each backbone, device, runner and set of versions; kept in the user's cache folder.
    """
    blocks: Blocks = HFBlocks(backbone) if runner == "hf" else FusedBlocks(backbone)
    identity = {
        "fingerprint": backbone.fingerprint,
        "device": processor_name() if backbone.device.type == "cpu" else torch.cuda.get_device_name(backbone.device),
        "dtype": str(backbone.dtype),
        "runner": type(blocks).__name__,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    path = user_cache_dir() / "widths" / f"{sha256_of(json.dumps(identity, sort_keys=True))[:24]}.json"
    try:
        found = read_json(path)
        blocks.widths = tuple(map(int, found["widths"]))
        blocks.is_invariant, blocks.argmax_widths = bool(found["is_invariant"]), tuple(map(int, found["argmax_widths"]))
    except (BundleError, KeyError, TypeError, ValueError):
        with torch.inference_mode():
            measure_widths(blocks)
        measured = {
            "widths": list(blocks.widths),
            "is_invariant": blocks.is_invariant,
            "argmax_widths": list(blocks.argmax_widths),
        }
        write_json(path, {**measured, **identity})
    if blocks.argmax_widths:
        blocks.exact_argmax = ExactArgmax(backbone.lm_head.weight)
    return blocks


def measure_widths(blocks: Blocks) -> None:
    """Find the widths at which a token's bits depend on nothing but the tokens before it, and set them on `blocks`.

    The same tokens are run at the largest width, then at every other one in windows that put each token into other
    rows with other neighbours: all blocks and the LM head, compared bit for bit; and one block over random keys, at
    many lengths and positions. Where even the largest width disagrees with itself in other rows, it is the only one
    used and `is_invariant` is false: nothing is promised there.
    """
    probe = _Probe(blocks)
    blocks.is_invariant = probe.agrees(LARGEST_WIDTH)
    found = (
        [width for width in CANDIDATE_WIDTHS if width < LARGEST_WIDTH and probe.agrees(width)]
        if blocks.is_invariant
        else []
    )
    blocks.widths = (*found, LARGEST_WIDTH)
    head = blocks.backbone.lm_head
    if head.bias is None and usable(head.weight):
        blocks.argmax_widths = faster_widths(ExactArgmax(head.weight), probe.reference[0], blocks.widths)


class _Probe:
    """Random tokens through all blocks, and random states through one block over long random keys."""

    length = 2 * LARGEST_WIDTH
    offset = 3
    far = tuple(
        (capacity, int(capacity * share))
        for capacity in (128, 256, 320, 512, 768, 832, 1024, 2048)
        for share in (0.4, 0.85)
    )
    """(keys in the buffer, position of the first row) of the passes over random keys."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        backbone = blocks.backbone
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype)

        self.ids = torch.randint(backbone.vocab_size, (self.length,), generator=generator).to(backbone.device)
        self.hidden = random(LARGEST_WIDTH, backbone.hidden_size)
        self.far_keys = random(blocks.kv_heads, self.far[-1][0], blocks.head_dim)
        self.far_values = random(blocks.kv_heads, self.far[-1][0], blocks.head_dim)
        self.reference = self._outputs(LARGEST_WIDTH, 0, None)
        self.far_reference = self._far(LARGEST_WIDTH, 0)

    def _outputs(self, width: int, offset: int, prefix: KVCache | None) -> tuple[Tensor, Tensor, KVCache]:
        """Normed final states and logits of tokens `offset` and on, in windows of `width`, over an earlier KV cache."""
        blocks = self.blocks
        cache = prefix or blocks.new_cache(self.length + KEY_STEP)
        states = torch.cat(
            [
                blocks.final_norm(
                    blocks.run(blocks.embed(self.ids[start : start + width]), cache, start, 0, blocks.num_blocks)
                )
                for start in range(offset, self.length - width + 1, width)
            ]
        )
        logits = torch.cat([blocks.logits(states[start : start + width]) for start in range(0, states.shape[0], width)])
        return states, logits, cache

    def _far(self, width: int, offset: int) -> list[Tensor]:
        """`width` of the random states, from the `offset`-th on, through block 0 over the random keys."""
        results = []
        for capacity, position in self.far:
            cache = self.blocks.new_cache(capacity)
            cache.keys[0].copy_(self.far_keys[:, :capacity])
            cache.values[0].copy_(self.far_values[:, :capacity])
            if offset:  # the rows before are there already
                self.blocks.run(self.hidden, cache, position, 0, 1)
            results.append(self.blocks.run(self.hidden[offset : offset + width], cache, position + offset, 0, 1))
        return results

    def agrees(self, width: int) -> bool:
        """Whether this width gives the reference's bits, in windows shifted against it."""
        states, logits, _ = self._outputs(width, self.offset, self._outputs(LARGEST_WIDTH, 0, None)[2])
        end = self.offset + states.shape[0]
        return (
            torch.equal(states, self.reference[0][self.offset : end])
            and torch.equal(logits, self.reference[1][self.offset : end])
            and self._far_agrees(width, 0)
            and (width == LARGEST_WIDTH or self._far_agrees(width, min(self.offset, LARGEST_WIDTH - width)))
        )

    def _far_agrees(self, width: int, offset: int) -> bool:
        pairs = zip(self._far(width, offset), self.far_reference, strict=True)
        return all(torch.equal(rows, whole[offset : offset + width]) for rows, whole in pairs)
