"""Choosing a block runner, and what is true of it on this device: its invariant widths, checked and not assumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.artifacts import sha256_of, user_cache_dir, versions, write_json
from early_exit_cli.backbone import Backbone
from early_exit_cli.blocks import KEY_STEP, LARGEST_WIDTH, Blocks, HFBlocks, KVCache
from early_exit_cli.cuda_blocks import CudaBlocks
from early_exit_cli.cuda_graphs import CudaRecorder, Graphs, Recorder
from early_exit_cli.errors import BackboneError, BundleError, UnsupportedBackboneError
from early_exit_cli.formats import WidthsForm, read_form
from early_exit_cli.fused_blocks import FusedBlocks
from early_exit_cli.fused_kernels import fused_widths
from early_exit_cli.lm_head import ExactArgmax, faster_widths, usable
from early_exit_cli.native_blocks import NativeBlocks, compiled_blocks


def make_blocks(backbone: Backbone, runner: str = "auto", cuda_graphs: str = "auto") -> Blocks:
    """The runner asked for, with what was measured of it on this device.

    Raises:
        UnsupportedBackboneError: the native or fused runner asked for, and it cannot run these blocks here.
        BackboneError: `cuda_graphs` is "on" and they cannot be used.
    """
    blocks = _pick(backbone, runner, cuda_graphs)
    if cuda_graphs == "on" and not isinstance(blocks, FusedBlocks):
        raise BackboneError("no CUDA graphs here: they record the fused runner's passes", hint="--cuda-graphs auto")
    identity = device_identity(blocks)
    path = measurement_path("widths", identity)
    try:
        found = read_form(path, WidthsForm)
        if not {*found["widths"], *found["argmax_widths"]} <= {*blocks.candidate_widths}:
            raise BundleError(f"{path} holds widths that nobody measures")
        blocks.widths, blocks.argmax_widths = tuple(found["widths"]), tuple(found["argmax_widths"])
        blocks.is_invariant, blocks.any_length = found["is_invariant"], found["any_length"]
    except BundleError:
        with torch.inference_mode():
            measure_widths(blocks)
        measured = {
            "widths": list(blocks.widths),
            "is_invariant": blocks.is_invariant,
            "any_length": blocks.any_length,
            "argmax_widths": list(blocks.argmax_widths),
        }
        write_json(path, {**measured, **identity})
    if blocks.argmax_widths:
        blocks.exact_argmax = ExactArgmax(backbone.lm_head.weight)
    if isinstance(blocks, CudaBlocks):
        blocks.prepare()
    elif isinstance(blocks, FusedBlocks) and backbone.device.type == "cuda" and cuda_graphs != "off":
        with torch.inference_mode():
            use_graphs(blocks, CudaRecorder(backbone.device))
        if cuda_graphs == "on" and blocks.without_graphs is not None:
            raise BackboneError(f"no CUDA graphs here: {blocks.without_graphs}", hint="--cuda-graphs auto")
    return blocks


def _pick(backbone: Backbone, runner: str, cuda_graphs: str) -> Blocks:
    if backbone.device.type == "cuda" and runner in ("auto", "native"):
        return _on_gpu(backbone, runner, cuda_graphs)
    compiled = compiled_blocks(backbone) if runner in ("auto", "native") else None
    if compiled is not None or runner == "native":
        return compiled or NativeBlocks(backbone)  # which says why there is none
    is_fused = runner == "fused" or (runner == "auto" and backbone.has_llama_shape)
    return FusedBlocks(backbone) if is_fused else HFBlocks(backbone)


def _on_gpu(backbone: Backbone, runner: str, cuda_graphs: str) -> Blocks:
    """Our kernels; where they cannot be had or are found wrong on this card, PyTorch's, which say why."""
    try:
        ours = CudaBlocks(backbone, is_recorded=cuda_graphs != "off")
        with torch.inference_mode():
            wrong = ours.check()
        if wrong is None:
            return ours
    except (UnsupportedBackboneError, RuntimeError) as error:
        if runner == "native":
            raise
        wrong = str(error)
    if runner == "native":
        raise UnsupportedBackboneError(f"{backbone.name}: {wrong}", hint="--runner auto")
    blocks = FusedBlocks(backbone) if backbone.has_llama_shape else HFBlocks(backbone)
    blocks.without_kernels = wrong
    return blocks


def use_graphs(blocks: FusedBlocks, record: Recorder) -> None:
    """Record passes from now on, if replaying them gives the bits of running them; else `without_graphs` says why not.

    Checked at every invariant width: all blocks and the finish, at positions and on rows other than those recorded, and
    what is left in the KV buffers.
    """
    if blocks.backbone.quantization == "8bit":
        blocks.without_graphs = "8-bit products choose their path by the data, which cannot be recorded"
        return
    blocks.graphs = Graphs(record)
    differing = [width for width in blocks.widths if not _replays_exactly(blocks, width)]
    blocks.without_graphs = blocks.graphs.failure
    if differing and blocks.without_graphs is None:
        blocks.without_graphs = f"a replayed pass of width {differing[0]} gives other bits than the pass itself"
    if blocks.without_graphs is not None:
        blocks.graphs = None


def _replays_exactly(blocks: FusedBlocks, width: int) -> bool:
    depth = blocks.num_blocks
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(blocks.backbone.vocab_size, (4, width), generator=generator).to(blocks.backbone.device)
    recorded, plain = blocks.new_cache(KEY_STEP), blocks.new_cache(KEY_STEP)  # while one is held, the other is plain
    for tokens, position in zip(ids, (0, width, 3 * width, 2 * width), strict=True):
        hidden = blocks.embed(tokens)
        ours, theirs = (blocks.run(hidden, cache, position, 0, depth) for cache in (recorded, plain))
        if not torch.equal(ours, theirs) or not all(map(torch.equal, blocks.finish(ours), Blocks.finish(blocks, ours))):
            return False
    return all(map(torch.equal, recorded.keys + recorded.values, plain.keys + plain.values))


def device_identity(blocks: Blocks) -> dict[str, Any]:
    """All that a measurement of a runner may depend on: model, device, threads, versions."""
    backbone = blocks.backbone
    return {
        "fingerprint": backbone.fingerprint,
        "device": backbone.device_name,
        "dtype": str(backbone.dtype),
        "runner": blocks.name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def measurement_path(kind: str, identity: dict[str, Any]) -> Path:
    """Where a measurement is kept: made once for an identity, in the user's cache folder."""
    return user_cache_dir() / kind / f"{sha256_of(json.dumps(identity, sort_keys=True))[:24]}.json"


def measure_widths(blocks: Blocks) -> None:
    """Find the widths at which a token's bits depend on nothing but the tokens before it, and set them on `blocks`.

    Candidates are those of `fused_widths`. The same tokens are run at the largest one, then at every other one in
    windows that put each token into other rows with other neighbours: all blocks and the LM head, compared bit for bit;
    and one block over random keys, at many lengths and positions. Where even the largest width disagrees with itself in
    other rows, it is the only one used and `is_invariant` is false: nothing is promised there.
    """
    *others, largest = fused_widths(blocks, blocks.candidate_widths)
    probe = _Probe(blocks, largest)
    blocks.is_invariant = probe.agrees(largest)
    found = [width for width in others if probe.agrees(width)] if blocks.is_invariant else []
    blocks.widths = (*found, largest)
    blocks.any_length = blocks.is_invariant and probe.same_at_every_length(blocks.widths)
    head = blocks.backbone.lm_head
    if not isinstance(blocks, NativeBlocks) and head.bias is None and usable(head.weight):
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
        self.length = -(-2 * LARGEST_WIDTH // largest) * largest
        backbone = blocks.backbone
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(backbone.device, backbone.dtype)

        self.ids = torch.randint(backbone.vocab_size, (self.length,), generator=generator).to(backbone.device)
        self.hidden = random(largest, backbone.hidden_size)
        self.far_keys = random(blocks.kv_heads, self.far[-1][0], blocks.head_dim)
        self.far_values = random(blocks.kv_heads, self.far[-1][0], blocks.head_dim)
        self.reference = self._outputs(largest, 0, None)
        self.far_reference = self._far(largest, 0)

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
            cache = self._far_cache(capacity)
            if offset:  # the rows before are there already
                self.blocks.run(self.hidden, cache, position, 0, 1)
            results.append(self.blocks.run(self.hidden[offset : offset + width], cache, position + offset, 0, 1))
        return results

    def _far_cache(self, limit: int, end: int | None = None) -> KVCache:
        """The random keys and values in block 0 of a cache for `limit` tokens; its buffers just hold `end`."""
        cache = self.blocks.new_cache(limit)
        capacity = limit if end is None else -(-end // KEY_STEP) * KEY_STEP
        cache.keys = [self.far_keys[:, :capacity].clone()]
        cache.values = [self.far_values[:, :capacity].clone()]
        return cache

    def agrees(self, width: int) -> bool:
        """Whether this width gives the reference's bits, in windows shifted against it."""
        states, logits, _ = self._outputs(width, self.offset, self._outputs(self.largest, 0, None)[2])
        end = self.offset + states.shape[0]
        return (
            torch.equal(states, self.reference[0][self.offset : end])
            and torch.equal(logits, self.reference[1][self.offset : end])
            and self._far_agrees(width, 0)
            and (width == self.largest or self._far_agrees(width, min(self.offset, self.largest - width)))
        )

    def same_at_every_length(self, widths: tuple[int, ...]) -> bool:
        """Whether block 0 over random keys gives the same bits however large the buffer is."""
        limit = self.far[-1][0]
        for end in range(61, limit, 131):
            whole, tight = self._far_cache(limit), self._far_cache(limit, end)
            for width in widths:
                hidden, position = self.hidden[:width], end - width
                if not torch.equal(*(self.blocks.run(hidden, cache, position, 0, 1) for cache in (whole, tight))):
                    return False
        return True

    def _far_agrees(self, width: int, offset: int) -> bool:
        pairs = zip(self._far(width, offset), self.far_reference, strict=True)
        return all(torch.equal(rows, whole[offset : offset + width]) for rows, whole in pairs)
