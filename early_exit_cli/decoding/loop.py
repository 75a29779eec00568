"""The one decoding loop: draft, verify, accept, roll back, stop. Plain decoding is the loop with `NoDrafter`.

Speculative decoding as Leviathan et al. 2023 (algorithm 1) have it, with a choice that is deterministic: greedy, or
sampled with noise that belongs to the place (`sampling.Chooser`). So a drafted token is accepted exactly where it equals
the backbone's own choice.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from early_exit_cli.decoding.head_trace import TracedHead
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import Request, Round, Text, Verified
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.drafter import Draft, Drafter
from early_exit_cli.engine import DEFAULT_WIDTH, Engine, Row, catch_up, checked_width
from early_exit_cli.runtime.kv_cache import KVCache


def decode(
    engine: Engine,
    request: Request,
    drafter: Drafter,
    *,
    width: int = DEFAULT_WIDTH,
    keep_states: bool = False,
    trace: bool = False,
    prefixes: Prefixes | None = None,
    stream: TextStream | None = None,
) -> Generator[Round]:
    """Decode one text, a Round at a time.

    Args:
        width: rows of a verifying pass, at most LARGEST_WIDTH; at most width - 1 tokens are drafted.
        keep_states: keep the final state that decided each token. trace: read every head for each token.
        prefixes: what earlier texts left; this one leaves its own there, also when it is not decoded to the end.
        stream: a new one, which the tokens become text in.

    Raises:
        ConfigError: empty prompt, beyond the context, width out of range.
        NumericsError: the backbone's logits are not finite.
    """
    width = checked_width(engine, width)
    text = Text(engine, request, drafter, trace, prefixes, stream)
    with torch.inference_mode():
        text.prefill.finish()
    try:
        while not text.ended:
            started = time.perf_counter()
            with torch.inference_mode():
                draft = text.draft(width - 1)
                verified = verify(engine, text, draft)
            committed = text.commit(draft, verified, keep_states)
            drafter.timed(draft, (time.perf_counter() - started) * 1000)
            yield committed
    finally:
        if prefixes is not None:
            text.leave_to(prefixes)


def verify(engine: Engine, text: Text, draft: Draft) -> Verified:
    """One pass of what is left of the blocks over the pending token and the draft, and the backbone's choices."""
    cache, exit_layers, depth = text.cache, text.exit_layers, engine.blocks.num_blocks
    traced: list[list[TracedHead]] = []
    if text.views or draft.rows:
        rows = draft.rows
        if text.views:  # it needs every row at every exit layer, also where drafting did not stop
            rows = [{0: hidden} for hidden in engine.embed([text.pending, *draft.tokens]).split(1)]
            traced = text.views.read(cache, rows, exit_layers)
        *deep, hidden = states_after(engine, cache, rows, [*exit_layers, depth])
    else:
        *deep, hidden = engine.run_tokens([text.pending, *draft.tokens], cache, cache.length, [*exit_layers, depth])
    states, said = engine.logits(hidden) if text.chooser.reads_logits else engine.finish(hidden)
    return Verified(deep, states, text.chooser.choose(said, draft.tokens), traced)


def states_after(engine: Engine, cache: KVCache, rows: list[Row], layers: Sequence[int]) -> list[Tensor]:
    """Bring rows, some of which have run already, to each of `layers` in turn: their states there, [rows, hidden] each."""
    found = []
    for layer in layers:
        catch_up(engine, cache, rows, layer)
        found.append(torch.cat([row[layer] for row in rows]))
    return found
