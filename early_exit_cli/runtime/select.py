"""Choosing a block runner, and what is true of it on this device: its invariant widths, checked and not assumed."""

from __future__ import annotations

import torch

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.errors import BackboneError, BundleError, UnsupportedBackboneError
from early_exit_cli.files.atomic import keep_json
from early_exit_cli.files.kept import MADE_FROM
from early_exit_cli.files.schemas import WidthsForm, read_form
from early_exit_cli.runtime.blocks import KEY_STEP, Blocks
from early_exit_cli.runtime.cuda_blocks import CudaBlocks
from early_exit_cli.runtime.cuda_graphs import CudaRecorder, Graphs, Recorder
from early_exit_cli.runtime.exact_argmax import ExactArgmax
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.invariant_widths import measure_widths
from early_exit_cli.runtime.measurements import device_identity, measurement_path
from early_exit_cli.runtime.native_blocks import NativeBlocks, compiled_blocks
from early_exit_cli.runtime.native_code import why_no_native_code
from early_exit_cli.steps import step


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
        if not {*found.widths, *found.argmax_widths} <= {*blocks.candidate_widths}:
            raise BundleError(f"{path} holds widths that nobody measures")
        blocks.widths, blocks.argmax_widths = tuple(found.widths), tuple(found.argmax_widths)
        blocks.is_invariant, blocks.any_length = found.is_invariant, found.any_length
    except BundleError:
        with torch.inference_mode(), step("measuring once which passes are exact on this device"):
            measure_widths(blocks)
        measured = {
            "widths": list(blocks.widths),
            "is_invariant": blocks.is_invariant,
            "any_length": blocks.any_length,
            "argmax_widths": list(blocks.argmax_widths),
        }
        keep_json(path, {MADE_FROM: backbone.name, **measured, **identity})
    if blocks.argmax_widths:
        blocks.exact_argmax = ExactArgmax(backbone.lm_head.weight)
    if isinstance(blocks, CudaBlocks):
        with step("recording passes"):
            blocks.prepare()
    elif isinstance(blocks, FusedBlocks) and backbone.device.type == "cuda" and cuda_graphs != "off":
        with torch.inference_mode(), step("recording passes"):
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
    is_fused = runner == "fused" or (runner == "auto" and backbone.without_layout is None)
    blocks = FusedBlocks(backbone) if is_fused else HFBlocks(backbone)
    if runner == "auto" and is_fused and backbone.device.type == "cpu" and backbone.dtype == torch.bfloat16:
        blocks.without_kernels = why_no_native_code()
    return blocks


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
    blocks = FusedBlocks(backbone) if backbone.without_layout is None else HFBlocks(backbone)
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
