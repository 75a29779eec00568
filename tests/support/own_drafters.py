"""Decoding with what a model brings to draft with, beside other drafters and plain decoding."""

import torch
from drafters import always

from early_exit_cli.decoding.answer import generate
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
