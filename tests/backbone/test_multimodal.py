"""Text out of multimodal checkpoints: their language part alone, with the tokens that the whole gives for text."""

import json
import struct
from pathlib import Path

import pytest
import torch
import transformers
from drafters import PROMPT, ScriptedDrafter, tokens_of
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, family_config
from transformers import AutoModelForImageTextToText

from early_exit_cli.backbone.families import WRAPPERS
from early_exit_cli.backbone.load import adopt_backbone, load_backbone
from early_exit_cli.backbone.multimodal import language_part
from early_exit_cli.config import BackboneConfig
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError
from early_exit_cli.runtime.select import make_blocks

TOWER = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
)
CLIP = dict(TOWER, model_type="clip_vision_model")
SIGLIP = dict(TOWER, model_type="siglip_vision_model")
QWEN_TOWER = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=4)
GEMMA4_TOWER = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16)  # fmt: skip


def text(family, **changes):
    return family_config(family).to_dict() | changes


def qwen_text(family, sections):
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return text(family, rope_parameters=rotary, model_type=None)


WHOLES = {
    "gemma3": lambda: dict(text_config=text("gemma3"), vision_config=SIGLIP, mm_tokens_per_image=4),
    "gemma4": lambda: dict(text_config=text("gemma4-inputs"), vision_config=GEMMA4_TOWER, audio_config=None),
    "gemma4_unified": lambda: dict(
        text_config=text("gemma4_unified"),
        vision_config=dict(mm_embed_dim=64, mm_posemb_size=16, output_proj_dims=64),
        audio_config=None,
    ),
    "llama4": lambda: dict(
        text_config=text("llama4"),
        vision_config=dict(
            TOWER, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32, pixel_shuffle_ratio=0.5
        ),
    ),
    "mistral3": lambda: dict(
        text_config=text("ministral3"), vision_config=dict(TOWER, head_dim=16, model_type="pixtral")
    ),
    "qwen2_vl": lambda: dict(
        text_config=qwen_text("qwen2", [2, 3, 3]),
        vision_config=dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64),
    ),
    "qwen2_5_vl": lambda: dict(text_config=qwen_text("qwen2", [2, 3, 3]), vision_config=QWEN_TOWER),
    "qwen3_vl": lambda: dict(
        text_config=qwen_text("qwen3", [6, 5, 5]),
        vision_config=dict(QWEN_TOWER, deepstack_visual_indexes=[0], num_position_embeddings=16),
    ),
    "qwen3_5": lambda: dict(text_config=text("qwen3_5"), vision_config=dict(QWEN_TOWER, num_position_embeddings=16)),
    "qwen3_5_moe": lambda: dict(
        text_config=text("qwen3_5_moe"), vision_config=dict(QWEN_TOWER, num_position_embeddings=16)
    ),
    "internvl": lambda: dict(
        text_config=text("qwen3"), vision_config=dict(TOWER, image_size=[16, 16], patch_size=[8, 8])
    ),
    "smolvlm": lambda: dict(text_config=text("llama"), vision_config=TOWER, scale_factor=2),
    "idefics3": lambda: dict(text_config=text("llama"), vision_config=TOWER, scale_factor=2),
    "llava": lambda: dict(text_config=text("mistral-window"), vision_config=CLIP),
    "llava_next": lambda: dict(text_config=text("llama"), vision_config=CLIP),
    "llava_onevision": lambda: dict(text_config=text("qwen2"), vision_config=SIGLIP),
    "aya_vision": lambda: dict(text_config=text("cohere2", logit_scale=1.0), vision_config=SIGLIP),
    "cohere2_vision": lambda: dict(text_config=text("cohere2", logit_scale=1.0), vision_config=SIGLIP),
}
"""Tiny ones, by their `model_type`: a decoder of `tiny_models.py` behind a tower of one layer."""
DECODED = ("gemma3", "gemma4", "mistral3", "qwen3_vl", "qwen3_5", "smolvlm")
"""Of which the tokens are compared too; of the others the logits, and their decoders are decoded in `test_families.py`."""


def whole_model(kind):
    torch.manual_seed(5)
    settings = WHOLES[kind]()
    settings["text_config"] = {key: value for key, value in settings["text_config"].items() if value is not None}
    config = transformers.CONFIG_MAPPING[kind](**settings, tie_word_embeddings=False)
    return AutoModelForImageTextToText.from_config(config).eval()


def spoil_towers(folder: Path) -> tuple[int, int]:
    """Overwrite the numbers of every tensor that is not the language part's, in place; how many were, and were not."""
    spoiled = kept = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                if any(word in name for word in ("language_model", "text_model", "lm_head")) or name.startswith(
                    ("model.layers", "model.embed_tokens", "model.norm")
                ):
                    kept += 1
                    continue
                start, end = tensor["data_offsets"]
                file.seek(8 + length + start)
                file.write(b"\xff" * (end - start))  # NaN, in any of the formats
                spoiled += 1
    return spoiled, kept


def test_the_table_of_wrappers_is_tested_whole():
    assert set(WHOLES) == set(WRAPPERS)


@pytest.mark.parametrize("kind", WHOLES)
def test_the_language_part_computes_what_the_whole_does(tmp_path, kind):
    """Several files, every number of the towers spoiled, in either of the two layouts of names."""
    whole = whole_model(kind)
    ids = torch.tensor([PROMPT])
    asked = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        speaks = whole.language_model if kind == "llama4" else whole  # which, as a whole, fails without an image
        logits = speaks(**asked).logits
    is_first_layout = len(kind) % 2 == 0
    whole.save_pretrained(tmp_path, max_shard_size="150KB", save_original_format=is_first_layout)
    byte_tokenizer().save_pretrained(tmp_path)
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    spoiled, kept = spoil_towers(tmp_path)
    assert spoiled > 3, spoiled
    assert kept > 20
    backbone = load_backbone(BackboneConfig(model_name=str(tmp_path), quantization="none", device="cpu"))
    assert backbone.config.model_type == language_part(whole.config).model_type == backbone.fingerprint["model_type"]
    assert sum(parameter.numel() for parameter in backbone.model.parameters()) < sum(
        parameter.numel() for parameter in whole.parameters()
    )
    with torch.no_grad():
        assert torch.allclose(backbone.model(**asked).logits, logits, atol=1e-5)
    if kind not in DECODED:
        return
    expected = whole.generate(**asked, max_new_tokens=24, do_sample=False)[0, len(PROMPT) :].tolist()
    model = Engine(backbone, make_blocks(backbone))
    assert tokens_of(decode(model, Request(PROMPT, 24), NoDrafter())) == expected
    run = generate(
        model, Request(PROMPT, 24), ScriptedDrafter(expected, lambda index: index % 5 == 3, PROMPT), mode="x", width=8
    )
    assert run.token_ids == expected
    assert run.stats.tokens_accepted > 5


def test_a_whole_in_4_bit_is_kept_and_read_again(tmp_path, monkeypatch):
    """The kept copy holds the language part alone, under the names of the checkpoint."""
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path / "home"))
    whole_model("gemma3").save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    settings = BackboneConfig(model_name=str(tmp_path / "whole"), device="cpu")
    first, second = load_backbone(settings), load_backbone(settings)
    (copy,) = (path for path in (tmp_path / "home" / "weights").iterdir() if path.is_dir())
    held = {name for path in copy.glob("*.safetensors") for name in load_file(path)}
    assert not any("vision" in name or "projector" in name for name in held)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        assert torch.equal(first.model(input_ids=ids).logits, second.model(input_ids=ids).logits)
    assert first.fingerprint == second.fingerprint
    text_alone = tmp_path / "text"
    load_backbone(
        BackboneConfig(model_name=str(tmp_path / "whole"), quantization="none", device="cpu")
    ).model.save_pretrained(text_alone, save_original_format=False)
    byte_tokenizer().save_pretrained(text_alone)
    alone = load_backbone(BackboneConfig(model_name=str(text_alone), device="cpu"))
    assert alone.fingerprint == first.fingerprint  # heads of the one are heads of the other


def test_modules_that_a_saved_whole_left_plain_are_named_in_the_part():
    config = transformers.Gemma3Config(text_config=text("gemma3"), vision_config=SIGLIP)
    named = ["lm_head", "multi_modal_projector", "model.language_model.layers.1.mlp", "language_model.model.layers.2"]
    config.quantization_config = {"load_in_4bit": True, "llm_int8_skip_modules": named}
    part = language_part(config)
    assert part.quantization_config["llm_int8_skip_modules"] == [
        "lm_head", "multi_modal_projector", "model.layers.1.mlp", "model.layers.2"
    ]  # fmt: skip
    assert config.quantization_config["llm_int8_skip_modules"] == named


PARTS_TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{% for part in turn.content %}{% if part.type == 'image' %}[image]"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}<assistant>"
)


def test_a_template_that_lies_beside_and_reads_parts_is_used(tmp_path):
    """As processors kept it: beside the tokenizer, and with texts as parts among images."""
    whole_model("smolvlm").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PARTS_TEMPLATE}))
    backbone = load_backbone(BackboneConfig(model_name=str(tmp_path), quantization="none", device="cpu"))
    expected = backbone.tokenizer("<user>hello<assistant>")["input_ids"]
    assert backbone.encode_prompt("hello") == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert backbone.encode_prompt(parts) == expected
    with pytest.raises(BackboneError, match="type 'image', and only text is read"):
        backbone.encode_prompt([{"role": "user", "content": [{"type": "image", "url": "x"}, *parts[0]["content"]]}])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: transformers.PaliGemmaConfig(), "'paligemma' .its language part is 'gemma'"),
        (
            lambda: transformers.Gemma3Config(text_config=text("gemma3", use_bidirectional_attention=True)),
            "multimodal .gemma3., and its language part attends to later tokens",
        ),
    ],
    ids=["paligemma", "gemma3-bidirectional"],
)
def test_a_whole_that_does_not_run_is_refused_by_the_name_of_its_part(tmp_path, config, reason):
    settings = config()
    (tmp_path / "config.json").write_text(json.dumps(settings.to_dict() | {"model_type": settings.model_type}))
    with pytest.raises(UnsupportedBackboneError, match=reason):
        load_backbone(BackboneConfig(model_name=str(tmp_path), device="cpu"))


def test_a_whole_that_somebody_loaded_says_how_its_part_is_had():
    with pytest.raises(UnsupportedBackboneError, match="named by its folder or Hub id, its language part is loaded"):
        adopt_backbone(whole_model("smolvlm"), byte_tokenizer())
