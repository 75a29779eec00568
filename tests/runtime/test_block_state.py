"""Blocks with a state: rolled back, run in parts and in other widths, a token keeps its bits."""

import functools
import random

import pytest
import torch
from drafters import PROMPT, ScriptedDrafter, thresholds_between
from transformers.models.lfm2 import modeling_lfm2

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import decode_batch
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.library import EarlyExitModel
from early_exit_cli.runtime import block_state
from early_exit_cli.runtime.block_state import CHUNK, RING
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.kv_cache import LARGEST_WIDTH

KINDS = ("lfm2", "qwen3_5", "falcon_h1", "nemotron_h")
"""A convolution alone, a gated delta net, Mamba 2 beside attention, Mamba 2 in its place."""
TEXT = [(7 * place * place + 3 * place) % 251 for place in range(240)]


def prefilled(model, length, limit=240):
    cache = model.blocks.new_cache(limit + LARGEST_WIDTH)
    for piece in model.blocks.prompt_pieces(length):
        model.run_tokens(TEXT[piece], cache, piece.start, [model.blocks.num_blocks])
    cache.length = length
    return cache


@pytest.mark.parametrize("family", KINDS)
def test_a_token_has_the_same_bits_whatever_was_taken_back_before_it(tiny_model, family):
    """Against one token a pass: drafts of every width, of which any number is right, verified at once or, as exits do, one by
    one through the first blocks and together through the rest; over chunk after chunk."""
    model = tiny_model(family, "hf")
    depth, start = model.blocks.num_blocks, 101
    with torch.inference_mode():
        cache = prefilled(model, start)
        alone = [model.run_tokens([token], cache, start + i, [depth])[0] for i, token in enumerate(TEXT[start:200])]
        for in_parts in (False, True):
            chance = random.Random(f"{family} {in_parts}")
            cache = prefilled(model, start)
            while cache.length < 200:
                width = chance.randint(1, LARGEST_WIDTH)
                right = min(chance.randint(1, width), 200 - cache.length)
                wrong = [chance.randrange(251) for _ in range(width - right)]
                hidden = model.embed([*TEXT[cache.length : cache.length + right], *wrong])
                if in_parts:
                    rows = [
                        model.run(row, cache, cache.length + place, 0, 3) for place, row in enumerate(hidden.split(1))
                    ]
                    found = model.run(torch.cat(rows), cache, cache.length, 3, depth)
                else:
                    found = model.run(hidden, cache, cache.length, 0, depth)
                expected = torch.cat(alone[cache.length - start :][:right])
                assert torch.equal(found[:right], expected), (cache.length, width, right)
                cache.length += right


def test_memory_does_not_grow_with_the_text(tiny_model):
    model = tiny_model("qwen3_5", "hf")
    with torch.inference_mode():
        short, long = (sum(state.bytes for state in prefilled(model, n).states.values()) for n in (3 * CHUNK, 240))
    assert short == long
    assert {
        rows.shape[:2].numel() for state in prefilled(model, 64).states.values() for rows in state.rows.values()
    } == {RING}


def equal_answers(model, prompt, tokens):
    """Plain decoding against exits, lookups in a text that repeats itself almost, and drafts that are wrong now and then: bits,
    and how often a draft was accepted in part."""
    request = Request(prompt, tokens, stop_ids=())
    plain = generate(model, request, NoDrafter(), mode="full", keep_states=True)
    partly = {}
    for name, drafter in (
        ("exit", ExitDrafter(thresholds_between(model, 0.5))),
        ("lookup", LookupDrafter(lambda rows: 1.0, [0.99] * 6)),
        ("scripted", ScriptedDrafter(plain.token_ids, lambda index: index % 7 == 5, prompt)),
    ):
        run = generate(model, request, drafter, mode=name, width=16, keep_states=True)
        assert run.token_ids == plain.token_ids, name
        assert torch.equal(run.states, plain.states), name
        partly[name] = run.stats.partly_rejected_drafts
    return plain.token_ids, partly


def repeating(length):
    """A text that lookup drafts from all the time, and is wrong about now and then."""
    chance = random.Random(0)
    return [chance.randrange(251) if chance.random() < 0.05 else 40 + place % 23 for place in range(length)]


@pytest.mark.parametrize("family", ["qwen3_5", "nemotron_h"])
def test_lookups_that_are_partly_wrong_corrupt_no_state(tiny_model, family):
    model = tiny_model(family, "hf")
    tokens, partly = equal_answers(model, repeating(390), 80)
    ids = torch.tensor([repeating(390)])
    theirs = model.backbone.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, eos_token_id=-1, do_sample=False
    )
    assert tokens == theirs[0, 390:].tolist()
    assert partly["scripted"] > 3
    assert partly["exit"] + partly["lookup"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "nemotron_h"])
def test_long_texts_end_as_they_began(tiny_model, family, monkeypatch):
    model = tiny_model(family, "hf")
    monkeypatch.setattr(model.backbone.config, "max_position_embeddings", 32_768)
    prompt = repeating(14_000)
    _, partly = equal_answers(model, prompt, 200)
    assert partly["scripted"] > 10
    with torch.inference_mode():
        cache = model.prefill(prompt, 1)
        ours = model.logits(model.run_tokens(prompt[-1:], cache, cache.length, [model.blocks.num_blocks])[0])[1]
        theirs = None
        for piece in torch.tensor([prompt]).split(1_000, 1):
            theirs = model.backbone.model(piece, cache=theirs and theirs.cache, use_cache=True)
    assert torch.allclose(ours[0], theirs.logits[0, -1], atol=1e-2)


def test_texts_side_by_side_keep_their_own_states(tiny_model):
    model = tiny_model("qwen3_5", "hf")
    prompts = [PROMPT, TEXT[:90], TEXT[3:20]]
    requests = [Request(prompt, 20, stop_ids=()) for prompt in prompts]
    alone = [generate(model, request, NoDrafter(), mode="full").token_ids for request in requests]
    drafter = ExitDrafter(thresholds_between(model, 0.5))
    found = [[], [], []]
    for number, step, _ in decode_batch(model, requests, drafter, batch=3, width=4):
        found[number] += step.tokens
    assert found == alone


def test_the_library_answers_as_generate_does_and_both_may_be_called_in_turn(tiny_backbone):
    """The functions that are replaced in transformers' file compute what they did for everybody else."""
    backbone = tiny_backbone("lfm2")
    model = EarlyExitModel.from_pretrained(None, model=backbone.model, tokenizer=backbone.tokenizer, drafter="lookup")
    ids = torch.tensor([repeating(60), repeating(61)[1:]])
    settings = dict(max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    ours, theirs = model.generate(ids, **settings), backbone.model.generate(ids, **settings)
    assert torch.equal(ours, theirs)
    assert torch.equal(model.generate(ids, **settings), ours)


def test_another_way_of_computing_them_is_refused(tiny_backbone, monkeypatch):
    backbone = tiny_backbone("lfm2")
    monkeypatch.setattr(block_state, "_replaced", set())
    monkeypatch.delattr(modeling_lfm2, block_state.CONVOLUTION)
    with pytest.raises(UnsupportedBackboneError, match="Lfm2ShortConv of this transformers"):
        HFBlocks(backbone)


def test_kernels_of_other_packages_have_no_part_in_them():
    """With mamba-ssm or fla installed, transformers' functions call theirs, whose arguments have other names."""

    def in_pytorch(query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False):
        return query + value, torch.ones(1)

    @functools.wraps(in_pytorch)
    def by_a_package(x):
        raise AssertionError

    rows = {name: torch.randn(1, 5, 2) for name in ("query", "key", "value", "g", "beta")}
    scan = block_state._scanning(by_a_package, block_state.SCANS["torch_chunk_gated_delta_rule"])
    found, _ = scan(**rows, initial_state=block_state.StateAt(block_state.BlockState(), 0))
    assert torch.equal(found, rows["query"] + rows["value"])
