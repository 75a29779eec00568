"""How often the checkpoint's MTP layer or the assistant is right, by draft position, over held-out text.

It is rolled out as when it drafts, by the same runner, with the text's own tokens in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from early_exit_cli.calibration.head_outputs import BackboneReading, read_backbone
from early_exit_cli.calibration.held_out import STEPS, Rolled
from early_exit_cli.data.packing import Batch
from early_exit_cli.drafting.eagle import runner_of
from early_exit_cli.engine import Engine, OwnHead
from early_exit_cli.errors import DataError
from early_exit_cli.heads.head_runner import HeadRunner

ROLL_OUTS = 512
"""Positions that are rolled out from, evenly over the text."""
Outcome = tuple[float, bool]
"""Entropy (nats), and whether the backbone agreed."""


def read_mtp(
    engine: Engine, head: OwnHead, batches: Sequence[Batch], on_texts: Callable[[int], None] | None = None
) -> list[Rolled]:
    """For each draft position that the texts reach, what was said there.

    Args:
        batches: of texts that stand apart (`packing.apart`).
        on_texts: called with the number of rows that are done.

    Raises:
        DataError: not one position to read.
        NumericsError: NaN or infinite logits of the backbone.
    """
    count = sum(int(batch.measured.sum()) for batch in batches)
    runner = runner_of(head)
    found: list[list[Outcome]] = [[] for _ in range(STEPS)]
    texts = 0
    with torch.inference_mode():
        for batch in batches:
            read = read_backbone(engine, batch, [])
            _roll_out(engine, runner, read, -(-count // ROLL_OUTS), found)
            texts += len(batch.input_ids)
            if on_texts:
                on_texts(texts)
    if not found[0]:
        raise DataError(f"the calibration text holds no position to calibrate the {head.kind} on")
    parts = [tuple(zip(*outcomes, strict=True)) for outcomes in found if outcomes]
    return [(torch.tensor(entropies), torch.tensor(agreed)) for entropies, agreed in parts]


def _roll_out(
    engine: Engine, runner: HeadRunner, read: BackboneReading, stride: int, found: list[list[Outcome]]
) -> None:
    """From every `stride`-th position of a batch's texts from which an answer token is drafted."""
    final, batch = read.states.final, read.states.batch
    choices = torch.full((len(final),), -1, device=final.device).index_put((read.positions,), read.choices).tolist()
    start = 0
    for ids in (row[valid].tolist() for row, valid in zip(batch.input_ids, batch.valid, strict=True)):
        runner.rewind()
        end, done = start + len(ids), 0
        starts = [place for place in range(len(ids) - 1) if choices[start + place + 1] >= 0][::stride]
        text = engine.prefill(ids, 0) if runner.reads_keys and starts else None
        for place in starts:
            if text is not None:
                text.length = place + 1
                runner.follow(text)
            hidden = runner.read(ids[done + 1 : place + 2], [final[start + done : start + place + 1]])
            done = place + 1
            for number in range(min(STEPS, len(ids) - done)):
                wanted = choices[start + done + number]
                if wanted < 0:
                    break
                if number:
                    hidden = runner.step(ids[done + number], hidden, number)
                token, uncertainty = runner.choose(hidden)
                found[number].append((uncertainty, token == wanted))
        start = end
