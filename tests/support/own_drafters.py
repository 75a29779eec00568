"""Decoding with what a model brings to draft with, beside other drafters and plain decoding."""

import torch
from drafters import always

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.batch import decode_batch
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.drafting.eagle import MtpDrafter
from early_exit_cli.drafting.exit import ExitDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.sampling import Sampler, SamplingConfig


def willing(engine, limit=6):
    """A drafter that always drafts with the model's own."""
    return MtpDrafter(engine.mtp, always(limit), lambda rows: 10.0, 0.1, 0.1, 0.8)


def repeating(length):
    """A text that almost repeats itself."""
    generator = torch.Generator().manual_seed(0)
    other = torch.randint(251, (length,), generator=generator).tolist()
    return [token if token % 20 == 0 else 40 + place % 23 for place, token in enumerate(other)]


def compared(engine, prompt, tokens, chooser=lambda: Sampler(SamplingConfig())):
    """Every drafter against plain decoding, bit by bit; how often a draft of each was accepted in part, and its runs."""
    plain = generate(
        engine, Request(prompt, tokens, chooser(), stop_ids=()), NoDrafter(), mode="full", keep_states=True
    )
    lookup = LookupDrafter(lambda rows: 1.0, [0.99] * 6)
    drafters = {
        "mtp": willing(engine),
        "lookup": lookup,
        "auto": AutoDrafter([(willing(engine), 15), (lookup, 15)]),
    }
    if engine.heads is not None:
        drafters["exit"] = ExitDrafter([4.5])
    runs = {}
    for name, drafter in drafters.items():
        request = Request(prompt, tokens, chooser(), stop_ids=())
        runs[name] = run = generate(engine, request, drafter, mode=name, width=16, keep_states=True)
        assert run.token_ids == plain.token_ids, name
        assert torch.equal(run.states, plain.states), name
    return runs


def drafted_in_part(engine, prompt, last):
    """With drafts that are partly right no token and no bit changes: alone, sampled, and three texts together, of which one is
    the end of the prompt from `last` on. How many drafted tokens were accepted together."""
    runs = compared(engine, prompt, 80)
    assert runs["mtp"].stats.partly_rejected_drafts > 3
    assert 0.05 < runs["mtp"].stats.acceptance_rate < 0.95
    assert runs["auto"].stats.exit_distribution["mtp"] > 0
    sampled = compared(engine, prompt, 24, lambda: Sampler(SamplingConfig(temperature=0.8, seed=3)))
    assert sampled["mtp"].stats.tokens_accepted > 0
    requests = [Request(prompt[start:], 24, stop_ids=()) for start in (0, 100, last)]
    alone = [generate(engine, request, NoDrafter(), mode="full").token_ids for request in requests]
    together = [[], [], []]
    accepted = 0
    for number, step, _ in decode_batch(engine, requests, willing(engine), batch=3, width=4):
        together[number] += step.tokens
        accepted += step.accepted
    assert together == alone
    return accepted


def taken_over(engine):
    """A text that goes on from an earlier one drafts as one that read all of it."""
    prefixes, prompt, drafter = Prefixes(10**9), repeating(200), willing(engine)
    first = generate(engine, Request(prompt, 30, stop_ids=()), drafter, mode="mtp", prefixes=prefixes)
    longer = prompt + first.token_ids + repeating(40)
    found = generate(engine, Request(longer, 30, stop_ids=()), drafter, mode="mtp", prefixes=prefixes)
    fresh = generate(engine, Request(longer, 30, stop_ids=()), drafter, mode="mtp")
    assert prefixes.best(engine, longer, drafter.exit_layers) is not None
    assert found.token_ids == fresh.token_ids
    assert found.stats.tokens_accepted == fresh.stats.tokens_accepted > 0
