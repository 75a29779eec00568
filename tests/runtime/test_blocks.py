"""Runners: equal to the library, equal to each other, and a token's bits independent of its pass."""

import pytest
import torch
from runs import run_in_passes
from tiny_models import FAMILIES, NEAR_LLAMA, OTHER_FAMILIES

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.runtime.blocks import LARGEST_WIDTH
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.invariant_widths import measure_widths
from early_exit_cli.runtime.nf4_linear import PackedNF4, merged_linear
from early_exit_cli.runtime.select import make_blocks

RUNNERS = {"hf": HFBlocks, "fused": FusedBlocks}
DELTA_NETS = ("qwen3_next", "qwen3_5", "qwen3_5_moe")

EVERY_FAMILY = [
    *((family, runner) for family in (*FAMILIES, *NEAR_LLAMA) for runner in RUNNERS),
    *((family, "hf") for family in OTHER_FAMILIES if family not in NEAR_LLAMA),
]


@pytest.mark.parametrize(("family", "runner"), EVERY_FAMILY)
def test_blocks_composed_equal_the_librarys_forward(tiny_backbone, family, runner):
    backbone = tiny_backbone(family)
    ids = torch.randint(320, (96,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        blocks = RUNNERS[runner](backbone)
        ours = run_in_passes(blocks, ids, [40, 8, 16, 32], cuts=(1, 4))
        logits = blocks.logits(blocks.final_norm(ours))
        theirs = backbone.model(input_ids=ids[None], use_cache=False).logits[0]
    # a gated delta net divides its output by its size, also where that is next to nothing
    assert torch.allclose(logits, theirs, atol=5e-3 if family in DELTA_NETS else 2e-4, rtol=1e-4)
    assert torch.equal(logits.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_and_library_blocks_agree(tiny_backbone, family):
    backbone = tiny_backbone(family)
    ids = torch.randint(320, (64,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        ours, theirs = (run_in_passes(runner(backbone), ids, [16] * 4) for runner in (FusedBlocks, HFBlocks))
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-window"])
def test_a_sliding_window_hides_old_keys(tiny_backbone, family):
    """Changing a token outside every window must not change the last state; inside, it must."""
    backbone = tiny_backbone(family)
    windows = {backbone.window_of(block) for block in range(backbone.num_blocks)}
    assert 24 in windows
    blocks = FusedBlocks(backbone)
    ids = torch.randint(255, (40,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        cache = blocks.new_cache(64)
        blocks.run(blocks.embed(ids), cache, 0, 0, 1)
        block = next(b for b in range(blocks.num_blocks) if blocks.windows[b] == 24)
        for position, visible in ((39 - 24, False), (39 - 23, True)):
            results = []
            for factor in (1.0, 3.0):
                cache = blocks.new_cache(64)
                hidden = blocks.embed(ids)
                blocks.run(hidden, cache, 0, block, block + 1)
                cache.values[block][:, position] *= factor
                results.append(blocks.run(hidden[-1:], cache, 39, block, block + 1))
            assert torch.equal(*results) is not visible


@pytest.mark.parametrize("runner", RUNNERS)
def test_rolled_back_rows_leave_no_trace(tiny_backbone, runner):
    """Rejected drafts and padding are overwritten before anyone sees them."""
    blocks = RUNNERS[runner](tiny_backbone("llama"))
    ids = torch.arange(40) * 7 % 256
    with torch.inference_mode():
        clean = run_in_passes(blocks, ids, [8, 8, 8, 8, 8])
        cache = blocks.new_cache(256)
        rows = []
        for position in range(0, 40, 8):
            blocks.run(blocks.embed((ids[:16] * 3 + 1) % 256), cache, position, 0, blocks.num_blocks)  # rejected
            rows.append(blocks.run(blocks.embed(ids[position : position + 8]), cache, position, 0, blocks.num_blocks))
    assert torch.equal(torch.cat(rows), clean)


@pytest.mark.parametrize("runner", [pytest.param("hf", marks=pytest.mark.slow), "fused", "native"])
def test_nf4_results_do_not_depend_on_width_row_or_neighbours(smollm2, runner):
    """The promise everything stands on, on the real 4-bit model: logits compared bit for bit."""
    blocks = make_blocks(smollm2, runner)
    assert blocks.is_invariant
    assert {4, 8, LARGEST_WIDTH} <= set(blocks.widths)
    ids = torch.tensor(smollm2.encode_prompt("Write a short story about a lighthouse keeper and a storm. " * 6))[:96]
    with torch.inference_mode():
        for capacity in (128, 256, 1024):
            reference = blocks.logits(run_in_passes(blocks, ids, [16] * 6, capacity=capacity))
            for width in blocks.widths:
                widths = [3 if 3 in blocks.widths else 4] + [width] * ((96 - 4) // width)
                states = run_in_passes(blocks, ids, widths, capacity=capacity, cuts=(8, 16))
                # in passes of the width itself, as decoding does
                logits = torch.cat([blocks.logits(part) for part in states.split(widths)])
                assert torch.equal(logits, reference[: logits.shape[0]]), (width, capacity)


def test_bits_do_not_depend_on_the_keys_that_are_not_needed(smollm2):
    """Over long buffers a pass reads only the keys it needs, and another buffer gives the same bits."""
    blocks = make_blocks(smollm2, "fused")
    if not blocks.any_length:
        pytest.skip("this device's products do not give the same bits at every length")
    ids = torch.tensor(smollm2.encode_prompt("Write a short story about a lighthouse keeper and a storm. " * 60))[:640]
    with torch.inference_mode():
        reference = None
        for capacity, widths in ((704, [64] * 9 + [16] * 4), (2048, [64] * 9 + [2, 3, 5, 8, 4, 12] + [2] * 15)):
            assert blocks.grows(capacity)
            states = run_in_passes(blocks, ids, widths, capacity=capacity)
            reference = states if reference is None else reference
            assert torch.equal(states, reference)


def test_both_runners_give_the_same_bits_in_nf4(smollm2):
    ids = torch.tensor(smollm2.encode_prompt("Why is the sky blue?"))[:32]
    with torch.inference_mode():
        ours, theirs = (run_in_passes(runner(smollm2), ids, [16, 16]) for runner in (FusedBlocks, HFBlocks))
    assert torch.equal(ours, theirs)


def test_merged_nf4_products_equal_the_librarys_own(smollm2):
    """Canary for bitsandbytes' packed CPU format, which PackedNF4 reads directly."""
    attention = smollm2.blocks[3].self_attn
    modules = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = torch.randn(5, smollm2.hidden_size, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    with torch.inference_mode():
        merged = PackedNF4(modules, None)(x)
        separate = torch.cat([module(x) for module in modules], -1)
    assert torch.equal(merged, separate)


def test_nf4_weights_in_the_librarys_own_layout_merge_exactly():
    """The layout of GPUs, and of CPUs that have no packed kernel; scales doubly quantized, a bias on some."""
    import bitsandbytes
    from bitsandbytes.nn import Params4bit

    generator = torch.Generator().manual_seed(8)
    modules = []
    for rows in (192, 64, 64):
        module = bitsandbytes.nn.Linear4bit(128, rows, compute_dtype=torch.float32, quant_type="nf4")
        weight = torch.randn(rows, 128, generator=generator)
        module.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        module.bias.data = torch.randn(rows, generator=generator)
        modules.append(module.to("cpu").requires_grad_(False).train())  # in training mode it is never packed
    x = torch.randn(5, 128, generator=generator)
    with torch.inference_mode():
        separate = torch.cat([module(x) for module in modules], -1)
        merged = merged_linear(modules)
        assert torch.allclose(merged(x), separate, atol=1e-5)
        assert torch.equal(torch.cat([module(x) for module in modules], -1), separate)  # and they still work
        assert modules[1].weight.data_ptr() - modules[0].weight.data_ptr() == 192 * 128 // 2  # nothing is held twice


def test_eight_bit_blocks_agree_with_the_librarys(tiny_folder):
    backbone = load_backbone(BackboneConfig(model_name=str(tiny_folder("llama")), quantization="8bit", device="cpu"))
    ids = torch.randint(320, (64,), generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        ours, theirs = (run_in_passes(runner(backbone), ids, [16] * 4) for runner in (FusedBlocks, HFBlocks))
    scale = theirs.float().abs().mean()
    assert (ours - theirs).abs().mean() < 0.02 * scale


def test_the_measurement_finds_a_runner_that_is_not_invariant(tiny_backbone):
    """A runner whose rows see the width they stand in must not be called invariant."""

    class WidthDependent(HFBlocks):
        def run(self, hidden, cache, position, first, last):
            return super().run(hidden, cache, position, first, last) * (
                1 + 1e-6 * hidden.shape[0] + 1e-6 * (position % 2)
            )

    blocks = WidthDependent(tiny_backbone("llama"))
    with torch.inference_mode():
        measure_widths(blocks)
    assert not blocks.is_invariant
    assert blocks.widths == (LARGEST_WIDTH,)


@pytest.mark.parametrize("part", ["logits", "block"])
def test_the_measurement_finds_one_width_that_differs(part, tiny_backbone):
    """Only in the LM head, or only in a block far from the first token: the others are still invariant."""

    class OneDiffers(HFBlocks):
        def logits(self, normed):
            return super().logits(normed) + 1e-3 * (part == "logits" and len(normed) == 5)

        def run(self, hidden, cache, position, first, last):
            other = part == "block" and len(hidden) == 5 and position > 1000
            return super().run(hidden, cache, position, first, last) + 1e-3 * other

    blocks = OneDiffers(tiny_backbone("llama"))
    with torch.inference_mode():
        measure_widths(blocks)
    assert blocks.is_invariant
    assert 5 not in blocks.widths
    assert 4 in blocks.widths
