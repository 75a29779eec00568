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
from early_exit_cli.decoding.loop import states_after, verify
from early_exit_cli.decoding.prefixes import Prefixes
from early_exit_cli.decoding.text import Request, Round, Text, Verified
from early_exit_cli.decoding.text_stream import TextStream
from early_exit_cli.drafting.drafter import Draft, Drafter, NoDrafter
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
    for number, step, is_last in decode_batch(engine, requests, drafter, batch=batch, width=width, streams=streams):
        seconds = time.perf_counter() - started
        first[number] = first[number] or seconds
        rounds[number].append(step)
        if is_last:
            stream = streams[number]
            stream.finish()
            request, own = requests[number], rounds[number]
            stats = collect_stats(engine, mode, own, len(request.prompt_ids), seconds, first[number], waited=True)
            answer = answers[number] = Generation(stream.text, stream.ids, stats, own)
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
    streams: Sequence[TextStream] | None = None,
) -> Iterator[tuple[int, Round, bool]]:
    """Decode all texts, at most `batch` at a time.

    Args:
        drafter: every text gets a `fork` of it.
        width: rows of one text in a pass, at most; fewer where the texts would not all fit into one pass.
        streams: a new one for each text, which its tokens become text in.

    Returns:
        (number of the request, one Round of it, whether it was the last), as they come.

    Raises:
        ConfigError: an empty prompt, or one beyond the context.
        NumericsError: the backbone's logits are not finite.
    """
    waiting = deque(enumerate(requests))
    texts = Batch(engine, width=width, keep_states=keep_states)
    numbers: dict[Text, int] = {}
    while waiting or texts.live:
        while waiting and len(texts.live) < batch:
            number, request = waiting.popleft()
            stream = None if streams is None else streams[number]
            numbers[texts.join(request, drafter.fork(), stream=stream)] = number
        for text, step in texts.step():
            if isinstance(step, Exception):
                raise step
            yield numbers[text], step, text.ended
            if text.ended:
                texts.leave(text)
                del numbers[text]


class Batch:
    """Texts that are decoded together: they join, go on by a round each, and leave.

    Args:
        width: rows of one text in a pass, at most; fewer where the texts would not all fit into one pass.
        keep_states: keep the final state that decided each token.
        prefixes: what earlier texts left; a text that leaves the batch leaves its own there.
    """

    def __init__(
        self, engine: Engine, *, width: int, keep_states: bool = False, prefixes: Prefixes | None = None
    ) -> None:
        self.engine, self.width, self.keep_states, self.prefixes = engine, width, keep_states, prefixes
        self.live: list[Text] = []

    @property
    def ready(self) -> list[Text]:
        """Those whose prefill is finished."""
        return [text for text in self.live if text.prefill.done]

    def join(
        self, request: Request, drafter: Drafter, *, prefill: bool = True, stream: TextStream | None = None
    ) -> Text:
        """A further text.

        Args:
            drafter: the text's own.
            prefill: finish it now. Else its passes (`Text.prefill`) are the caller's to run before the text's first round,
                in between rounds of the others.
            stream: a new one, which its tokens become text in.

        Raises:
            ConfigError: an empty prompt, or one beyond the context.
        """
        text = Text(self.engine, request, drafter, prefixes=self.prefixes, stream=stream)
        if prefill:
            with torch.inference_mode():
                text.prefill.finish()
        self.live.append(text)
        return text

    def leave(self, text: Text, *, keep: bool = True) -> None:
        """A text goes on no further.

        Args:
            keep: leave what it computed to later ones; nothing of a prefill that is not finished.
        """
        self.live.remove(text)
        if keep and self.prefixes is not None and text.prefill.done:
            text.leave_to(self.prefixes)

    def step(self, texts: Sequence[Text] | None = None) -> list[tuple[Text, Round | Exception]]:
        """A round of each text that is ready, or of some of them, in the same passes. One alone is decoded as `decode` does.

        Returns:
            Each text's Round; or what went wrong when it took over its part, and it can only leave.

        Raises:
            Exception: whatever a draft or a pass raises. No text has gone on then, and `step_apart` tells whose fault it was.
        """
        texts = self.ready if texts is None else texts
        if not texts:
            return []
        limit = min(self.width, max(1, self.engine.blocks.batch_rows // len(texts))) - 1
        started = time.perf_counter()
        with torch.inference_mode():
            drafts = []
            for text in texts:
                text.drafter.resize_batch(len(texts))
                drafts.append(text.draft(limit))
            alone = len(texts) == 1
            every = [verify(self.engine, texts[0], drafts[0])] if alone else _verify(self.engine, texts, drafts)
        found: list[tuple[Text, Round | Exception]] = []
        for text, draft, verified in zip(texts, drafts, every, strict=True):
            try:
                found.append((text, text.commit(draft, verified, self.keep_states)))
                if alone:
                    text.drafter.timed(draft, (time.perf_counter() - started) * 1000)
            except Exception as error:
                found.append((text, error))
        return found

    def step_apart(self) -> list[tuple[Text, Round | Exception]]:
        """`step` after one that failed: each text by itself and, since its draft may be half made, without drafts to its end."""
        found: list[tuple[Text, Round | Exception]] = []
        for text in self.ready:
            text.drafter = NoDrafter()
            try:
                found += self.step([text])
            except Exception as error:
                found.append((text, error))
        return found


def _verify(engine: Engine, texts: Sequence[Text], drafts: list[Draft]) -> list[Verified]:
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


def _decide(engine: Engine, texts: Sequence[Text], drafts: list[Draft], every: list[list[Tensor]]) -> list[Verified]:
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
