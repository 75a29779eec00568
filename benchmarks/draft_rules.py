"""Plays drafting rules over recorded text with this device's cost table: what they are worth, without the noise of a clock.

    python benchmarks/draft_rules.py prompts.jsonl --limit 160 --max-tokens 128

Each prompt is answered once, greedily; at every position of the answer the EAGLE head rolls out, and what it says is kept.
Then every rule drafts and is told what the text says next, as in decoding, and its passes, readings and steps are added up.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import BackboneConfig, BundleConfig, DataConfig
from early_exit_cli.data.rows import read_records
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request, accepted_length
from early_exit_cli.drafting.choose import auto_drafter, eagle_drafter, lookup_drafter
from early_exit_cli.drafting.costs import Costs, cost_table, pass_costs
from early_exit_cli.drafting.drafter import Drafter, NoDrafter
from early_exit_cli.drafting.eagle import EagleDrafter
from early_exit_cli.engine import DEFAULT_WIDTH, Engine
from early_exit_cli.heads.native_eagle import eagle_runner

STEPS = DEFAULT_WIDTH - 1


@dataclass
class Recorded:
    """An answered prompt, and for every token of the answer what the head said before it: (token, entropy) of each step."""

    source: str
    prompt: list[int]
    answer: list[int]
    said: list[list[tuple[int, float]]]


class Replay:
    """Stands for a head's runner at `place` of a recorded answer, and counts what is asked of it."""

    def __init__(self) -> None:
        self.said: list[list[tuple[int, float]]] = []
        self.place = self.ahead = self.reads = self.steps = 0

    def reset(self) -> None:
        pass

    def read(self, *_: object) -> None:
        self.ahead, self.reads = 0, self.reads + 1

    def step(self, *_: object) -> None:
        self.ahead, self.steps = self.ahead + 1, self.steps + 1

    def choose(self, *_: object) -> tuple[int, float]:
        return self.said[self.place][self.ahead]


def record(engine: Engine, source: str, prompt: list[int], max_tokens: int) -> Recorded:
    """Answer a prompt and roll out everywhere."""
    assert engine.eagle is not None
    answer = generate(engine, Request(prompt, max_tokens), NoDrafter(), mode="full").token_ids
    text, layers = prompt + answer, engine.eagle.exit_layers
    parts: list[list[Tensor]] = []
    with torch.inference_mode():
        engine.prefill(text, 0, layers, lambda _, states: parts.append(states))
        states = [torch.cat(part) for part in zip(*parts, strict=True)]
        runner, said, read = eagle_runner(engine.eagle), [], 0
        for place in range(len(prompt), len(text)):
            hidden = runner.read(text[read + 1 : place], [state[read : place - 1] for state in states])
            read = place - 1
            found = [runner.choose(hidden)]
            while len(found) < STEPS:
                hidden = runner.step(found[-1][0], hidden, len(found))
                found.append(runner.choose(hidden))
            said.append(found)
    return Recorded(source, prompt, answer, said)


def play(engine: Engine, costs: Costs, drafter: Drafter, replay: Replay, text: Recorded) -> tuple[float, int, int, int]:
    """One text: milliseconds, rounds, tokens drafted and accepted."""
    pass_cost = pass_costs(costs, engine.blocks)
    replay.said, replay.reads, replay.steps = text.said, 0, 0
    drafter.bind(engine)
    drafter.begin(text.prompt)
    unseen = [torch.empty(0)] * (len(drafter.exit_layers) + 1)
    if drafter.exit_layers:
        drafter.process(text.prompt[1:], unseen)
    cache, pending = engine.blocks.new_cache(1), text.prompt[-1]
    place = rounds = drafted = accepted = 0
    milliseconds = 0.0
    while place < len(text.answer):
        replay.place = place
        left = len(text.answer) - place
        draft = drafter.draft(engine, cache, pending, min(STEPS, left - 1), ())
        right = accepted_length(draft.tokens, text.answer[place:])
        tokens = text.answer[place : place + right + 1]
        drafter.accept(draft, tokens, right)
        if drafter.exit_layers:
            drafter.process(tokens, unseen)
        milliseconds += pass_cost(1 + len(draft.tokens))
        place, pending, rounds = place + len(tokens), tokens[-1], rounds + 1
        drafted, accepted = drafted + len(draft.tokens), accepted + right
    spent = replay.reads * costs.eagle_read + replay.steps * costs.eagle_step
    return milliseconds + spent, rounds, drafted, accepted


def with_replay(drafter: Drafter, replay: Replay) -> None:
    """From now on the rule is told what was recorded."""
    for part in [drafter, *(part for part, _ in getattr(drafter, "choices", []))]:
        if isinstance(part, EagleDrafter):
            part.runner = replay  # type: ignore[assignment]


def main() -> None:
    """Records, plays, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--bundle", default=BundleConfig().bundle)
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--max-tokens", type=int, default=128)
    options = parser.parse_args()
    engine = load_engine(BackboneConfig(), BundleConfig(bundle=options.bundle))
    rows = read_records(DataConfig(dataset_name=str(options.prompts)))[: options.limit]
    texts = [
        record(engine, row["source"], engine.backbone.encode_prompt(row["text"]), options.max_tokens) for row in rows
    ]
    costs, replay = cost_table(engine), Replay()
    plain = pass_costs(costs, engine.blocks)(1)
    for drafter in (lookup_drafter(engine), eagle_drafter(engine), auto_drafter(engine, 0.9, DEFAULT_WIDTH, "auto")):
        with_replay(drafter, replay)
        by_source: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        totals = [0.0] * 4
        for text in texts:
            found = play(engine, costs, drafter, replay, text)
            totals = [total + value for total, value in zip(totals, found, strict=True)]
            by_source[text.source][0] += found[0]
            by_source[text.source][1] += plain * len(text.answer)
        tokens = sum(len(text.answer) for text in texts)
        milliseconds, rounds, drafted, accepted = totals
        print(
            f"{drafter.name}: {tokens * plain / milliseconds:.2f}x plain, {tokens / rounds:.2f} tokens a pass, "
            f"{accepted / max(drafted, 1):.0%} of {drafted:.0f} drafted tokens accepted"
        )
        print("  " + ", ".join(f"{name} {base / own:.2f}x" for name, (own, base) in sorted(by_source.items())))


if __name__ == "__main__":
    main()
