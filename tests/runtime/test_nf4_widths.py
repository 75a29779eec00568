"""Widths that bitsandbytes multiplies without unpacking the weights, asked of its own dispatch."""

import ast
import functools
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.runtime import invariant_widths, nf4_widths
from early_exit_cli.runtime.blocks import Blocks
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.invariant_widths import measure_widths
from early_exit_cli.runtime.nf4_widths import fused_widths, nf4_products
from early_exit_cli.runtime.select import make_blocks

LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
SMOLLM2 = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
H100, A100, RTX4090, A10 = (132, 9, 0), (108, 8, 0), (128, 8, 9), (72, 8, 6)


def dispatch_of(card):
    """The installed bitsandbytes' own choice for a card that is not here: its function, from its source."""
    source = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    wanted = ("_gemm_4bit_use_custom_cuda", "_GEMM_4BIT_CUSTOM_FLOOR_M")
    parts = []
    for node in ast.parse(source.read_text()).body:
        names = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if set(names) & set(wanted):
            parts.append(node)
    assert len(parts) == len(wanted)
    assert "_gemm_4bit_use_custom_fn(A.device.index, A.dtype, M, N, K)" in source.read_text()
    space = {"functools": functools, "torch": torch, "_gpu_dispatch_props": lambda _: card}
    exec(compile(ast.Module(parts, []), str(source), "exec"), space)
    return space["_gemm_4bit_use_custom_cuda"]


@pytest.mark.parametrize(
    ("products", "card", "largest"),
    [(LLAMA_8B, H100, 5), (LLAMA_8B, A100, 5), (LLAMA_8B, RTX4090, 8), (LLAMA_8B, A10, 16), (SMOLLM2, H100, 16)],
)
def test_widths_on_a_gpu_are_those_that_every_product_takes_fused(monkeypatch, products, card, largest):
    """Asked from the installed release; what it says of these cards today is what its authors measured on them."""
    monkeypatch.setattr(nf4_widths, "_dispatch", lambda: dispatch_of(card))
    monkeypatch.setattr(nf4_widths, "nf4_products", lambda _: {(*shape, torch.bfloat16) for shape in products})
    blocks = SimpleNamespace(backbone=SimpleNamespace(device=torch.device("cuda", 0)))
    widths = fused_widths(blocks, Blocks.candidate_widths)
    assert widths[-1] == largest
    assert widths == tuple(width for width in Blocks.candidate_widths if width <= largest)


def test_all_widths_are_candidates_where_there_is_nothing_to_ask(tiny_backbone, monkeypatch):
    assert fused_widths(FusedBlocks(tiny_backbone("llama")), Blocks.candidate_widths) == Blocks.candidate_widths
    monkeypatch.setattr(nf4_widths, "_dispatch", lambda: None)
    blocks = SimpleNamespace(backbone=SimpleNamespace(device=torch.device("cuda", 0)))
    assert fused_widths(blocks, Blocks.candidate_widths) == Blocks.candidate_widths


def test_the_products_asked_about_are_those_that_a_block_makes(tiny_folder):
    """NF4 in bitsandbytes' own layout, as on a GPU: merged by our runner, one by one by the library's."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    backbone = load_backbone(BackboneConfig(model_name=str(tiny_folder("llama")), quantization="none", device="cpu"))
    for part in (backbone.blocks[0].self_attn, backbone.blocks[0].mlp):
        for name, module in list(part.named_children()):
            if isinstance(module, torch.nn.Linear):
                packed = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
                packed.weight = Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
                setattr(part, name, packed.to("cpu").train())  # in training mode it is never packed for a CPU
    assert {shape[:2] for shape in nf4_products(HFBlocks(backbone))} == {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert nf4_products(FusedBlocks(backbone)) == {
        (rows, inner, torch.float32) for rows, inner in ((128, 64), (64, 64), (256, 64), (64, 128))
    }


def test_the_measurement_compares_with_the_widest_fused_width(tiny_backbone, monkeypatch):
    monkeypatch.setattr(invariant_widths, "fused_widths", lambda _blocks, _candidates: (1, 4, 8))
    blocks = FusedBlocks(tiny_backbone("llama"))
    with torch.inference_mode():
        measure_widths(blocks)
    assert blocks.is_invariant
    assert blocks.widths[-1] == 8
    assert set(blocks.widths) <= {1, 4, 8}


@pytest.mark.gpu
def test_widths_on_this_gpu_are_those_of_the_fused_kernels():
    blocks = make_blocks(load_backbone(BackboneConfig(device="cuda")), "fused", "off")  # a replay asks for no products
    assert set(blocks.widths) <= set(fused_widths(blocks, Blocks.candidate_widths))
    assert {(rows, inner) for rows, inner, _ in nf4_products(blocks)} == set(SMOLLM2)
