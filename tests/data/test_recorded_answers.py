"""Many answers on memory that stands still, in recorded steps: the tokens of one text alone, at any size of batch.

What a GPU does is run here on tape (`recordings.Tape`): a number read on the host while recording stays as it was.
"""

import copy

import pytest
import torch
from recordings import HOST_READS, Tape, record_on_tape
from tiny_models import FAMILIES

from early_exit_cli.data import recorded_answers
from early_exit_cli.data.answers import answer_together
from early_exit_cli.data.recorded_answers import LOOK_EVERY, RecordedAnswers, rows_of
from early_exit_cli.runtime import padded as padded_rows
from early_exit_cli.runtime.cuda_graphs import CudaRecorder
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.padded import dense_bytes, dense_layers, unpacked

COMMON = {7, 19, 44, 101, 180, 200, 222, 256}
"""End tokens frequent enough to end rows at different steps."""


def prompts(lengths, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(250, (length,), generator=generator).tolist() for length in lengths]


def one_by_one(blocks, texts, tokens):
    return [answer_together(blocks, [text], tokens)[0] for text in texts]


def by_the_library(backbone, texts, tokens):
    """Each text's greedy answer by `generate`."""
    found = []
    for text in texts:
        ids = torch.tensor([text])
        end = sorted(backbone.eos_token_ids)
        ids = backbone.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=end
        )
        found.append(ids[0, len(text) :].tolist())
    return found


@pytest.fixture
def make(tiny_backbone, monkeypatch):
    """(family, end tokens, recorder) -> RecordedAnswers on a tiny model."""

    def build(family="llama", ends=(), record=None):
        backbone = tiny_backbone(family)
        monkeypatch.setitem(vars(backbone), "eos_token_ids", frozenset(ends))
        return RecordedAnswers(FusedBlocks(backbone), record)

    return build


@pytest.mark.parametrize("record", [None, record_on_tape], ids=["as they are", "on tape"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_answer_is_that_of_its_prompt_alone(make, family, record):
    """Unsorted prompts; rows end early and are dropped; steps read 128 keys, then 256."""
    answer = make(family, COMMON, record)
    texts = prompts((38, 3, 100, 64, 9, 80, 21, 99, 50))
    found = answer(texts, 40)
    assert found == by_the_library(answer.blocks.backbone, texts, 40)
    assert len({len(tokens) for tokens in found}) > 2
    assert answer.failure is None
    rows, keys, _ = zip(*answer.recordings, strict=True)
    assert min(rows) < rows_of(len(texts)) == max(rows)
    assert set(keys) == {128, 256}


def test_later_calls_find_memory_and_recordings_and_no_trace_of_earlier_ones(make):
    """A shorter batch between two equal ones, on the same buffers, one of which held a NaN."""
    recorded = []

    def record(step):
        recorded.append(step)
        return record_on_tape(step)

    answer = make(record=record)
    long, short = prompts((40, 70, 20, 33)), prompts((12, 5, 8), seed=6)
    expected = one_by_one(answer.blocks, long, 20)
    assert answer(long, 20) == expected
    memory = answer.memory
    with torch.inference_mode():
        for buffer in (*memory.all.keys, *memory.all.values):
            buffer.fill_(float("nan"))
    assert answer(short, 20) == one_by_one(answer.blocks, short, 20)
    assert len(recorded) == 1  # three rows and four take the same size
    assert answer(long, 20) == expected
    assert len(recorded) == 1
    assert answer.memory is memory
    assert answer(prompts((300,)), 4) == one_by_one(answer.blocks, prompts((300,)), 4)  # needs longer buffers
    assert answer.memory is not memory
    assert len(recorded) == len(answer.recordings) + 1 == 2


def test_a_step_reads_nothing_back_and_may_be_run_twice(make):
    answer = make()
    answer(prompts((20, 30)), 4, 0.7, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        batch = answer.memory.first(rows_of(2), True)
        with Tape() as tape:
            batch.advance(128)
        once = batch.text.clone()
        batch.advance(128)
    assert not {func for func, *_ in tape.calls} & HOST_READS
    assert torch.equal(batch.text, once)


def test_six_hundred_rows_are_answered_together(make):
    answer = make(ends=COMMON)
    texts = prompts([3 + index % 40 for index in range(600)])
    found = answer(texts, 2 * LOOK_EVERY + 2)
    assert answer.memory.rows == 768
    assert min(rows for rows, *_ in answer.recordings) < 600
    chosen = range(0, 600, 17)
    assert [found[index] for index in chosen] == one_by_one(
        answer.blocks, [texts[index] for index in chosen], 2 * LOOK_EVERY + 2
    )


def test_rows_that_ended_are_dropped_and_the_others_go_on(make):
    """The end token is one that a single row writes early: all others must be as long as they may be."""
    texts = prompts(range(10, 19))
    plain = make()
    free = plain(texts, 40)
    ends = next(token for token in free[4] if sum(token in tokens for tokens in free) == 1)
    answer = make(ends=(ends,), record=record_on_tape)
    found = answer(texts, 40)
    stop = free[4].index(ends) + 1
    assert stop < 40 - LOOK_EVERY
    assert found[4] == free[4][:stop]
    assert [found[row] for row in range(9) if row != 4] == [free[row] for row in range(9) if row != 4]
    assert {rows for rows, *_ in answer.recordings} == {12, 8}


def test_when_all_have_ended_no_step_is_run(make):
    texts = prompts((12, 14))
    free = make()(texts, 3)
    answer = make(ends={free[0][0], free[1][0]})
    steps = []
    answer.record = lambda step: lambda: steps.append(step())
    assert answer(texts, 200) == [free[0][:1], free[1][:1]]
    assert len(steps) == LOOK_EVERY - 1


@pytest.mark.parametrize("tokens", [64, 40, 7])
def test_prompts_are_read_in_pieces_of_few_passes(make, monkeypatch, tokens):
    """Some prompts to a pass, or some columns of one where it is longer than a pass."""
    monkeypatch.setattr(recorded_answers, "PIECE_TOKENS", tokens)
    answer = make("mistral-window")
    texts = prompts((5, 8, 9, 20, 21, 44))
    passes = []
    run = padded_rows.PaddedRows.run
    monkeypatch.setattr(
        padded_rows.PaddedRows, "run", lambda self, ids, place: passes.append(ids.shape) or run(self, ids, place)
    )
    found = answer(texts, 8)
    assert max(rows * columns for rows, columns in passes) <= tokens
    assert sum(rows * columns for rows, columns in passes) < 6 * 44  # the batch's padding is not computed
    assert len(passes) == {64: 3, 40: 5, 7: 18}[tokens]
    monkeypatch.setattr(padded_rows.PaddedRows, "run", run)
    assert found == one_by_one(answer.blocks, texts, 8)


def test_a_batch_too_large_for_the_memory_is_answered_in_parts(make, monkeypatch):
    answer = make()
    texts = prompts(range(10, 40))
    expected = answer(texts, 6)
    assert answer.memory.rows == 32
    a_row = recorded_answers._row_bytes(answer.blocks, 256)
    monkeypatch.setattr(recorded_answers, "free_bytes", lambda _: 2 * 13 * a_row)
    small = make()
    assert small(texts, 6) == expected
    assert small.memory.rows == 12
    monkeypatch.setattr(recorded_answers, "free_bytes", lambda _: 0)
    least = make()
    assert least(texts[:9], 6) == expected[:9]
    assert least.memory.rows == 6


def test_a_step_that_cannot_be_recorded_is_run_as_it_is(make):
    def fails(step):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    answer = make(record=fails)
    texts = prompts((9, 30))
    assert answer(texts, 12) == one_by_one(answer.blocks, texts, 12)
    assert answer.failure == "operation not permitted when stream is capturing"


def test_recordings_used_least_recently_are_forgotten(make, monkeypatch):
    monkeypatch.setattr(recorded_answers, "MOST_RECORDINGS", 2)
    answer = make(record=record_on_tape)
    for count in (3, 9, 20, 9):
        texts = prompts(range(10, 10 + count))
        assert answer(texts, 4) == one_by_one(answer.blocks, texts, 4)
    assert [rows for rows, *_ in answer.recordings] == [24, 12]


@pytest.mark.parametrize("record", [None, record_on_tape], ids=["as they are", "on tape"])
def test_sampling_is_repeatable_and_follows_the_distribution(make, record):
    """First tokens, chosen after the prompt, and second ones, chosen in a recorded step."""
    answer = make(record=record)
    prompt = prompts((13,))[0]
    draws = [answer([prompt] * 500, 2, 0.7, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    tokens = [tokens for draw in draws[1:] for tokens in draw]
    with torch.inference_mode():
        p = (answer.blocks.backbone.model(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
        likely = int(p.argmax())
        after = answer.blocks.backbone.model(torch.tensor([[*prompt, likely]])).logits[0, -1]
        q = (after / 0.7).softmax(-1)
    seconds = [second for first, second in tokens if first == likely]
    for found, expected in (([first for first, _ in tokens], p), (seconds, q)):
        best = int(expected.argmax())
        share = found.count(best) / len(found)
        assert abs(share - float(expected[best])) < 4 * float(expected[best] * (1 - expected[best]) / len(found)) ** 0.5
    assert answer([prompt], 2) == one_by_one(answer.blocks, [prompt], 2)  # greedy again on the same memory


def test_sizes_of_batches_are_few():
    assert [rows_of(count) for count in (1, 6, 7, 9, 12, 13, 48, 600, 769, 1008, 1024)] == [
        *(6, 6, 8, 12, 12, 16, 48, 768, 1024, 1024, 1024),
    ]
    assert recorded_answers._most_rows(float("inf")) == 1024
    assert [recorded_answers._most_rows(limit) for limit in (1023.9, 13, 5, 0)] == [768, 12, 6, 6]


def test_unpacked_products_are_those_in_nf4(smollm2):
    blocks = FusedBlocks(smollm2)
    blocks.layers = blocks.layers[:1]
    assert dense_bytes(blocks) == 576 * (960 + 576 + 2 * 1536 + 1536) * 2
    with torch.inference_mode():
        (first,), (dense,) = blocks.layers, dense_layers(blocks)
        for name, inner in (("qkv", 576), ("output", 576), ("gate_up", 576), ("down", 1536)):
            x = torch.randn(20, inner, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
            packed, unpacked = getattr(first, name)(x).float(), getattr(dense, name)(x).float()
            assert (packed - unpacked).norm() < 5e-3 * packed.norm(), name


def test_a_bias_leaves_no_trace_in_the_unpacked_weight(smollm2):
    product = copy.copy(FusedBlocks(smollm2).layers[0].output)
    with torch.inference_mode():
        weight = unpacked(product, torch.bfloat16)
        product.bias = torch.full((576,), 1024.0, dtype=torch.bfloat16)
        assert torch.equal(unpacked(product, torch.bfloat16), weight)


def test_weights_stay_packed_where_they_do_not_fit(smollm2, monkeypatch):
    blocks = FusedBlocks(smollm2)
    monkeypatch.setattr(recorded_answers, "dense_layers", lambda _: "unpacked")
    monkeypatch.setattr(recorded_answers, "free_bytes", lambda _: 2 * dense_bytes(blocks) - 1)
    assert RecordedAnswers(blocks).layers is blocks.layers
    monkeypatch.setattr(recorded_answers, "free_bytes", lambda _: 2 * dense_bytes(blocks))
    assert RecordedAnswers(blocks).layers == "unpacked"


@pytest.mark.gpu
def test_a_gpu_records_its_steps_and_gives_the_same_tokens(tiny_backbone):
    """In float32, without TF32: the tokens of one text alone, greedy and in a batch that drops rows."""
    backbone = copy.copy(tiny_backbone("llama"))
    backbone.model = copy.deepcopy(backbone.model).cuda()
    vars(backbone)["eos_token_ids"] = frozenset(COMMON)
    answer = RecordedAnswers(FusedBlocks(backbone))
    assert isinstance(answer.record, CudaRecorder)
    texts = prompts([3 + index % 60 for index in range(600)])
    found = answer(texts, 90)
    assert answer.failure is None
    assert {keys for _, keys, _ in answer.recordings} == {128, 256}
    chosen = range(0, 600, 29)
    assert [found[index] for index in chosen] == one_by_one(answer.blocks, [texts[index] for index in chosen], 90)
    draws = [answer(texts[:50], 20, 0.7, torch.Generator("cuda").manual_seed(seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
