"""How an EAGLE head's agreement with the backbone grows with the tokens it has seen, by source of the text.

    python benchmarks/agreement_by_source.py BUNDLE ... --dataset-name prompts.jsonl --max-documents N --picture FILE

Each bundle is one point of the curves: the `last/` folders that a training run leaves at its evaluations, copied aside. The
text is the held-out `eval` part of the data set, split as training with the same settings splits it. Agreement is counted on
answer positions; the lines have every draft position, table and picture the first.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.bundle.files import EAGLE_FILE, RECORD_FILE, record_json
from early_exit_cli.config import BackboneConfig, DataConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.load import load_documents
from early_exit_cli.data.packing import apart, pack
from early_exit_cli.heads.eagle import EagleHead, load_eagle
from early_exit_cli.hidden_states.live import run_states
from early_exit_cli.hidden_states.states import States

STEPS = 3


def agreement(head: EagleHead, texts: list[States], choices: list[torch.Tensor]) -> tuple[list[int], list[int]]:
    """(agreements, positions) per draft position."""
    hits, totals = [0] * STEPS, [0] * STEPS
    for states, chosen in zip(texts, choices, strict=True):
        for step, said in enumerate(head(states, STEPS, only_measured=True)):
            hits[step] += int((head.token_ids(said.logits.argmax(-1)) == chosen[said.positions]).sum())
            totals[step] += said.positions.numel()
    return hits, totals


def choices_of(backbone: Backbone, text: States) -> torch.Tensor:
    """The backbone's at the positions that count, [positions] int64; -1 elsewhere."""
    choices = torch.full(text.measured.shape, -1)
    choices[text.measured] = F.linear(text.final[text.measured], backbone.lm_head_weight).argmax(-1)
    return choices


def draw(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        style = {"color": "black", "linewidth": 2.5} if name == "all" else {"linewidth": 1.2}
        axes.plot(
            [seen / 1e6 for seen, _ in points], [100 * share for _, share in points], marker=".", label=name, **style
        )
    axes.set_xlabel("million tokens seen in training")
    axes.set_ylabel("first draft token agrees, % of held-out answer positions")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--dataset-name", required=True)
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--holdout", type=float, default=0.06)
    parser.add_argument("--sampled-share", type=float, default=0.15)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=384)
    parser.add_argument(
        "--seen", type=int, nargs="+", help="tokens seen by each, where its record does not say all of them"
    )
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    settings = {
        key: getattr(options, key)
        for key in (
            "dataset_name",
            "max_documents",
            "holdout",
            "sampled_share",
            "answer_tokens",
            "max_length",
            "prompt_tokens",
        )
    }
    data = DataConfig(on_policy=True, **settings)
    backbone = load_backbone(BackboneConfig())
    by_source: dict[str, list[Document]] = defaultdict(list)
    for document in load_documents(data, backbone, "eval"):
        by_source[document.source].append(document)

    records = [record_json(folder / RECORD_FILE) for folder in options.bundles]
    exit_layers = records[0]["eagle"]["exit_layers"]
    states: dict[str, list[States]] = {}
    choices: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for source, documents in sorted(by_source.items()):
            rows = pack(documents, data.max_length, backbone.pad_token_id)
            states[source] = [run_states(backbone, batch, exit_layers) for batch in apart(rows, 2 * data.max_length)]
            choices[source] = [choices_of(backbone, text) for text in states[source]]
        curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
        tokens = options.seen or [record["eagle"]["training"]["tokens_seen"] for record in records]
        for folder, seen in zip(options.bundles, tokens, strict=True):
            head = load_eagle(folder / EAGLE_FILE, backbone, exit_layers)
            found = {source: agreement(head, states[source], choices[source]) for source in states}
            found["all"] = tuple(
                [sum(column) for column in zip(*(f[part] for f in found.values()), strict=True)] for part in (0, 1)
            )
            shares = {name: [h / max(t, 1) for h, t in zip(*f, strict=True)] for name, f in found.items()}
            for name, share in shares.items():
                curves[name].append((seen, share[0]))
            print(json.dumps({"bundle": str(folder), "tokens_seen": seen, "agreement": shares}))
    print("\nsource".ljust(26), "positions", *(f"{seen / 1e6:.2f} M" for seen, _ in curves["all"]), sep="\t")
    for name, points in sorted(curves.items(), key=lambda item: item[0] == "all"):
        count = sum(found[name][1][:1])
        print(name.ljust(25), count, *(f"{100 * share:.1f}" for _, share in points), sep="\t")
    if options.picture:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
