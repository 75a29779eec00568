"""Families beyond the Llama shape: what stands around their blocks, decoding token for token, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from commands import output_of
from drafters import PROMPT, ScriptedDrafter, thresholds_between, tokens_of
from families_page import shapes_of, tables, with_tables
from tiny_models import MORE_FAMILIES, NEAR_LLAMA, NF4_FAMILIES, OTHER_FAMILIES, byte_tokenizer, family_config
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTBigCodeConfig,
    GraniteMoeHybridConfig,
    OPTConfig,
)

from early_exit_cli.backbone.families import FAMILIES as SUPPORTED
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.backbone.output import LogitMap, logits_of
from early_exit_cli.config import BackboneConfig
from early_exit_cli.data.answers import answerer
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import BackboneError, ConfigError, UnsupportedBackboneError
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.hidden_states.cache import Cache
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.select import make_blocks

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
WINDOW = 24
LONG_PROMPT = [(7 * i * i + 3 * i) % 251 for i in range(3 * WINDOW)]


def test_the_documented_tables_are_the_codes():
    page = DOCS.read_text()
    assert with_tables(page) == page, "make docs"
    assert all(table in page for table in tables().values())
    assert all(shapes_of(name) for name in SUPPORTED)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_decoding_equals_transformers_generate(tiny_model, family):
    """Plain, by exits, by lookup and by a drafter that is partly wrong; prompt and answer beyond every window."""
    prompts = [LONG_PROMPT] if family in MORE_FAMILIES else [PROMPT, LONG_PROMPT]
    model = tiny_model(family, "fused" if family in NEAR_LLAMA else "hf")
    assert model.blocks.is_invariant
    accepted = {"exits": 0, "lookup": 0, "scripted": 0}
    partly = dict(accepted)
    distinct = set()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        expected = model.backbone.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False
        )[0, len(prompt) :].tolist()
        distinct |= set(expected)
        assert tokens_of(decode(model, Request(prompt, 40), NoDrafter())) == expected
        drafters = [
            ("exits", ExitDrafter(thresholds_between(model, 0.5)), 8),
            ("exits", ExitDrafter([1e9] * 3), 4),
            ("lookup", LookupDrafter(lambda rows: 1.0, [0.99] * 6), 16),
            ("scripted", ScriptedDrafter(expected, lambda index: index % 5 == 3, prompt), 8),
        ]
        for kind, drafter, width in drafters:
            run = generate(model, Request(prompt, 40), drafter, mode=kind, width=width)
            assert run.token_ids == expected, (kind, len(prompt))
            accepted[kind] += run.stats.tokens_accepted
            partly[kind] += run.stats.partly_rejected_drafts
    assert len(distinct) > 5 * len(prompts)  # a text, not one token over and over
    assert accepted["exits"] > 0
    assert accepted["scripted"] > 10 * len(prompts)
    assert partly["scripted"] > 2 * len(prompts)
    assert partly["exits"] + partly["lookup"] > 0


@pytest.mark.parametrize("family", [*OTHER_FAMILIES, "mistral-window", "qwen2-window"])
def test_states_are_the_librarys_hidden_states(tiny_backbone, family):
    backbone = tiny_backbone(family)
    ids = torch.tensor([LONG_PROMPT])
    with torch.no_grad():
        theirs = backbone.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    ours = backbone.hidden_states_at(ids, torch.ones_like(ids), [1, 3])
    assert torch.equal(ours[0], theirs.hidden_states[1])
    assert torch.equal(ours[1], theirs.hidden_states[3])
    assert torch.equal(ours[2], theirs.hidden_states[-1])
    assert torch.allclose(logits_of(backbone, ours[2]), theirs.logits, atol=1e-5)
    top = theirs.logits.softmax(-1).amax(-1)
    assert 0.02 < top.mean() < 0.95  # neither flat nor decided, or nothing here would say much


@pytest.mark.parametrize("family", [*OTHER_FAMILIES, "mistral-window", "qwen2-window"])
def test_packed_documents_give_the_states_they_have_alone(tiny_backbone, family):
    """Positions begin at each document, and windows hide as much as in decoding."""
    backbone = tiny_backbone(family)
    documents = [Document(LONG_PROMPT[:9], "a"), Document(LONG_PROMPT[9:], "b")]
    (row,) = pack(documents, len(LONG_PROMPT) + 8, pad_id=0)
    packed = backbone.hidden_states_at(row.input_ids, row.block_mask(), [2, 5])
    start = 0
    for document in documents:
        ids = torch.tensor([document.ids])
        alone = backbone.hidden_states_at(ids, torch.ones_like(ids), [2, 5])
        end = start + len(document.ids)
        for ours, theirs in zip(packed, alone, strict=True):
            assert torch.allclose(ours[0, start:end], theirs[0], atol=2e-3, rtol=1e-3)
        start = end


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_heads_read_states_as_the_backbone_does(tiny_backbone, family):
    """An untrained adapter is the final norm and the LM head with all that the family does to its logits."""
    backbone = tiny_backbone(family)
    blocks = HFBlocks(backbone)
    heads = ExitHeads(backbone, "adapter", [1, 3, 5], 16, None)
    hidden = torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        expected = blocks.logits(blocks.final_norm(hidden))
        assert torch.allclose(heads.logits(0, hidden), expected, atol=1e-4)
        vocab = torch.tensor([3, 50, 200])
        some = ExitHeads(backbone, "adapter", [1, 3, 5], 16, vocab)
        assert torch.allclose(some.logits(0, hidden), expected[:, vocab], atol=1e-4)


def test_a_cap_leaves_the_best_token_the_best_in_bfloat16():
    """Rounded like the product, two close logits near the cap would become one."""
    close = torch.tensor([29.0, 29.125, 29.25, 60.0, 60.25], dtype=torch.bfloat16)
    assert close.unique().numel() == 5
    for mapped in (LogitMap(cap=30.0)(close), LogitMap(divisor=3.0)(close)):
        assert mapped.unique().numel() == 5
        assert mapped.argsort().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_linear_heads_start_as_norm_and_lm_head(tiny_backbone, family):
    backbone = tiny_backbone(family)
    heads = ExitHeads(backbone, "linear", [2, 4], 0, None)
    heads.start_from(backbone)
    hidden = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.allclose(heads.logits(0, hidden), backbone.lm_head(backbone.norm(hidden)), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "mixtral"])
def test_answers_made_together_are_those_made_alone(tiny_backbone, family):
    backbone = tiny_backbone(family)
    prompts = [PROMPT, LONG_PROMPT, [10, 20, 30]]
    answers = answerer(backbone)(prompts, 16, None, torch.Generator())
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt])
        alone = backbone.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert answer == alone[0, len(prompt) :].tolist()
    drawn = [answerer(backbone)(prompts, 16, 0.8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "adapter"), ("gemma2", "attention")])
def test_heads_train_from_a_cache_and_decode_by_the_commands(tmp_path, tiny_folder, tiny_backbone, family, kind):
    """Answers, cache, training without the backbone, calibration and a comparison: a family end to end."""
    text, cache, bundle = tmp_path / "text.jsonl", tmp_path / "cache", tmp_path / "heads"
    text.write_text("".join(json.dumps({"prompt": f"tell me about {i} and {i * i}"}) + "\n" for i in range(40)))
    common = ["--model-name", tiny_folder(family), "--quantization", "none"]
    data = ["--dataset-name", text, "--on-policy", "--answer-tokens", 12, "--max-length", 64, "--holdout", 0.3]
    places = ["--cache-dir", cache, "--output-dir", bundle]
    heads = ["--accuracy-level", 0.1, "--read-heads", "all", "--json"]
    shape = ["--head", kind, "--num-heads", 2, "--rank", 8]
    commands: list[list] = [
        ["train", "--mode", "offline", *common, *data, *places, *shape, "--max-steps", 3],
        ["calibrate", "--bundle", bundle, "--accuracy-levels", "0.1,0.9"],
        [
            "infer",
            "--bundle",
            bundle,
            "--mode",
            "compare",
            "--drafter",
            "exit",
            "--prompt",
            "hello",
            "--max-tokens",
            12,
            *heads,
        ],
    ]
    *_, answer = [output_of(*command) for command in commands]
    verdict = json.loads(answer)
    assert verdict["identical"] is verdict["bit_exact"] is True
    backbone, stored = tiny_backbone(family), Cache(cache).view(torch.device("cpu"))
    hidden = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stored.final_norm(hidden), backbone.final_norm(hidden))
    assert torch.equal(logits_of(stored, hidden), logits_of(backbone, hidden))
    assert stored.last_block == backbone.last_block


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_padding_behind_the_last_position_is_no_fault(tiny_folder, family):
    """A pass is padded to its width; where positions are learned, there may be none left for the padding."""
    backbone = load_backbone(BackboneConfig(model_name=str(tiny_folder(family)), quantization="none", device="cpu"))
    model = Engine(backbone, HFBlocks(backbone))
    prompt = (LONG_PROMPT * 8)[: backbone.context_length - 3]
    ids = torch.tensor([prompt])
    expected = backbone.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )[0, len(prompt) :].tolist()
    assert tokens_of(decode(model, Request(prompt, 3), NoDrafter())) == expected


def test_where_rotary_tables_depend_on_the_length_longer_texts_are_refused(tiny_folder):
    """As in Phi-4-mini: made for 512 positions, of which 256 have the tables of short texts."""
    backbone = load_backbone(
        BackboneConfig(model_name=str(tiny_folder("phi3-longrope")), quantization="none", device="cpu")
    )
    model = Engine(backbone, make_blocks(backbone))
    prompt = [5 + place % 200 for place in range(250)]
    expected = backbone.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert tokens_of(decode(model, Request(prompt, 6, stop_ids=()), NoDrafter())) == expected[0, 250:].tolist()
    with pytest.raises(ConfigError, match="exceed the context of 256"):
        tokens_of(decode(model, Request(prompt, 7), NoDrafter()))


@pytest.mark.parametrize("family", NF4_FAMILIES)
def test_decoding_in_4_bit_is_bit_exact(tiny_folder, family):
    backbone = load_backbone(BackboneConfig(model_name=str(tiny_folder(family)), device="cpu"))
    assert any(type(module).__name__ == "Linear4bit" for module in backbone.blocks.modules())
    blocks = make_blocks(backbone)
    assert blocks.is_invariant
    torch.manual_seed(2)
    heads = ExitHeads(backbone, "adapter", [1, 3, 5], 16, None).to(backbone.dtype).requires_grad_(False)
    model = Engine(backbone, blocks, heads)
    plain = generate(model, Request(LONG_PROMPT, 40), NoDrafter(), mode="full", keep_states=True)
    accepted = partly = 0
    for drafter in (
        ExitDrafter(thresholds_between(model, 0.5)),
        LookupDrafter(lambda rows: 1.0, [0.99] * 6),
        ScriptedDrafter(plain.token_ids, lambda index: index % 5 == 3, LONG_PROMPT),
    ):
        run = generate(model, Request(LONG_PROMPT, 40), drafter, mode="adaptive", width=8, keep_states=True)
        assert run.token_ids == plain.token_ids
        assert torch.equal(run.states, plain.states)
        accepted += run.stats.tokens_accepted
        partly += run.stats.partly_rejected_drafts
    assert accepted > 10
    assert partly > 2


def config_only(folder, config, **changes):
    """A folder with a config.json and nothing to load: what is refused here was refused before any weight."""
    settings = config.to_dict() | {"architectures": ["AnyForCausalLM"], "model_type": config.model_type} | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return BackboneConfig(model_name=str(folder), device="cpu")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: GPTBigCodeConfig(n_embd=64, n_layer=2, n_head=4), "'gpt_bigcode', which has no block runner; .* run .*llama, mistral"),
        (lambda: OPTConfig(hidden_size=64, word_embed_proj_dim=32), "opt-350m"),
        (lambda: OPTConfig(hidden_size=64, word_embed_proj_dim=64, do_layer_norm_before=False), "opt-350m"),
        (lambda: GraniteMoeHybridConfig(num_hidden_layers=2, layer_types=["linear_attention"] * 2), "no block with attention"),
    ],
    ids=["gpt_bigcode", "opt-projected", "opt-post-norm", "no-attention"],
)  # fmt: skip
def test_what_does_not_run_is_refused_by_name_before_weights_load(tmp_path, config, reason):
    with pytest.raises(UnsupportedBackboneError, match=reason) as caught:
        load_backbone(config_only(tmp_path, config()))
    assert caught.value.exit_code == 2


def test_what_needs_the_llama_shape_says_so(tiny_backbone):
    backbone = tiny_backbone("gpt2")
    with pytest.raises(UnsupportedBackboneError, match="fused runner is for blocks of the Llama shape"):
        make_blocks(backbone, "fused")
    assert isinstance(make_blocks(backbone), HFBlocks)


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "gptqmodel"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, "torchao"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}}, "hqq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "compressed"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else None,
)
def test_a_checkpoint_that_nothing_here_reads_names_the_package(tmp_path, method, package):
    with pytest.raises(BackboneError, match=f"is quantized with {method['quant_method']}.*{package}") as caught:
        load_backbone(config_only(tmp_path, family_config("llama"), quantization_config=method))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("settings", [[1, 2], {}, {"quant_method": "nosuch"}, {"quant_method": "gptq"}])
def test_damaged_settings_of_a_quantized_checkpoint_are_one_line(tmp_path, settings):
    with pytest.raises(BackboneError, match=r"cannot load|is quantized with"):
        load_backbone(config_only(tmp_path, family_config("llama"), quantization_config=settings))


@pytest.mark.parametrize(("family", "asked"), [("llama", "4bit"), ("llama", "none"), ("gpt_neox", "4bit")])
def test_a_checkpoint_saved_in_4_bit_loads_as_it_was_saved(tmp_path, tiny_folder, family, asked):
    """Its own settings, not ours on top: here single quantization, and a compute dtype that ours replaces."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(
        tiny_folder(family), quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).eval()
    saved.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    backbone = load_backbone(BackboneConfig(model_name=str(tmp_path), quantization=asked, device="cpu"))
    assert backbone.quantization == backbone.fingerprint["quantization"] == "4bit"
    linear = next(module for module in backbone.blocks.modules() if type(module).__name__ == "Linear4bit")
    assert linear.compute_dtype == torch.bfloat16
    model = Engine(backbone, make_blocks(backbone))
    plain = generate(model, Request(LONG_PROMPT, 24), NoDrafter(), mode="full", keep_states=True)
    run = generate(
        model, Request(LONG_PROMPT, 24), LookupDrafter(lambda rows: 1.0, [0.99] * 6), mode="lookup", keep_states=True
    )
    assert run.token_ids == plain.token_ids
    assert torch.equal(run.states, plain.states)
