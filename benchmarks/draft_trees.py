"""Counts what trees of drafts would be worth over recorded text, by costs that are given: those of another machine too.

    python benchmarks/draft_trees.py prompts.jsonl --limit 120 --passes 1:2.6 8:2.7 16:3.3 --read 0.11 --step 0.11

Each prompt is answered once, greedily. At every position of the answer the EAGLE head rolls forward along it, and the rank that it gave
each token is kept: a tree of ranks accepts the longest path that the text takes. Trees of the most probable nodes are fitted on one half
of the texts and looked at on the other, one tree for each eighth of the first token's entropies. With one branch they are chains.
"""

import argparse
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from early_exit_cli.bundle.load import load_engine
from early_exit_cli.config import BackboneConfig, BundleConfig, DataConfig
from early_exit_cli.data.rows import read_records
from early_exit_cli.decoding.answer import generate
from early_exit_cli.decoding.text import Request
from early_exit_cli.drafting.drafter import NoDrafter
from early_exit_cli.engine import Engine
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.heads.uncertainty import entropy

DEPTH, RANKS, MOST_NODES, BINS = 7, 4, 15, 8
Node = tuple[int, ...]
"""The ranks on the way to a drafted token."""
Tree = Sequence[Node]


class Place(NamedTuple):
    """A position of an answer: the first token's entropy in nats, and the ranks of the text's tokens up to the first beyond RANKS."""

    entropy: float
    ranks: Node


@dataclass(frozen=True)
class Times:
    """Milliseconds of passes by their rows, of reading the head, and of a step of all branches together."""

    passes: list[tuple[int, float]]
    read: float
    step: float

    def of_pass(self, rows: int) -> float:
        """Between the given numbers of rows on a line."""
        for (less, faster), (more, slower) in pairwise(self.passes):
            if rows <= more:
                return faster + (slower - faster) * (rows - less) / (more - less)
        raise ValueError(f"no pass of {rows} rows is known")

    def of(self, tree: Tree) -> float:
        """A round with this tree, the head read."""
        steps = max(map(len, tree), default=1) - 1
        return self.of_pass(len(tree) + 1) + self.read + steps * self.step


def record(engine: Engine, prompt: list[int], max_tokens: int) -> list[Place]:
    """Answer a prompt and roll along the answer from everywhere."""
    head = engine.eagle
    assert head is not None
    text = prompt + generate(engine, Request(prompt, max_tokens), NoDrafter(), mode="full").token_ids
    parts: list[list[Tensor]] = []
    runner, places, read = EagleRunner(head), [], 0
    with torch.inference_mode():
        engine.prefill(text, 0, head.exit_layers, lambda _, states: parts.append(states))
        states = [torch.cat(part) for part in zip(*parts, strict=True)]
        for place in range(len(prompt), len(text)):
            hidden = runner.read(text[read + 1 : place], [state[read : place - 1] for state in states])
            read, ranks, first = place - 1, [], 0.0
            for ahead, token in enumerate(text[place : place + DEPTH]):
                logits = runner.lm_head(head.said(hidden))
                first = first if ahead else float(entropy(logits))
                best = head.token_ids(logits[0].topk(RANKS).indices).tolist()
                if token not in best:
                    break
                ranks.append(best.index(token))
                hidden = runner.step(token, hidden, ahead + 1)
            places.append(Place(first, tuple(ranks)))
    return places


def trees_of(places: list[Place], branches: int) -> list[Tree]:
    """The most probable nodes of each number and depth."""
    counts = Counter(place.ranks[:end] for place in places for end in range(1, len(place.ranks) + 1))
    nodes = [node for node, _ in counts.most_common() if max(node) < branches]
    by_depth = [[node for node in nodes if len(node) <= depth] for depth in range(1, DEPTH + 1)]
    return [[], *(found[:count] for found in by_depth for count in range(1, MOST_NODES + 1))]


def committed(tree: Tree, places: list[Place]) -> int:
    """Tokens that rounds with this tree commit, one at each place, the backbone's own among them."""
    known = set(tree)
    return sum(1 + sum(place.ranks[:end] in known for end in range(1, len(place.ranks) + 1)) for place in places)


def gain(fitted: list[Place], tried: list[Place], branches: int, times: Times) -> tuple[float, float]:
    """Over plain decoding on `tried`, and tokens a pass: a tree for each bin of entropies, the best rate over all of them."""
    known = sorted(place.entropy for place in fitted)
    edges = [known[len(known) * number // BINS] for number in range(1, BINS)]
    bins = [
        [[place for place in places if bisect(edges, place.entropy) == number] for number in range(BINS)]
        for places in (fitted, tried)
    ]
    choices = [[(committed(tree, own), tree) for tree in trees_of(own, branches)] for own in bins[0]]
    rate = 0.0
    for _ in range(8):  # Dinkelbach's way to the largest ratio of sums
        chosen = [
            max(found, key=lambda one, own=own: one[0] - rate * len(own) * times.of(one[1]))
            for found, own in zip(choices, bins[0], strict=True)
        ]
        spent = sum(len(own) * times.of(tree) for (_, tree), own in zip(chosen, bins[0], strict=True))
        rate = sum(tokens for tokens, _ in chosen) / spent
    tokens = sum(committed(tree, own) for (_, tree), own in zip(chosen, bins[1], strict=True))
    spent = sum(len(own) * times.of(tree) for (_, tree), own in zip(chosen, bins[1], strict=True))
    return tokens / spent * times.of_pass(1), tokens / len(tried)


def main() -> None:
    """Records, fits, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--bundle", default=BundleConfig().bundle)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument(
        "--passes", nargs="+", default=["1:2.6", "8:2.7", "16:3.3"], help="ROWS:MILLISECONDS, ascending"
    )
    parser.add_argument("--read", type=float, default=0.11)
    parser.add_argument("--step", type=float, default=0.11)
    options = parser.parse_args()
    passes = [(int(rows), float(time)) for rows, time in (entry.split(":") for entry in options.passes)]
    times = Times(passes, options.read, options.step)
    engine = load_engine(BackboneConfig(), BundleConfig(bundle=options.bundle))
    rows = read_records(DataConfig(dataset_name=str(options.prompts)))[: options.limit]
    texts = [record(engine, engine.backbone.encode_prompt(row["text"]), options.max_tokens) for row in rows]
    fitted, tried = ([place for text in texts[first::2] for place in text] for first in (0, 1))
    print(f"fitted on {len(fitted):,} positions, looked at on {len(tried):,}")
    for branches in range(1, RANKS + 1):
        ratio, tokens = gain(fitted, tried, branches, times)
        print(f"branches {branches}: {ratio:.3f}x plain, {tokens:.2f} tokens a pass")


if __name__ == "__main__":
    main()
