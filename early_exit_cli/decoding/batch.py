"""Several texts in one pass of the backbone, each with its own drafter, accept length and end.

A pass reads the weights once for all its rows, and the rows of a pass do not see each other's bits (`runtime/blocks.py`),
so every text is what it would be alone, token for token and bit for bit. A text that ends makes room for the next one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from early_exit_cli.decoding.answer import Generation, collect_stats
from early_exit_cli.decoding.loop import states_after
from early_exit_cli.decoding.text import Request, Round, Text, Verified
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.drafter import Draft, Drafter
from early_exit_cli.engine import Engine
from early_exit_cli.numerics import synchronize
from early_exit_cli.runtime.blocks import LARGEST_WIDTH


def generate_batch(
    engine: Engine,
    requests: Sequence[Request],
    drafter: Drafter,
    *,
    mode: str,
    batch: int,
    width: int,
    on_end: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """`decode_batch` to the end. A text's seconds count from the start of all, so they hold its wait.

    Args:
        on_end: called with the number of each request whose text has ended, and its answer.
    """
    streams = [TextStream(engine, request.stop) for request in requests]
    rounds: list[list[Round]] = [[] for _ in requests]
    first: list[float] = [0.0] * len(requests)
    answers: list[Generation | None] = [None] * len(requests)
    synchronize(engine.backbone.device)
    started = time.perf_counter()
    for number, step, is_last in decode_batch(engine, requests, drafter, batch=batch, width=width):
        seconds = time.perf_counter() - started
        first[number] = first[number] or seconds
        rounds[number].append(step)
        stream = streams[number]
        stream.push(step.tokens)
        if is_last:
            stream.finish()
            request, own = requests[number], rounds[number]
            stats = collect_stats(engine, mode, own, len(request.prompt_ids), seconds, first[number], waited=True)
            answer = answers[number] = Generation(stream.text, stream.ids, stats, own, stop=request.stop)
            if on_end:
                on_end(number, answer)
    return [answer for answer in answers if answer is not None]


def decode_batch(
    engine: Engine,
    requests: Sequence[Request],
    drafter: Drafter,
    *,
    batch: int,
    width: int,
    keep_states: bool = False,
) -> Iterator[tuple[int, Round, bool]]:
    """Decode all texts, at most `batch` at a time.

    Args:
        drafter: every text gets a `fork` of it.
        width: rows of one text in a pass, at most; fewer where the texts would not all fit into one pass.

    Returns:
        (number of the request, one Round of it, whether it was the last), as they come.

    Raises:
        ConfigError: an empty prompt, or one beyond the context.
        NumericsError: the backbone's logits are not finite.
    """
    waiting = deque(enumerate(requests))
    live: list[tuple[int, Text]] = []
    room = engine.blocks.batch_rows
    while waiting or live:
        while waiting and len(live) < batch:
            number, request = waiting.popleft()
            live.append((number, Text(engine, request, drafter.fork())))
        limit = min(width, max(1, room // len(live))) - 1
        with torch.inference_mode():
            drafts = []
            for _, text in live:
                text.drafter.resize_batch(len(live))
                drafts.append(text.draft(limit))
            every = _verify(engine, [text for _, text in live], drafts)
        for (number, text), draft, verified in zip(live, drafts, every, strict=True):
            step = text.commit(draft, verified, keep_states)
            yield number, step, text.ended
        live = [(number, text) for number, text in live if not text.ended]


def _verify(engine: Engine, texts: list[Text], drafts: list[Draft]) -> list[Verified]:
    """`loop.verify` for all texts; drafts whose rows have run already are finished each by itself."""
    depth = engine.blocks.num_blocks
    layers = [[*text.exit_layers, depth] for text in texts]
    every: list[list[Tensor]] = [[] for _ in texts]
    for place, draft in enumerate(drafts):
        if draft.rows:
            every[place] = states_after(engine, texts[place].cache, draft.rows, layers[place])
    fresh = [place for place, draft in enumerate(drafts) if not draft.rows]
    if fresh:
        stops = sorted({layer for place in fresh for layer in layers[place]})
        tokens = [[texts[place].pending, *drafts[place].tokens] for place in fresh]
        found = engine.run_batch(
            list(engine.embed([token for own in tokens for token in own]).split([len(own) for own in tokens])),
            [texts[place].cache for place in fresh],
            [texts[place].cache.length for place in fresh],
            stops,
        )
        for place, states in zip(fresh, found, strict=True):
            every[place] = [states[stops.index(layer)] for layer in layers[place]]
    return _decide(engine, texts, drafts, every)


def _decide(engine: Engine, texts: list[Text], drafts: list[Draft], every: list[list[Tensor]]) -> list[Verified]:
    """Final norm and LM head over the rows of all texts, then each text's own choices.

    Args:
        every: for each text its states after its drafter's exit layers and after the last block.
    """
    hidden = torch.cat([states[-1] for states in every])
    reads_logits = any(text.chooser.reads_logits for text in texts)
    read = engine.logits if reads_logits else engine.finish
    parts = [read(part) for part in hidden.split(max(LARGEST_WIDTH, engine.blocks.batch_rows))]
    sizes = [states[-1].shape[0] for states in every]
    normed, said = (torch.cat(found).split(sizes) for found in zip(*parts, strict=True))
    verified = []
    for text, draft, states, own_normed, own in zip(texts, drafts, every, normed, said, strict=True):
        best = own.argmax(-1) if reads_logits and not text.chooser.reads_logits else own
        verified.append(Verified(states[:-1], own_normed, text.chooser.choose(best, draft.tokens)))
    return verified
