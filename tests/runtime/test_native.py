"""Compiled passes: near the exact arithmetic, the same bits however a text is cut, and a way back without them."""

import copy

import pytest
import torch
from native_runners import (  # noqa: F401 (fixtures among them)
    AVX2_WHEN_SLOW,
    blocks_by_instruction_set,
    blocks_of_any_instruction_set,
    compiled_blocks,
    force,
    real_ids,
)
from nf4_models import plain_weight
from runs import run_in_passes
from tiny_models import NEAR_LLAMA, byte_tokenizer, family_config
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.data.answers import answer_side_by_side
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import pack, stacked
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.runtime import native_code as native_module
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.kv_cache import Part
from early_exit_cli.runtime.native_blocks import NativeBlocks, why_not_native
from early_exit_cli.runtime.native_buffers import Held
from early_exit_cli.runtime.native_code import NoNativeCode, native_code
from early_exit_cli.runtime.nf4_linear import is_packed_nf4, is_plain_nf4
from early_exit_cli.runtime.select import make_blocks

SHAPES = (
    *("llama", "llama3-rope", "mistral-window", "qwen2", "qwen2-window", "qwen3"),
    *("gemma2", "gemma3", "phi3", "smollm3-window", "olmo2", "granite"),
)
SHAPES_HERE = [
    *((family, "") for family in SHAPES),
    *((family, "avx2") for family in ("qwen2-window", "qwen3", "gemma2", "gemma3")),
]


@pytest.fixture(scope="module")
def small_backbone(tmp_path_factory, blocks):
    """family -> a random model in NF4, of sizes that the tiles fit."""
    made = {}

    def load(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            config = family_config(family)
            config.hidden_size, config.intermediate_size, config.head_dim = 128, 192, 64
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
                elif "q_norm" in name or "k_norm" in name or (parameter.ndim == 1 and family in NEAR_LLAMA):
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[family] = load_backbone(BackboneConfig(model_name=str(folder), device="cpu"))
        return made[family]

    return load


@pytest.mark.parametrize(("family", "name"), SHAPES_HERE)
def test_every_shape_computes_what_the_fused_runner_does(small_backbone, family, name, monkeypatch):
    """Norms of queries and keys, biases, scaled rotary embeddings, windows that the text outgrows."""
    if name:
        force(monkeypatch, name)
    backbone = small_backbone(family)
    ids = torch.randint(256, (96,), generator=torch.Generator().manual_seed(3))
    native, fused = NativeBlocks(backbone), FusedBlocks(backbone)
    with torch.inference_mode():
        states = fused.embed(ids)
        for block in range(backbone.num_blocks):
            ours, theirs = (
                kind.run(states, kind.new_cache(128), 0, block, block + 1) - states for kind in (native, fused)
            )
            assert (ours - theirs).float().norm() < 0.01 * theirs.float().norm()  # sums in another order
            states = states + theirs
        (embedded,) = native.run_tokens(ids.tolist(), native.new_cache(128), 0, [1])
        assert torch.equal(embedded, native.run(fused.embed(ids), native.new_cache(128), 0, 0, 1))
        ours, theirs = (kind.final_norm(states).float() for kind in (native, fused))
        assert (ours - theirs).norm() < 0.001 * theirs.norm()


@pytest.mark.parametrize(("family", "name"), SHAPES_HERE)
def test_bits_do_not_depend_on_the_pass(small_backbone, family, name, monkeypatch):
    if name:
        force(monkeypatch, name)
    blocks = NativeBlocks(small_backbone(family))
    ids = torch.randint(256, (128,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        reference = run_in_passes(blocks, ids, [128])
        for widths, capacity, cuts in (
            ([1] * 128, 128, ()),
            ([2, 3, 5, 7, 11, 13, 17, 19, 23, 28], 192, (2,)),
            ([16] * 8, 1024, (1, 4)),
            ([64, 9, 8, 47], 256, (5,)),
        ):
            assert torch.equal(run_in_passes(blocks, ids, widths, capacity, cuts), reference), widths


def test_tokens_are_embedded_as_the_backbone_embeds_them(blocks, smollm2):
    ids = real_ids(smollm2, 40)
    with torch.inference_mode():
        caches = [blocks.new_cache(64) for _ in range(2)]
        for start, end in ((0, 30), (30, 31), (31, 40)):
            stops = [8, 16, blocks.num_blocks]
            ours = blocks.run_tokens(ids[start:end].tolist(), caches[0], start, stops)
            theirs = blocks.run_through(blocks.embed(ids[start:end]), caches[1], start, stops)
            assert all(map(torch.equal, ours, theirs))
            normed, choices = blocks.finish(ours[-1])
            assert torch.equal(normed, blocks.final_norm(theirs[-1]))
            assert torch.equal(choices, blocks.choose(normed)[0])
        assert all(map(torch.equal, *(cache.keys + cache.values for cache in caches)))
        for outside in (-1, smollm2.embedding.num_embeddings):
            with pytest.raises(IndexError, match="are embedded"):  # an address, not a row
                blocks.run_tokens([5, outside], caches[0], 40, [blocks.num_blocks])


def test_bits_do_not_depend_on_the_number_of_threads(any_blocks, smollm2):
    ids, before = real_ids(smollm2, 70), torch.get_num_threads()
    found = []
    with torch.inference_mode():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            states = run_in_passes(any_blocks, ids, [64, 6])
            found.append(
                (
                    states,
                    any_blocks.final_norm(states),
                    any_blocks.logits(any_blocks.final_norm(states)),
                    any_blocks.finish(states)[1],
                )
            )
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.fixture(scope="module")
def divergence(smollm2):
    """Logits of 120 tokens -> how far they are from those of the same NF4 weights in float32."""
    config = copy.deepcopy(smollm2.config)
    del config.quantization_config
    exact = AutoModelForCausalLM.from_config(config).float().eval()
    modules = dict(smollm2.model.named_modules())
    exact.load_state_dict({name: plain_weight(modules[name.removesuffix(".weight")]) for name in exact.state_dict()})
    with torch.inference_mode():
        wanted = exact(real_ids(smollm2, 120)[None]).logits[0].log_softmax(-1)
    return lambda logits: float((wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1).mean())


def test_passes_are_as_near_the_exact_arithmetic_as_the_librarys(any_blocks, smollm2, divergence):
    ids = real_ids(smollm2, 120)
    with torch.inference_mode():
        ours = divergence(any_blocks.logits(any_blocks.final_norm(run_in_passes(any_blocks, ids, [120]))))
        theirs = divergence(smollm2.model(ids[None]).logits[0])
    assert 0 < ours < 1.1 * theirs


@AVX2_WHEN_SLOW
def test_the_choice_is_the_first_of_the_best_logits(any_blocks, smollm2):
    ids = real_ids(smollm2, 640)
    ties = 0
    with torch.inference_mode():
        normed = any_blocks.final_norm(run_in_passes(any_blocks, ids, [64] * 10, capacity=640))
        for width in (1, 3, 8, 16, 40):
            for rows in normed.split(width):
                logits = any_blocks.logits(rows)
                best = logits.max(-1).values
                choices, values = any_blocks.choose(rows)
                assert torch.equal(choices, (logits == best[:, None]).int().argmax(-1))
                assert torch.equal(values, best.float())
                ties += int(((logits == best[:, None]).sum(-1) > 1).sum())
    assert ties > 0


@pytest.mark.slow
def test_a_quarter_of_a_million_choices(blocks, smollm2):
    """States around real ones, from hardly moved to mostly noise: always the first of the best logits is chosen."""
    normed = blocks.final_norm(run_in_passes(blocks, real_ids(smollm2, 640), [64] * 10, capacity=640)).float()
    generator = torch.Generator().manual_seed(0)
    seen = 0
    while seen < 250_000:
        noise = torch.randn(normed.shape, generator=generator) * normed.std() * torch.rand(1, generator=generator)
        for rows in (normed + noise).to(torch.bfloat16).split(64):
            logits = blocks.logits(rows)
            first = (logits == logits.max(-1, keepdim=True).values).int().argmax(-1)
            assert torch.equal(blocks.choose(rows)[0], first), seen
            seen += rows.shape[0]


def test_the_choice_holds_on_states_where_nothing_stands_out(blocks, smollm2):
    """Random and constant states leave many candidates; equal rows of the LM head none that wins alone."""
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(24, smollm2.hidden_size, generator=generator)
    states[16:20] = 1e-3
    states[20:] *= torch.tensor([1e-30, 1e4, 0.0, 1e-6])[:, None]
    normed = states.to(torch.bfloat16)
    logits = blocks.logits(normed)
    assert torch.equal(blocks.choose(normed)[0], (logits == logits.max(-1, keepdim=True).values).int().argmax(-1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_has_no_choice(blocks, smollm2, value):
    states = torch.ones(3, smollm2.hidden_size, dtype=torch.bfloat16)
    states[1, 5] = value
    choices = blocks.finish(states)[1]
    assert choices[1] == -1
    assert (choices[[0, 2]] >= 0).all()


def test_texts_together_have_the_bits_of_each_alone(blocks, smollm2):
    ids = real_ids(smollm2, 200)
    texts = [ids[:50], ids[20:150], ids[90:103]]
    with torch.inference_mode():
        alone, caches = [], []
        for text in texts:
            cache = blocks.new_cache(256)
            blocks.run(blocks.embed(text[:-4]), cache, 0, 0, blocks.num_blocks)
            caches.append(cache)
        for text, cache, width in zip(texts, caches, (1, 4, 3), strict=True):
            start = len(text) - 4
            alone.append(blocks.run(blocks.embed(text[start : start + width]), cache, start, 0, blocks.num_blocks))
        parts = [Part(cache, len(text) - 4, width) for text, cache, width in zip(texts, caches, (1, 4, 3), strict=True)]
        rows = torch.cat([text[len(text) - 4 :][:width] for text, width in zip(texts, (1, 4, 3), strict=True)])
        (together,) = blocks.run_batch(blocks.embed(rows), parts, [blocks.num_blocks])
    assert torch.equal(together, torch.cat(alone))


def test_answers_side_by_side_are_those_of_decoding(blocks, smollm2):
    prompts = [smollm2.encode_prompt(text) for text in ("Hi!", "Name three rivers.", "What is 7 times 8? Explain.")]
    model = Engine(smollm2, blocks)
    answers = answer_side_by_side(blocks, prompts, 24)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == generate(model, Request(prompt, 24), NoDrafter(), mode="full").token_ids


def test_rows_beyond_the_kv_cache_are_refused(blocks):
    cache = blocks.new_cache(64)
    with pytest.raises(IndexError, match="rows up to 66"):
        blocks.run(blocks.embed(torch.tensor([1, 2, 3])), cache, 63, 0, 1)


@pytest.fixture
def without_code(monkeypatch, tmp_path):
    """As if nothing had been compiled on this machine yet."""
    monkeypatch.setenv("EEXIT_HOME", str(tmp_path))
    native_module._loaded.cache_clear()
    yield tmp_path
    native_module._loaded.cache_clear()


def test_without_a_compiler_the_fused_runner_runs(without_code, monkeypatch, small_backbone):
    backbone = small_backbone("llama")
    monkeypatch.setattr(native_module, "find_compiler", lambda: None)
    found = make_blocks(backbone)
    assert type(found) is FusedBlocks
    assert found.without_kernels == "no C compiler was found"  # a line at load
    with pytest.raises(UnsupportedBackboneError, match="no C compiler was found") as caught:
        make_blocks(backbone, "native")
    assert caught.value.hint == "--runner auto"


def test_a_compiler_that_fails_is_named(without_code, monkeypatch, small_backbone):
    monkeypatch.setenv("CC", "false")
    assert "false could not compile it: exit code 1" in why_not_native(small_backbone("llama"))
    assert type(make_blocks(small_backbone("llama"))) is FusedBlocks
    assert not list((without_code / "native").iterdir())


def test_a_compiler_that_hangs_is_waited_for_once(without_code, monkeypatch, small_backbone):
    script = without_code / "cc"
    script.write_text(f"#!/bin/sh\necho >> {without_code}/calls\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(native_module, "SECONDS", 0.5)
    backbone = small_backbone("llama")
    assert type(make_blocks(backbone)) is FusedBlocks
    assert "timed out" in why_not_native(backbone)
    assert (without_code / "calls").read_text() == "\n"


def test_both_packings_of_bitsandbytes_are_read_with_the_same_bits(small_backbone, monkeypatch):
    """That for AVX512-BF16 unpacked, and the plain one of all other processors in its own memory."""
    packed = small_backbone("llama")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    plain = load_backbone(BackboneConfig(model_name=packed.name, device="cpu"))
    assert why_not_native(packed) is None
    assert is_plain_nf4(plain.blocks[0].mlp.down_proj)
    if not is_packed_nf4(packed.blocks[0].mlp.down_proj):
        pytest.skip("bitsandbytes packs nothing on this processor")
    force(monkeypatch, "avx2")
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(6))
    ours, theirs = NativeBlocks(plain), NativeBlocks(packed)
    with torch.inference_mode():
        assert torch.equal(run_in_passes(ours, ids, [1, 7, 32]), run_in_passes(theirs, ids, [40]))
    down = plain.blocks[2].mlp.down_proj
    assert ours.model.blocks[2].down.weight == down.weight.data_ptr()


def test_instruction_sets_are_kept_apart(blocks, small_backbone, monkeypatch):
    """Compiled code, and what is measured of a runner, are found by the instruction set, too."""
    key, name = native_module.code_key(), NativeBlocks(small_backbone("llama")).name
    force(monkeypatch, "avx2")
    assert native_module.code_key() != key
    assert " avx2 " in NativeBlocks(small_backbone("llama")).name != name


def test_damaged_code_is_compiled_again(without_code):
    path = without_code / "native" / f"{native_module.code_key()}.so"
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    with pytest.raises(NoNativeCode, match="cannot be loaded"):
        native_code()
    native_module._loaded.cache_clear()
    native_code()


def test_other_shapes_say_why(tiny_backbone):
    assert "and gpt2 (none) has others" in why_not_native(tiny_backbone("gpt2"))


def test_other_precisions_say_why(tiny_backbone):
    assert "weights in 4 bit" in why_not_native(tiny_backbone("llama"))
    with pytest.raises(UnsupportedBackboneError, match="no compiled passes here"):
        make_blocks(tiny_backbone("llama"), "native")


def test_packed_text_has_the_states_of_each_document_alone(blocks, smollm2):
    ids = real_ids(smollm2, 120).tolist()
    documents = [Document(ids[:50], "a"), Document(ids[20:110], "b"), Document(ids[:31], "c")]
    batch = stacked(pack(documents, 80, 0))
    assert (batch.documents < 0).any()
    layers = [8, 16]
    with torch.inference_mode():
        ours = blocks.states_of(batch.input_ids, batch.documents, layers)
        theirs = smollm2.hidden_states_at(batch.input_ids, batch.block_mask(), layers)
        alone = blocks.states_of(torch.tensor([ids[:50]]), torch.zeros(1, 50, dtype=torch.int64), layers)
    for packed, library, single in zip(ours, theirs, alone, strict=True):
        assert torch.equal(packed[0, :50], single[0])
        valid = batch.valid
        assert (packed[valid] - library[valid]).float().norm() < 0.05 * library[valid].float().norm()
        assert not packed[~valid].any()


def test_texts_that_begin_alike_have_the_states_of_each_alone(blocks, smollm2, monkeypatch):
    ids = real_ids(smollm2, 150).tolist()
    texts = [ids[:20] + ids[start : start + length] for start, length in ((30, 50), (60, 1), (70, 75))]
    batch = stacked(pack([Document(text, "") for text in texts], 120, 0))
    ran = []
    run_batch = blocks.run_batch
    monkeypatch.setattr(blocks, "run_batch", lambda hidden, *rest: ran.append(len(hidden)) or run_batch(hidden, *rest))
    with torch.inference_mode():
        together = blocks.states_of(batch.input_ids, batch.documents, [8])
        assert ran == [20, 50 + 1 + 75]
        for number, text in enumerate(texts):
            alone = blocks.states_of(torch.tensor([text]), torch.zeros(1, len(text), dtype=torch.int64), [8])
            for packed, single in zip(together, alone, strict=True):
                assert torch.equal(packed[batch.documents == number], single[0])


def test_loading_is_one_threads_work_and_leaves_their_number(small_backbone, monkeypatch):
    before = torch.get_num_threads()
    seen = []
    int8_tiles = Held.int8_tiles
    monkeypatch.setattr(
        Held, "int8_tiles", lambda self, rows: seen.append(torch.get_num_threads()) or int8_tiles(self, rows)
    )
    torch.set_num_threads(3)
    try:
        NativeBlocks(small_backbone("llama"))
        assert set(seen) == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_other_layouts_say_why(small_backbone, monkeypatch):
    backbone = small_backbone("llama")
    block = backbone.blocks[2]
    with monkeypatch.context() as patch:
        patch.setattr(block.mlp.up_proj.weight.quant_state, "blocksize", 128)
        assert why_not_native(backbone) == "they are for weights of which 64 share a scale"
    with monkeypatch.context() as patch:
        patch.setattr(type(backbone), "dtype", property(lambda _: torch.float32))
        assert why_not_native(backbone) == "they compute in bfloat16"
    with monkeypatch.context() as patch:
        patch.setattr(backbone.config, "hidden_act", "gelu")
        assert why_not_native(backbone) == "they know the activation silu and gelu_pytorch_tanh, not gelu"
    assert why_not_native(backbone) is None
