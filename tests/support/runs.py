"""Runs of a model and of its blocks, and what is compared of them."""

import torch
from drafters import PROMPT, ScriptedDrafter

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter


def ids_of(count, seed=0, vocab=256):
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed))


def run_in_passes(blocks, ids, widths, capacity=256, cuts=()):
    """Final states of `ids`, computed in passes of the given widths, each pass in parts cut at `cuts` blocks."""
    cache = blocks.new_cache(capacity)
    rows, position = [], 0
    bounds = [0, *cuts, blocks.num_blocks]
    for width in widths:
        hidden = blocks.embed(ids[position : position + width])
        for first, last in zip(bounds, bounds[1:], strict=False):
            hidden = blocks.run(hidden, cache, position, first, last)
        rows.append(hidden)
        position += width
    return torch.cat(rows)


def answer(model, drafter=None, prompt=PROMPT, tokens=24, width=8):
    return generate(model, Request(prompt, tokens), drafter or NoDrafter(), mode="", width=width, keep_states=True)


def almost_known(continuation, prompt=PROMPT):
    """Proposes a known continuation with every fourth token wrong."""
    return ScriptedDrafter(continuation, lambda index: index % 4 == 3, prompt)


def same(first, second):
    """Whether two answers have the same tokens and the same bits."""
    return first.token_ids == second.token_ids and torch.equal(first.states, second.states)


def distance(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
