"""Recorded passes: the bits of the passes themselves, on memory that is reused, held, outgrown and forgotten.

What a GPU does is recorded here by `Tape`: the operations of a step on the memory they touched, so that a number that
was read on the host stays what it was. Only the capture itself needs a card; those tests are marked `gpu`.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from drafters import PROMPT
from recordings import HOST_READS, Tape, record_on_tape, run_again
from runs import almost_known, answer, ids_of, same
from tiny_models import FAMILIES

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig
from early_exit_cli.decoding.loop import decode
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.errors import ConfigError, NumericsError
from early_exit_cli.resolve import resolve
from early_exit_cli.runtime import cuda_graphs
from early_exit_cli.runtime.blocks import Blocks
from early_exit_cli.runtime.cuda_graphs import Graphs, kv_bucket
from early_exit_cli.runtime.exact_argmax import ExactArgmax, usable
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.measurements import device_identity
from early_exit_cli.runtime.select import make_blocks, use_graphs


class Bucketed(FusedBlocks):
    """Reads as many keys as recorded passes do, without recording any."""

    def new_cache(self, limit):
        return super().new_cache(kv_bucket(limit))


@pytest.fixture
def pair(tiny_model):
    """family -> (a model that records on tape, the same model without recordings), same widths and heads."""

    def build(family="llama", record=record_on_tape):
        plain = tiny_model(family)
        models = []
        for kind in (FusedBlocks, Bucketed):
            blocks = kind(plain.backbone)
            blocks.widths, blocks.is_invariant = plain.blocks.widths, plain.blocks.is_invariant
            models.append(Engine(plain.backbone, blocks, plain.heads))
        models[0].blocks.graphs = Graphs(record)
        return models

    return build


def addresses(cache):
    return [tensor.data_ptr() for tensor in (*cache.keys, *cache.values, *cache.rotary[None])]


@pytest.mark.parametrize("longest_short", [512, 100], ids=["short", "long"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gemma3"])
def test_a_pass_of_tensors_only_gives_the_bits_of_the_pass(tiny_backbone, family, longest_short):
    """Every family, width and window, in parts, at positions where windows begin to hide keys."""
    blocks = FusedBlocks(tiny_backbone(family))
    blocks.longest_short = longest_short
    with torch.inference_mode():
        ours, theirs = blocks.new_cache(192), blocks.new_cache(192)
        position = 0
        for turn, width in enumerate((16, 1, 8, 2, 3, 5, 4, 12, 6, 16, 16, 16)):
            hidden = blocks.embed(ids_of(width, turn))
            for first, last in ((0, 2), (2, blocks.num_blocks)):
                expected = blocks.run(hidden, theirs, position, first, last)
                hidden = blocks.run_at(hidden, ours, torch.tensor(position), first, last)
                assert torch.equal(hidden, expected), (width, position, first)
            position += width - turn % 2  # now and then a row is rolled back
    assert all(map(torch.equal, ours.keys + ours.values, theirs.keys + theirs.values))


def test_a_pass_of_tensors_only_gives_the_bits_of_the_pass_in_nf4(smollm2):
    blocks = FusedBlocks(smollm2)
    with torch.inference_mode():
        ours, theirs = blocks.new_cache(256), blocks.new_cache(256)
        position = 0
        for turn, width in enumerate((16, 4, 2, 8, 16, 3, 1)):
            hidden = blocks.embed(ids_of(width, turn, smollm2.vocab_size))
            expected = blocks.run(hidden, theirs, position, 0, blocks.num_blocks)
            assert torch.equal(blocks.run_at(hidden, ours, torch.tensor(position), 0, blocks.num_blocks), expected)
            position += width


def test_a_step_reads_nothing_back_to_the_host(tiny_backbone):
    """Choosing included, as it is on a GPU: by the full product. The exact argmax of CPUs does read, and is seen."""
    blocks = FusedBlocks(tiny_backbone("mistral-window"))
    with torch.inference_mode(), Tape() as tape:
        states = blocks.run_at(blocks.embed(ids_of(4)), blocks.new_cache(64), torch.tensor(3), 0, blocks.num_blocks)
        blocks.finish(states)
    called = {func for func, *_ in tape.calls}
    assert torch.ops.aten.index_put_.default in called
    assert not called & HOST_READS

    weight = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with Tape() as tape:
        ExactArgmax(weight)(weight[:2].clone())
    assert {func for func, *_ in tape.calls} & HOST_READS
    assert not usable(weight.to("meta"))  # any device but a CPU


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3", "smollm", "gemma3"])
def test_whole_answers_are_the_same_with_recorded_passes(pair, family):
    """Plain, drafted and exiting early: tokens and states bit for bit, over widths and parts of the blocks."""
    recorded, plain = pair(family)
    expected = answer(plain)
    assert same(answer(recorded), expected)
    for width in (2, 3, 8, 16):
        run = answer(recorded, almost_known(expected.token_ids), width=width)
        assert same(run, expected), width
        assert width < 8 or run.stats.partly_rejected_drafts > 0
    for thresholds in ([1e9] * 3, [2.0, 3.0, 1e9]):
        assert same(answer(recorded, ExitDrafter(thresholds)), expected)
    graphs = recorded.blocks.graphs
    assert graphs.failure is None
    parts = {(first, last) for bucket, first, last, width in (key for key in graphs.recordings if len(key) == 4)}
    assert {(0, 6), (0, 1), (1, 6)} <= parts
    assert {key for key in graphs.recordings if len(key) == 1} > {(min(recorded.blocks.widths),), (16,)}


def test_nf4_answers_are_the_same_with_recorded_passes(smollm2):
    recorded, plain = (Engine(smollm2, kind(smollm2)) for kind in (FusedBlocks, Bucketed))
    recorded.blocks.widths = plain.blocks.widths = make_blocks(smollm2).widths
    recorded.blocks.graphs = Graphs(run_again)
    prompt = smollm2.encode_prompt("Name two colours.")
    assert same(answer(recorded, prompt=prompt, tokens=8), answer(plain, prompt=prompt, tokens=8))
    assert recorded.blocks.graphs.recordings


def test_a_replay_leaves_what_callers_still_hold(pair):
    model, _ = pair()
    blocks = model.blocks
    with torch.inference_mode():
        cache = blocks.new_cache(64)
        held = []
        for turn in range(4):
            states = blocks.run(blocks.embed(ids_of(4, turn)), cache, 4 * turn, 0, 6)
            held.append([states, *blocks.finish(states)])
            if turn == 1:
                kept = [[tensor.clone() for tensor in tensors] for tensors in held]
    assert len(blocks.graphs.recordings) == 2
    assert not torch.equal(held[1][0], held[3][0])
    for tensors, copies in zip(held, kept, strict=False):
        assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize("record", [record_on_tape, run_again])
def test_requests_share_buffers_that_do_not_move_and_keep_nothing(pair, record):
    """The next request finds the same memory and recordings, and no trace of the last: not even of its NaN."""
    model, plain = pair(record=record)
    other = list(range(60, 100))
    expected = answer(plain)
    with torch.inference_mode():
        cache = model.blocks.new_cache(64)
    before = addresses(cache)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    del cache
    assert same(answer(model), expected)
    recordings = dict(model.blocks.graphs.recordings)
    assert same(answer(model, prompt=other), answer(plain, prompt=other))
    assert same(answer(model), expected)
    assert recordings
    assert all(model.blocks.graphs.recordings[key] is recording for key, recording in recordings.items())
    with torch.inference_mode():
        assert addresses(model.blocks.new_cache(200)) == before


def test_two_texts_at_once_do_not_share_buffers(pair):
    """The second runs without recordings while the first holds the buffers; each gets its own text."""
    model, plain = pair()
    prompts = (PROMPT, list(range(60, 100)))
    expected = [answer(plain, prompt=prompt).token_ids for prompt in prompts]
    both = [decode(model, Request(prompt, 24, stop_ids=()), NoDrafter()) for prompt in prompts]
    found = [[], []]
    for steps in zip(*both, strict=True):
        for tokens, step in zip(found, steps, strict=True):
            tokens += step.tokens
    assert [tokens[: len(text)] for tokens, text in zip(found, expected, strict=True)] == expected
    assert len(model.blocks.graphs.buckets) == 1


def test_a_longer_request_gets_buffers_of_its_own(pair):
    model, plain = pair()
    long = [int(token) for token in ids_of(300)]
    blocks = model.blocks
    blocks.any_length = True  # long buffers would grow, and move, without recordings
    expected = answer(plain), answer(plain, prompt=long, tokens=8)
    with torch.inference_mode():
        before = addresses(blocks.new_cache(64))
    for _ in range(2):
        assert same(answer(model), expected[0])
        assert same(answer(model, prompt=long, tokens=8), expected[1])
    assert list(blocks.graphs.buckets) == [256, 512]
    assert {key[0] for key in blocks.graphs.recordings if len(key) == 4} == {256, 512}
    with torch.inference_mode():
        assert addresses(blocks.new_cache(64)) == before
        assert blocks.new_cache(600).capacity == 1024


def test_recordings_used_least_recently_are_forgotten(pair, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_RECORDINGS", 3)
    model, plain = pair()
    expected = answer(plain)
    for drafter in (NoDrafter(), ExitDrafter([2.0, 3.0, 1e9]), almost_known(expected.token_ids), NoDrafter()):
        assert same(answer(model, drafter), expected)
        assert len(model.blocks.graphs.recordings) <= 3
    assert model.blocks.graphs.failure is None
    with torch.inference_mode():
        cache = model.blocks.new_cache(64)
        for width in (2, 3, 4, 2, 5):
            model.blocks.run(model.blocks.embed(ids_of(width)), cache, 0, 0, 1)
    assert [key[3] for key in model.blocks.graphs.recordings] == [4, 2, 5]


def test_free_buffers_make_room_and_take_their_recordings_along(pair, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MOST_KEYS", 800)
    model, plain = pair()
    blocks, graphs = model.blocks, model.blocks.graphs
    long = [int(token) for token in ids_of(300)]
    answer(model)
    answer(model, prompt=long, tokens=4)
    assert list(graphs.buckets) == [256, 512]
    with torch.inference_mode():
        held = blocks.new_cache(300)  # the free one of 256 goes, the held one stays
        blocks.new_cache(1024)
    assert list(graphs.buckets) == [512, 1024]
    assert {key[0] for key in graphs.recordings if len(key) == 4} == {512}
    assert graphs.buckets[512].held_by() is held
    del held
    assert same(answer(model), answer(plain))
    assert list(graphs.buckets) == [256]
    monkeypatch.setattr(cuda_graphs, "MOST_KEYS", 1600)
    with torch.inference_mode():
        for limit in (512, 256, 1024):  # the one of 512 was leased least recently when that of 1,024 needs room
            blocks.new_cache(limit)
    assert list(graphs.buckets) == [256, 1024]


def test_no_memory_for_buffers_lets_the_free_ones_go(tiny_backbone):
    graphs = Graphs(run_again)
    blocks = FusedBlocks(tiny_backbone("llama"))
    graphs.lease(256, blocks.new_cache)

    def allocate(limit):
        if graphs.buckets:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return blocks.new_cache(limit)

    assert graphs.lease(512, allocate) is not None
    assert list(graphs.buckets) == [512]


def test_the_prompts_wide_passes_and_passes_beyond_the_end_are_not_recorded(pair):
    model, _ = pair()
    blocks = model.blocks
    with torch.inference_mode():
        cache = blocks.new_cache(64)
        blocks.run(blocks.embed(ids_of(40)), cache, 0, 0, 6)
        assert not blocks.graphs.recordings
        blocks.run(blocks.embed(ids_of(16)), cache, 240, 0, 6)
        assert list(blocks.graphs.recordings) == [(256, 0, 6, 16)]
        assert blocks.graphs.run(blocks.run_at, blocks.embed(ids_of(16)), cache, 241, 0, 6) is None


def test_a_recording_that_fails_costs_speed_only(pair):
    def refuse(step):
        step()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    model, plain = pair(record=refuse)
    expected = answer(plain)
    assert same(answer(model, almost_known(expected.token_ids)), expected)
    assert model.blocks.graphs.failure == "CUDA error: operation not permitted when stream is capturing more"
    assert not model.blocks.graphs.recordings


def test_nan_states_are_seen_in_a_replayed_finish(pair):
    model, _ = pair()
    with torch.inference_mode():
        good, bad = torch.randn(2, 64), torch.randn(2, 64)
        bad[1, 3] = float("nan")
        choices = model.finish(good)[1]
        assert (choices >= 0).all()
        with pytest.raises(NumericsError, match="NaN or infinite"):
            model.finish(bad)
        assert torch.equal(model.finish(good)[1], choices)


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_the_check_at_load_keeps_recordings_that_give_the_same_bits(tiny_model, family):
    blocks = tiny_model(family).blocks
    without = device_identity(blocks)
    with torch.inference_mode():
        use_graphs(blocks, record_on_tape)
    assert blocks.graphs is not None
    assert blocks.without_graphs is None
    assert {key[3] for key in blocks.graphs.recordings if len(key) == 4} == set(blocks.widths)
    assert device_identity(blocks) != without  # costs measured without recordings are not those with them


class ReadsThePosition(FusedBlocks):
    """Recorded, such a pass would stay at the position it was recorded at."""

    def run_at(self, hidden, cache, position, first, last):
        rows = self.rows(cache, int(position), hidden.shape[0])
        return self._through(hidden, rows.rotary, [(cache, rows)], first, last)


class SlightlyOff(FusedBlocks):
    """As another kernel would be."""

    def run_at(self, hidden, cache, position, first, last):
        return super().run_at(hidden, cache, position, first, last) * (1 + 2**-20)


def fails(step):
    raise RuntimeError("no capture here")


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        (ReadsThePosition, record_on_tape, "a replayed pass of width 1 gives other bits than the pass itself"),
        (SlightlyOff, record_on_tape, "a replayed pass of width 1 gives other bits than the pass itself"),
        (FusedBlocks, lambda step: lambda: None, "a replayed pass of width 1 gives other bits than the pass itself"),
        (FusedBlocks, fails, "no capture here"),
    ],
    ids=["reads-on-the-host", "slightly-off", "does-nothing", "fails"],
)
def test_the_check_at_load_finds_recordings_that_are_wrong(tiny_backbone, kind, record, reason):
    blocks = kind(tiny_backbone("llama"))
    blocks.widths = (1, 4, 16)
    with torch.inference_mode():
        use_graphs(blocks, record)
    assert blocks.graphs is None
    assert blocks.without_graphs == reason


def test_eight_bit_products_are_not_recorded(tiny_backbone):
    blocks = FusedBlocks(tiny_backbone("llama"))
    blocks.backbone = SimpleNamespace(quantization="8bit")
    use_graphs(blocks, fails)
    assert blocks.graphs is None
    assert "8-bit" in blocks.without_graphs


def test_buckets_are_few_and_waste_less_than_they_hold():
    assert [kv_bucket(limit) for limit in (1, 256, 257, 512, 513, 1024, 1025, 2048, 2049, 33_000)] == [
        256,
        256,
        512,
        512,
        1024,
        1024,
        2048,
        2048,
        3072,
        33_792,
    ]


def test_graphs_demanded_without_a_gpu_are_refused_before_anything_loads():
    with pytest.raises(ConfigError, match="cuda_graphs is on, but the device is cpu"):
        load_backbone(BackboneConfig(model_name="no/such-model", device="cpu", cuda_graphs="on"))
    with pytest.raises(ConfigError, match="runner hf has none"):
        resolve({"backbone.cuda_graphs": ("on", "--cuda-graphs"), "backbone.runner": ("hf", "--runner")})


def test_the_command_refuses_in_one_line():
    command = ["infer", "--device", "cpu", "--cuda-graphs", "on", "--prompt", "x"]
    done = subprocess.run([sys.executable, "-m", "early_exit_cli", *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "cuda_graphs is on, but the device is cpu" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def on_gpu():
    """SmolLM2 in NF4 on a card, recorded passes demanded."""
    backbone = load_backbone(BackboneConfig(device="cuda"))
    return Engine(backbone, make_blocks(backbone, "fused", "on"))


@pytest.mark.gpu
def test_replayed_graphs_give_the_bits_of_the_pass_on_a_gpu(on_gpu):
    blocks = on_gpu.blocks
    ids = ids_of(200, vocab=on_gpu.backbone.vocab_size).to(on_gpu.backbone.device)
    with torch.inference_mode():
        for width in blocks.widths:
            ours, theirs = blocks.new_cache(256), blocks.new_cache(256)
            assert blocks.graphs.buckets[256].held_by() is ours
            for position in (0, width, 5 * width, 2 * width, 2 * width + 1):
                states = expected = blocks.embed(ids[position : position + width])
                for first, last in ((0, 7), (7, 20), (20, blocks.num_blocks)):
                    states = blocks.run(states, ours, position, first, last)
                    expected = blocks.run(expected, theirs, position, first, last)
                    assert torch.equal(states, expected), (width, position, first)
                assert all(map(torch.equal, blocks.finish(states), Blocks.finish(blocks, expected)))
            assert all(map(torch.equal, ours.keys + ours.values, theirs.keys + theirs.values))
            assert (256, 7, 20, width) in blocks.graphs.recordings
            del ours, theirs
    assert blocks.graphs.failure is None


@pytest.mark.gpu
def test_a_replayed_pass_does_not_wait_for_the_gpu(on_gpu):
    blocks = on_gpu.blocks
    width = blocks.widths[0]
    with torch.inference_mode():
        cache = blocks.new_cache(256)
        hidden = blocks.embed(ids_of(width).to(on_gpu.backbone.device))
        blocks.finish(blocks.run(hidden, cache, 0, 0, blocks.num_blocks))  # recorded
        torch.cuda.set_sync_debug_mode("error")
        try:
            hidden = on_gpu.embed([1] * width)
            for position in range(0, 8 * width, width):
                blocks.finish(blocks.run(hidden, cache, position, 0, blocks.num_blocks))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert blocks.graphs.failure is None


@pytest.mark.gpu
def test_whole_answers_are_the_same_with_and_without_graphs_on_a_gpu(on_gpu, monkeypatch):
    blocks, graphs = on_gpu.blocks, on_gpu.blocks.graphs
    prompt = on_gpu.backbone.encode_prompt("Write three sentences about the sea.")
    plain = answer(on_gpu, prompt=prompt, tokens=48)
    known = almost_known(plain.token_ids, prompt)
    for width in blocks.widths:
        drafted = answer(on_gpu, known, prompt, 48, width)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "graphs", None)
            assert same(answer(on_gpu, prompt=prompt, tokens=48), plain)
            assert same(answer(on_gpu, known, prompt, 48, width), drafted)
        if blocks.is_invariant:
            assert same(drafted, plain), width
    assert graphs.failure is None


@pytest.mark.gpu
def test_graphs_forgotten_all_at_once_can_be_recorded_again_on_a_gpu(on_gpu):
    graphs = on_gpu.blocks.graphs
    expected = answer(on_gpu)
    graphs.recordings.clear()
    assert same(answer(on_gpu), expected)
    assert graphs.recordings
    assert graphs.failure is None


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_gpu_usable():
    """In a process of its own: what a failed capture leaves behind is torch's affair, and must not reach other
    tests."""
    script = (
        "import torch\n"
        "from early_exit_cli.runtime.cuda_graphs import CudaRecorder, Graphs\n"
        "graphs = Graphs(CudaRecorder(torch.device('cuda', 0)))\n"
        "x = torch.ones(2, 2, device='cuda')\n"
        "assert graphs.finish(lambda rows: (rows * float(rows.sum()), rows), x) is None\n"
        "print(graphs.failure, (x * 2).sum().item(), torch.cuda.current_stream() == torch.cuda.default_stream())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("8.0 True")
    assert "captur" in done.stdout
