"""Compiled passes over every layout of a block: near the library's own arithmetic, bits that no pass changes, a way back."""

from dataclasses import MISSING, fields

import pytest
import torch
from runs import distance, ids_of, run_in_passes
from tiny_models import byte_tokenizer, family_config
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone.block_layout import BlockLayout
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.runtime.native_blocks import GELU, SILU, NativeBlocks
from early_exit_cli.runtime.native_code import why_no_native_code

TEXT = 72
"""Tokens of the text, longer than the windows of the tiny models."""
LONG = dict(sliding_window=512)
CASES = {
    "llama": {},
    "gemma": {},  # GELU, norms that add one and round once, a scaled embedding
    "gemma2": dict(query_pre_attn_scalar=100),  # norms behind sublayers, capped scores, a scale that is not head_dim's
    "gemma2 with a window longer than the text": LONG,
    "gemma3": dict(head_dim=256),  # norms of each head alone, two rotary tables
    "olmo2": {},  # norms over all heads, none in front
    "olmo3": {},
    "olmo3 with a window longer than the text": LONG,
    "exaone4": {},  # blocks without window are not rotated
    "exaone4 without windows": dict(sliding_window=None, layer_types=["full_attention"] * 6),
    "ministral": dict(head_dim=128),
    "seed_oss": dict(attention_bias=True, attention_out_bias=True),
    "granite": {},  # multipliers
    "smollm3": {},  # every fourth block is not rotated
    "smollm3-window": {},
    "phi3": {},  # merged projections, half of a head rotated
    "phi3-window": {},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """case -> its backbone in bfloat16, and the library's logits [TEXT, vocab] in float32."""
    found = {}

    def make(case):
        if case not in found:
            config = family_config(case.split()[0])
            config.hidden_size, config.intermediate_size, config.head_dim = 128, 192, 64
            config.initializer_range = 0.1  # attention that is neither even nor a choice of one key
            for name, value in CASES[case].items():
                setattr(config, name, value)
            torch.manual_seed(1)
            exact = AutoModelForCausalLM.from_config(config).eval()
            for parameter in exact.parameters():
                if parameter.ndim == 1:  # norms and biases
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
                parameter.data.copy_(parameter.to(torch.bfloat16))
            with torch.inference_mode():
                wanted = exact(ids_of(TEXT, 3)[None]).logits[0]
            folder = tmp_path_factory.mktemp("layout")
            exact.to(torch.bfloat16).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            backbone = load_backbone(BackboneConfig(model_name=str(folder), quantization="none", device="cpu"))
            found[case] = backbone, wanted
        return found[case]

    reason = why_no_native_code()
    if reason is not None:
        pytest.skip(reason)
    return make


@pytest.mark.parametrize("case", CASES)
def test_every_layout_is_near_the_library_and_keeps_its_bits(made, case):
    backbone, wanted = made(case)
    blocks, ids = NativeBlocks(backbone), ids_of(TEXT, 3)
    with torch.inference_mode():
        states = run_in_passes(blocks, ids, [TEXT])
        ours = distance(blocks.logits(blocks.final_norm(states)), wanted)
        theirs = distance(backbone.model(ids[None]).logits[0], wanted)
        assert 0 < ours < 1.25 * theirs
        assert torch.equal(run_in_passes(blocks, ids, [1] * TEXT, 128), states)
        assert torch.equal(run_in_passes(blocks, ids, [20, 3, 33, 16], 192, (2, 5)), states)
        cache, kept = blocks.new_cache(128), []
        for start, end in ((0, 20), (20, 23), (23, TEXT)):  # a draft behind each of them is taken back
            kept += blocks.run_tokens(ids[start:end].tolist(), cache, start, [blocks.num_blocks])
            blocks.run_tokens(ids_of(8, end).tolist(), cache, end, [blocks.num_blocks])
        assert torch.equal(torch.cat(kept), states)


def test_everything_that_a_layout_describes_departs_from_llama_in_some_case(made):
    """A new switch of the description needs a case here."""
    layouts = [made(case)[0].block_layout for case in CASES]
    defaults = {field.name: field.default for field in fields(BlockLayout) if field.default is not MISSING}
    assert defaults
    for name, default in defaults.items():
        assert any(getattr(layout, name) != default for layout in layouts), name
    assert {layout.activation for layout in layouts} == {SILU, GELU}
    assert {layout.head_dim for layout in layouts} == {64, 128, 256}
    assert any(layout.rotary_dim < layout.head_dim for layout in layouts)
    assert any(layout.scale != layout.head_dim**-0.5 for layout in layouts)
