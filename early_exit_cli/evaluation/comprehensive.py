"""Every way to decode one prompt, side by side: full, fixed drafts of every head, every calibrated level.

What the seed calls `comprehensive`. The methods take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from early_exit_cli.decoding.answer import Generation, generate, median_run
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.choose import exit_drafter
from early_exit_cli.drafting.drafter import Drafter, NoDrafter
from early_exit_cli.drafting.exit import FixedDrafter
from early_exit_cli.engine import Engine, require_heads
from early_exit_cli.errors import BundleError

DRAFT_LENGTHS = (5, 10, 15)
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class MethodRun:
    """A method's run of median speed; speed-up, identity and bits (over all repeats) against `full` of the same call."""

    run: Generation
    speedup: float
    identical: bool
    bit_exact: bool

    def record(self) -> dict[str, Any]:
        """The run as JSON."""
        return {
            **self.run.record(),
            "speedup": self.speedup,
            "identical": self.identical,
            "bit_exact": self.bit_exact,
        }


def all_methods(engine: Engine, width: int, read_heads: str) -> dict[str, tuple[Drafter, int]]:
    """Name -> (drafter, rows of a pass).

    Args:
        width: of the calibrated levels; fixed drafts take a row more than they draft.

    Raises:
        BundleError: no heads, or not calibrated.
    """
    heads = require_heads(engine)
    if engine.thresholds is None:
        raise BundleError("the bundle is not calibrated", hint="eexit calibrate --bundle FOLDER")
    fixed = {
        f"layerskip_h{head}_d{length}": (FixedDrafter(head), length + 1)
        for head in range(len(heads))
        for length in DRAFT_LENGTHS
    }
    levels = {
        f"adaptive_acc{level}": (exit_drafter(engine, float(level), width, read_heads), width)
        for level in engine.thresholds.levels
    }
    return {NoDrafter.name: (NoDrafter(), width), **fixed, **levels}


def run_all(
    engine: Engine,
    request: Request,
    methods: dict[str, tuple[Drafter, int]],
    repeats: int,
    on_run: Callable[[int, str], None],
) -> dict[str, MethodRun]:
    """Decode a prompt by every method, in turns, `repeats` times each, after a warm-up that is not counted.

    Args:
        methods: with `full` among them.
        on_run: called with the number of runs done and the method's name.
    """
    runs: dict[str, list[Generation]] = {name: [] for name in methods}
    short = replace(request, max_new_tokens=min(WARM_UP_TOKENS, request.max_new_tokens))
    for name, (drafter, width) in methods.items():
        generate(engine, short, drafter, mode=name, width=width)
    for _ in range(repeats):
        for name, (drafter, width) in methods.items():
            runs[name].append(generate(engine, request, drafter, mode=name, width=width, keep_states=True))
            on_run(sum(map(len, runs.values())), name)
    full = median_run(runs[NoDrafter.name])
    return {name: _against(full, of_method) for name, of_method in runs.items()}


def _against(full: Generation, runs: list[Generation]) -> MethodRun:
    run = median_run(runs)
    identical = all(other.token_ids == full.token_ids for other in runs)
    return MethodRun(
        run,
        run.stats.tokens_per_second / full.stats.tokens_per_second,
        identical,
        identical and all(same_states(other, full) for other in runs),
    )


def same_states(one: Generation, other: Generation) -> bool:
    """Whether two runs that kept their states decided every token from the same bits."""
    return one.states is not None and other.states is not None and torch.equal(one.states, other.states)
