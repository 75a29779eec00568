"""Checkpoints whose numbers take a byte or less, as they are downloaded: read into bfloat16, with what they mean."""

import json

import pytest
import torch
from drafters import PROMPT, tokens_of
from safetensors.torch import load_file, save_file

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.runtime.hf_blocks import HFBlocks

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1 = torch.cat((E2M1, -E2M1))
BLOCK = 32


def in_mxfp4(weight, generator):
    """A weight [experts, in, out] as (blocks, scales) of numbers like it, and what they mean, [experts, in, out]."""
    experts, inner, outer = weight.shape
    codes = torch.randint(16, (experts, outer, inner // BLOCK, BLOCK), generator=generator)
    exponents = torch.randint(124, 126, (experts, outer, inner // BLOCK), generator=generator)  # biased by 127
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    meant = E2M1[codes] * torch.exp2(exponents - 127.0)[..., None]
    return blocks, exponents.to(torch.uint8), meant.flatten(2).transpose(1, 2)


def in_fp8(weight):
    """A weight [out, in] of one block of DeepSeek's FP8, as (numbers, their factor [1, 1]), and what they mean."""
    factor = weight.abs().max() / 448
    numbers = (weight / factor).to(torch.float8_e4m3fn)
    return numbers, factor[None, None].float(), (numbers.float() * factor).to(torch.bfloat16)


def write(folder, tensors, like, **settings):
    """A checkpoint of these tensors with the other files of `like`, and more in its config.json."""
    folder.mkdir()
    for file in like.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    found = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(found))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(("family", "method"), [("gpt_oss", MXFP4), ("qwen3", FP8)], ids=["mxfp4", "fp8"])
def test_it_decodes_as_the_same_numbers_in_a_plain_checkpoint(tmp_path, tiny_folder, family, method):
    """Written tensor by tensor: gpt-oss with its experts in MXFP4, Qwen3 in DeepSeek's FP8."""
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(tiny_folder(family) / "model.safetensors")
    meant = dict(tensors)
    for name in tensors.copy():
        if family == "gpt_oss" and name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales, meant[name] = in_mxfp4(tensors.pop(name), generator)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        elif family == "qwen3" and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"], meant[name] = in_fp8(tensors[name])
    write(tmp_path / "saved", tensors, tiny_folder(family), quantization_config=method)
    write(tmp_path / "plain", meant, tiny_folder(family))
    saved = load_backbone(BackboneConfig(model_name=str(tmp_path / "saved"), device="cpu"))
    plain = load_backbone(BackboneConfig(model_name=str(tmp_path / "plain"), device="cpu", quantization="none"))
    plain.model.to(torch.bfloat16)
    assert saved.quantization == method["quant_method"]
    theirs = dict(plain.model.named_parameters())
    for name, parameter in saved.model.named_parameters():
        assert torch.equal(parameter, theirs.pop(name)), name
    assert not theirs
    texts = [
        tokens_of(decode(Engine(model, HFBlocks(model)), Request(PROMPT, 12), NoDrafter())) for model in (saved, plain)
    ]
    assert texts[0] == texts[1]
    assert len({*texts[0]}) > 3
