"""What a pass costs on this device, and which heads are worth reading.

Early exit earns what it skips and costs what it reads. Both differ between machines, so the costs are measured where the
model runs, and combined with how often each head exits and how often it is right, which calibration has counted for every
set of heads. The set with the highest expected tokens per second is read; where even the best set is below plain
decoding, nothing is drafted.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, Strict
from torch import Tensor

from early_exit_cli.drafting.eagle import runner_of
from early_exit_cli.engine import Engine, OwnHead
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import keep_json
from early_exit_cli.files.forms import Form
from early_exit_cli.files.kept import MADE_FROM
from early_exit_cli.files.schemas import read_form
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_runner import ExitRunner
from early_exit_cli.heads.head_runner import HeadRunner
from early_exit_cli.numerics import synchronize
from early_exit_cli.runtime.blocks import Blocks
from early_exit_cli.runtime.measurements import device_identity, measurement_path
from early_exit_cli.steps import step

REPEATS = 4
PROTOCOL = 8
"""Of the measurement: costs that were measured in another way are not taken."""
TRIES, AGREED = 3, 0.1
PATIENCE = 5.0
"""Seconds after which nothing is repeated, since somebody waits for an answer: of a large model, or on a busy machine, few runs
have to do until the next occasion."""
OCCASIONS, APART = 3, 600.0
"""A table is made on so many occasions at most, so many seconds apart: a busy hour that slowed one measurement evenly does
not make drafting idle for ever."""
STARTED = time.time()
"""Of this process, nearly: it measures when it begins, never in the middle of a conversation."""
CONTEXT = 256
SAMPLE_TEXT = "The history of the lighthouse is the history of trade by sea, and of those who waited for it. "
Call = Callable[[], Any]
Key = TypeVar("Key")


Width = Annotated[int, Strict(False)]  # a key of a JSON object is text
Cost = Annotated[float, Field(gt=0.0)]


class Costs(Form, extra="forbid"):
    """Milliseconds on this device, by width: one block over CONTEXT keys, final norm and LM head;
    for reading one head of one row; and of the EAGLE head and the model's own drafter (`mtp`), for reading what a pass
    verified and for a step of its own, each with its choice. All is timed where it runs: the finish after the blocks, whose
    weights have driven the LM head's out of the caches, reading right after a pass, a step after reading, which has brought
    the head's weights into them.

    error: how far two measurements lay apart, as a share of a pass: what is expected to pay by less may not.
    """

    per_block: dict[Width, Cost]
    finish: dict[Width, Cost]
    head: float = Field(ge=0.0)
    eagle_read: float = Field(ge=0.0)
    eagle_step: float = Field(ge=0.0)
    mtp_read: float = Field(ge=0.0, default=0.0)
    mtp_step: float = Field(ge=0.0, default=0.0)
    error: float = Field(default=0.0, ge=0.0)

    @property
    def widths(self) -> set[int]:
        """Those that both tables have."""
        return {*self.per_block} & {*self.finish}

    def plain(self, num_blocks: int, width: int) -> float:
        """A pass through the whole backbone."""
        return self.per_block[width] * num_blocks + self.finish[width]

    def least(self, other: Costs) -> Costs:
        """The smaller of each figure: whatever else a machine does only adds."""

        def smaller(mine: Any, theirs: Any) -> Any:
            if isinstance(mine, dict):
                return {width: smaller(cost, theirs[width]) for width, cost in mine.items()}
            return min(mine, theirs)

        return Costs(**{name: smaller(getattr(self, name), getattr(other, name)) for name in Costs.model_fields})


class CostsForm(Form):
    """What is kept of a measurement. measured: seconds since the epoch, one for each occasion."""

    costs: Costs
    measured: list[float] = Field(default=[0.0], min_length=1)


def cost_table(engine: Engine, *, refresh: bool = False) -> Costs:
    """The costs of the invariant widths, and of width 1 for comparison; measured on a device on a few occasions
    (OCCASIONS), then remembered.

    Args:
        refresh: forget what was measured before.
    """
    heads = engine.heads
    identity = {
        **device_identity(engine.blocks),
        "protocol": PROTOCOL,
        "heads": heads
        and [heads.kind, len(heads), heads.rank, 0 if heads.draft_vocab is None else len(heads.draft_vocab)],
        "eagle": engine.eagle and _shape_of(engine.eagle),
    } | ({"mtp": engine.mtp.identity or True} if engine.mtp else {})
    path = measurement_path("costs", identity)
    widths = sorted({1, *engine.blocks.widths})
    earlier: CostsForm | None = None
    if not refresh:
        with contextlib.suppress(BundleError):  # nothing there, or damaged: measured again
            found = read_form(path, CostsForm)
            if {*widths} <= found.costs.widths:
                earlier = found
    measured = [] if earlier is None else earlier.measured
    if earlier is not None and (len(measured) >= OCCASIONS or STARTED - max(measured) < APART):
        return earlier.costs
    with step("measuring what a pass costs here"):
        costs = quietest(lambda: measure_costs(engine, widths))
    kept = CostsForm(costs=costs if earlier is None else costs.least(earlier.costs), measured=[*measured, time.time()])
    keep_json(path, {MADE_FROM: engine.backbone.name, **kept.model_dump(), **identity})
    return kept.costs


def plain_pass_seconds(engine: Engine) -> float:
    """A pass of plain decoding on this device."""
    return cost_table(engine).plain(engine.blocks.num_blocks, min(engine.blocks.widths)) / 1000


def _shape_of(head: EagleHead) -> list[Any]:
    """What an EAGLE head's costs depend on besides the backbone."""
    shape: list[Any] = list(head.lm_head_weight.shape)
    return shape if head.is_ours else [*shape, len(head.exit_layers), head.layout.model_dump()]


def quietest(measure: Callable[[], Costs]) -> Costs:
    """The measurement that was disturbed the least, of up to TRIES within PATIENCE: the first one whose halves agree is enough."""
    started = time.perf_counter()
    found = measure()
    for _ in range(TRIES - 1):
        if found.error <= AGREED or time.perf_counter() - started > PATIENCE:
            break
        found = min(found, measure(), key=lambda costs: costs.error)
    return found


def measure_costs(engine: Engine, widths: list[int]) -> Costs:
    """Milliseconds of each part on this device: the fastest of two measurements (`fastest_in_turns`), and how far they lay
    apart."""
    blocks = engine.blocks
    cache = blocks.new_cache(min(CONTEXT, engine.backbone.context_length))
    words = engine.backbone.tokenizer(SAMPLE_TEXT)["input_ids"]
    ids = torch.tensor((words * CONTEXT)[: cache.limit], device=engine.backbone.device)
    place = cache.limit - max(widths)

    def run(width: int) -> Tensor:
        return blocks.run(blocks.embed(ids[place : place + width]), cache, place, 0, blocks.num_blocks)

    def a_pass() -> None:
        blocks.finish(run(min(widths)))

    calls: dict[tuple[str, int], tuple[Call, Call]] = {}
    with torch.inference_mode():  # states of real text: what the exact argmax takes depends on them
        states = blocks.run(blocks.embed(ids[:place]), cache, 0, 0, blocks.num_blocks)
        cache.length = place
        last = run(max(widths))
        for width in widths:
            calls["blocks", width] = (lambda: None, functools.partial(run, width))
            calls["finish", width] = (lambda: None, functools.partial(blocks.finish, last[:width]))  # right after them
        if engine.heads is not None:
            calls["head", 1] = (a_pass, _head_call(engine.exit_runner.fork(), states))
        chains = {}
        for name, head in (("eagle", engine.eagle), ("mtp", engine.mtp)):
            if head is not None:
                runner = runner_of(head)
                runner.follow(cache)
                read, step, chains[name] = _rolled_calls(runner, _no_states(engine, head, cache.limit))
                calls[f"{name} read", 1] = (a_pass, read)
                calls[f"{name} step", 1] = (a_pass if chains[name] else _both(a_pass, read), step)
        first, second = (fastest_in_turns(calls, engine.backbone.device) for _ in range(2))
        times = {key: min(first[key], second[key]) for key in calls}
        a_whole_pass = times["blocks", min(widths)]
        error = max(abs(first[key] - second[key]) / max(times[key], a_whole_pass) for key in calls)
        for name, chained in chains.items():
            if chained:
                steps = times[f"{name} step", 1] - times[f"{name} read", 1]
                times[f"{name} step", 1] = max(steps, 0.0) / chained

    def table(kind: str, parts: int) -> dict[int, float]:
        return never_falling({width: times[kind, width] / parts for width in widths})

    return Costs(
        per_block=table("blocks", blocks.num_blocks),
        finish=table("finish", 1),
        head=times.get(("head", 1), 0.0),
        eagle_read=times.get(("eagle read", 1), 0.0),
        eagle_step=times.get(("eagle step", 1), 0.0),
        mtp_read=times.get(("mtp read", 1), 0.0),
        mtp_step=times.get(("mtp step", 1), 0.0),
        error=error,
    )


def fastest_in_turns(calls: dict[Key, tuple[Call, Call]], device: torch.device) -> dict[Key, float]:
    """Milliseconds of calls, the fastest of some runs each, since whatever else the machine does only adds.

    The runs of all calls take turns: a busy moment falls on one run of several calls, not on all runs of one. The first turn
    warms up, and counts only where it alone takes longer than half of PATIENCE: then it is the last.

    Args:
        calls: for each, what comes before it untimed, and the call.
    """
    times: dict[Key, float] = {}
    began = time.perf_counter()
    for turn in range(REPEATS + 1):
        for key, (before, call) in calls.items():
            before()
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            taken = (time.perf_counter() - started) * 1000
            times[key] = min(times[key], taken) if turn > 1 else taken
        if time.perf_counter() - began > PATIENCE / 2:
            break
    return times


def never_falling(table: dict[int, float]) -> dict[int, float]:
    """Milliseconds by width, where a narrow pass costs no more than a wider one: padded, it could be that one. So a moment
    in which the machine did something else spoils one entry at most.
    """
    found: dict[int, float] = {}
    for width in sorted(table, reverse=True):
        found[width] = min(table[width], min(found.values(), default=table[width]))
    return dict(sorted(found.items()))


def _head_call(reader: ExitRunner, states: Tensor) -> Call:
    """Reading the first head over one token behind [length, hidden] states."""
    watched = reader.watched([0])
    for head in watched:
        reader.process(head, states)

    def read() -> None:
        for head in watched:
            reader.process(head, states[:1])
        reader.read(0, [states[:1]])

    return read


def _both(first: Call, then: Call) -> Call:
    return lambda: (first(), then())


def _no_states(engine: Engine, head: EagleHead | OwnHead, length: int) -> list[Tensor]:
    """Zeros in the place of what a head reads of so many positions."""
    if isinstance(head, EagleHead):
        return [head.fc.weight.new_zeros(length, head.state_size) for _ in range(len(head.exit_layers) + 1)]
    backbone = engine.backbone
    return [torch.zeros(length, backbone.hidden_size, dtype=backbone.dtype, device=backbone.device)]


def _rolled_calls(runner: HeadRunner, states: list[Tensor]) -> tuple[Call, Call, int]:
    """Reading two verified positions after those of `states`, and a step of its own; each with its choice.

    Where steps run all at once, the second call is reading and some steps, as many as the third value says.
    """
    length = len(states[0])
    tokens = [0] * length
    hidden = runner.read(tokens, states)

    def read() -> None:
        runner.rewind(length)
        runner.choose(runner.read(tokens[:2], [state[:2] for state in states]))

    def chain(count: int) -> None:
        runner.rewind(length)
        runner.chain(tokens[:2], [state[:2] for state in states], count)

    if runner.most_steps:
        return functools.partial(chain, 1), functools.partial(chain, runner.most_steps), runner.most_steps - 1
    return read, lambda: runner.choose(runner.step(0, hidden, 1)), 0


def pass_costs(costs: Costs, blocks: Blocks) -> Callable[[int], float]:
    """rows -> milliseconds of a pass of the whole backbone on this device; beyond the measured widths, as from one to the
    next of the last two."""
    *_, last = widths = blocks.widths
    before = widths[-2] if len(widths) > 1 else last

    @functools.cache
    def cost(rows: int) -> float:
        known = costs.plain(blocks.num_blocks, blocks.pass_width(rows))
        if rows <= last or blocks.batch_rows <= last:
            return known
        return known + (rows - last) * (known - costs.plain(blocks.num_blocks, before)) / (last - before)

    return cost
