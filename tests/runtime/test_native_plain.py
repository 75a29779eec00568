"""Compiled passes over weights in bfloat16 and in 8 bit, read where the library's modules keep them."""

import copy

import pytest
import torch
from runs import almost_known, answer, distance, ids_of, run_in_passes, same
from tiny_models import byte_tokenizer, family_config
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.engine import Engine
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.files.instruction_sets import SETS
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.native_blocks import NativeBlocks, why_not_native
from early_exit_cli.runtime.nf4_linear import is_int8
from early_exit_cli.runtime.select import make_blocks

KINDS = ("none", "8bit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """dtype -> a random model saved in it, of sizes that the tiles fit, with biases."""
    made = {}

    def save(dtype=torch.bfloat16):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("plain")
            config = family_config("qwen2")
            config.hidden_size, config.intermediate_size, config.head_dim = 128, 192, 64
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config).to(dtype)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(made[dtype])
            byte_tokenizer().save_pretrained(made[dtype])
        return str(made[dtype])

    return save


@pytest.fixture(scope="module")
def loaded(folder):
    """quantization -> the backbone, loaded once."""
    made = {}

    def load(kind):
        if kind not in made:
            made[kind] = load_backbone(BackboneConfig(model_name=folder(), quantization=kind, device="cpu"))
        reason = why_not_native(made[kind])
        if reason is not None:
            pytest.skip(reason)
        return made[kind]

    return load


def weight_of(module):
    """[out, in] float32"""
    if not is_int8(module):
        return module.weight.float()
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return module.weight.data.float() * scale.flatten()[:, None] / 127


@pytest.fixture(params=["", "avx2"])
def instructions(request, monkeypatch):
    if request.param:
        missing = next(known for known in SETS if known.name == request.param).missing()
        if missing is not None:
            pytest.skip(missing)
        monkeypatch.setenv("EEXIT_ISA", request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_are_near_float32_arithmetic_and_of_the_same_bits_however_cut(loaded, instructions, kind):
    backbone = loaded(kind)
    config = copy.deepcopy(backbone.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    exact = AutoModelForCausalLM.from_config(config).float().eval()
    modules = dict(backbone.model.named_modules())
    names = exact.state_dict()
    exact.load_state_dict(
        {name: weight_of(modules[name.removesuffix(".weight")]) for name in names if "bias" not in name}
        | {name: modules[name.removesuffix(".bias")].bias.float() for name in names if "bias" in name}
    )
    ids = ids_of(128, 4)
    blocks = make_blocks(backbone)
    assert type(blocks) is NativeBlocks
    with torch.inference_mode():
        states = run_in_passes(blocks, ids, [128])
        wanted, fused = exact(ids[None]).logits[0], FusedBlocks(backbone)
        ours, pytorchs = (
            distance(kind.logits(kind.final_norm(rows)), wanted)
            for kind, rows in ((blocks, states), (fused, run_in_passes(fused, ids, [128])))
        )
        assert 0 < ours < 1.2 * pytorchs
        for widths in ([1] * 128, [2, 3, 5, 7, 11, 13, 17, 19, 23, 28], [16] * 8, [64, 9, 8, 47]):
            assert torch.equal(run_in_passes(blocks, ids, widths, 192, (2,)), states), widths


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_change_neither_tokens_nor_bits(loaded, kind):
    model = Engine(loaded(kind), NativeBlocks(loaded(kind)))
    plain = answer(model)
    drafted = answer(model, almost_known(plain.token_ids))
    assert same(plain, drafted)
    assert len(drafted.rounds) < len(plain.rounds)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_librarys_own_and_it_keeps_its_bits(folder, kind):
    backbone = load_backbone(BackboneConfig(model_name=folder(), quantization=kind, device="cpu"))
    ids = ids_of(40)[None]
    with torch.inference_mode():
        before = backbone.model(ids).logits
        blocks = NativeBlocks(backbone)
        assert torch.equal(backbone.model(ids).logits, before)
    mlp = backbone.blocks[2].mlp
    assert blocks.model.blocks[2].down.weight == mlp.down_proj.weight.data_ptr()
    assert blocks.model.blocks[2].gate_up.weight == mlp.gate_proj.weight.data_ptr()
    if kind == "8bit":
        assert mlp.up_proj.state.CB.data_ptr() == mlp.up_proj.weight.data_ptr()


def test_a_plain_checkpoint_computes_in_bfloat16_where_passes_are_compiled(folder, loaded, monkeypatch):
    """And in float32 where it was saved so, where another runner is asked for, and without a compiler."""
    assert loaded("none").dtype == torch.bfloat16
    plain = dict(quantization="none", device="cpu")
    for config in (
        BackboneConfig(model_name=folder(torch.float32), **plain),
        BackboneConfig(model_name=folder(), runner="fused", **plain),
    ):
        backbone = load_backbone(config)
        assert backbone.dtype == torch.float32
        assert "or in bfloat16" in why_not_native(backbone)
        assert type(make_blocks(backbone, config.runner)) is FusedBlocks
    with pytest.raises(UnsupportedBackboneError, match="no compiled passes here"):
        make_blocks(backbone, "native")
    monkeypatch.setattr("early_exit_cli.backbone.quantization.find_compiler", lambda: None)
    assert load_backbone(BackboneConfig(model_name=folder(), **plain)).dtype == torch.float32
