"""One prompt decoded with and without drafts, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from early_exit_cli.decoding.answer import Generation, generate, median_run
from early_exit_cli.decoding.text import Request, accepted_length
from early_exit_cli.drafting.drafter import Drafter, NoDrafter
from early_exit_cli.engine import Engine


@dataclass(frozen=True)
class Comparison:
    """Plain decoding of one prompt, and decoding with drafts, side by side.

    identical: all tokens equal. bit_exact: the final hidden state that decided each committed token is equal bit for
    bit. speedup: tokens/s of drafted over full, medians of alternating repeats. first_difference: the position where
    the two part, with the backbone's gap between its best two logits there, when they do.
    """

    full: Generation
    drafted: Generation
    identical: bool
    bit_exact: bool
    speedup: float
    first_difference: dict[str, Any] | None

    def record(self) -> dict[str, Any]:
        """The comparison as JSON."""
        result: dict[str, Any] = {
            self.full.stats.mode: self.full.record(),
            self.drafted.stats.mode: self.drafted.record(),
            "identical": self.identical,
            "bit_exact": self.bit_exact,
            "speedup": self.speedup,
        }
        if self.first_difference:
            result["first_difference"] = self.first_difference
        return result


def compare(
    engine: Engine,
    request: Request,
    drafter: Drafter,
    *,
    width: int,
    repeats: int,
) -> Comparison:
    """Decode a prompt with and without drafts, in turns, `repeats` times each, with no warm-up of its own."""
    methods = (NoDrafter(), drafter)
    runs: dict[str, list[Generation]] = {method.name: [] for method in methods}
    for _ in range(repeats):
        for method in methods:
            runs[method.name].append(generate(engine, request, method, mode=method.name, width=width, keep_states=True))
    full, drafted = (median_run(runs[method.name]) for method in methods)
    identical = all(run.token_ids == full.token_ids for run in runs[drafter.name])
    bit_exact = identical and all(torch.equal(_states(run), _states(full)) for run in runs[drafter.name])
    return Comparison(
        full,
        drafted,
        identical,
        bit_exact,
        drafted.stats.tokens_per_second / full.stats.tokens_per_second,
        None if identical else _first_difference(engine, full, drafted),
    )


def _states(run: Generation) -> torch.Tensor:
    if run.states is None:
        raise ValueError("compared runs keep their states")
    return run.states


def _first_difference(engine: Engine, full: Generation, drafted: Generation) -> dict[str, Any]:
    shorter = min(len(full.token_ids), len(drafted.token_ids))
    place = min(accepted_length(full.token_ids, drafted.token_ids), shorter - 1)
    with torch.inference_mode():
        best = engine.blocks.logits(_states(full)[place : place + 1])[0].float().topk(2).values
    return {"index": place, "top2_gap": float(best[0] - best[1])}
