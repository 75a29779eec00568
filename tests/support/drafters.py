"""Drafters whose drafts are known beforehand, and one of each kind on a tiny model; what rounds committed."""

import torch

from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.auto import AutoDrafter
from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.drafter import Draft, Drafter, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.drafting.exit import ExitDrafter, FixedDrafter
from early_exit_cli.drafting.lookup import LookupDrafter
from early_exit_cli.heads.eagle import EagleHead

PROMPT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]


class ScriptedDrafter(Drafter):
    """Proposes the known continuation, with tokens made wrong where `wrong(index)` says so."""

    def __init__(self, continuation, wrong=lambda index: False, prompt=PROMPT):
        self.continuation, self.wrong, self.prompt = continuation, wrong, prompt

    def draft(self, model, cache, pending, limit, stop_ids):
        done = cache.length + 1 - len(self.prompt)
        tokens = [
            (token + 1) % 256 if self.wrong(done + index) else token
            for index, token in enumerate(self.continuation[done : done + limit])
        ]
        return Draft(tokens=tokens)


def tokens_of(rounds):
    return [token for step in rounds for token in step.tokens]


def thresholds_between(model, share):
    """Thresholds at which about `share` of the plain text's tokens would exit."""
    run = generate(model, Request(PROMPT, 40), NoDrafter(), mode="full", trace=True)
    rows = [[reading.entropy for reading in token] for step in run.rounds for token in step.traced]
    return torch.tensor(rows).quantile(share, 0).tolist()


def some_head(backbone, draft_vocab=None):
    """An EAGLE head that reads two layers of a tiny model; untrained, and the same each time."""
    torch.manual_seed(3)
    head = EagleHead(backbone, [2, 4], draft_vocab)
    head.start_from(backbone)
    for parameter in head.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return head.to(backbone.device, backbone.dtype).requires_grad_(False)


def always(limit=4):
    """Survival at which so many tokens are worth drafting, whatever the entropy."""
    return [Survival(intercept=30.0, slope=0.0, mean=1.0)] * limit


def make_drafter(name, model):
    """The drafter of that name, willing to draft."""
    eagle = EagleDrafter(some_head(model.backbone), always(), lambda rows: 10.0, 0.1, 0.1, 0.8)
    lookup = LookupDrafter(lambda rows: 10.0 + 0.1 * rows)
    return {
        "exit": lambda: ExitDrafter([3.0, 3.4, 3.6], temperature=0.8),
        "fixed": lambda: FixedDrafter(len(model.heads) - 1),
        "lookup": lambda: lookup,
        "eagle": lambda: eagle,
        "auto": lambda: AutoDrafter([(lookup, 15), (eagle, 15)]),
    }[name]()
