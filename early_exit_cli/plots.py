"""Pictures of records. matplotlib is optional (`pip install 'eexit[plots]'`): `available` says whether it is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from early_exit_cli.artifacts import write_atomic


def available() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_bench(report: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s per method with quartiles, speed-up per category, and how accept lengths are spread over prompts."""
    from matplotlib.figure import Figure

    methods = report["methods"]
    names = list(methods)
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    accepts = {
        name: [r["accept_length"] for r in records if r["method"] == name and r["repeat"] == 0 and r["accept_length"]]
        for name in names
    }
    drafting = {name: lengths for name, lengths in accepts.items() if lengths and max(lengths) > 1}
    figure = Figure(figsize=(15 if drafting else 11, 4), layout="constrained")
    speed, ratio, *spread = figure.subplots(1, 3 if drafting else 2, width_ratios=[1, 2, 1][: 3 if drafting else 2])

    rates = [methods[name]["tokens_per_second"] for name in names]
    low = [rate - min(methods[name]["quartiles"][0], rate) for name, rate in zip(names, rates, strict=True)]
    high = [max(methods[name]["quartiles"][2], rate) - rate for name, rate in zip(names, rates, strict=True)]
    places = range(len(names) - 1, -1, -1)
    speed.barh(places, rates, xerr=[low, high], color=[colours[name] for name in names], capsize=2)
    for place, name in zip(places, names, strict=True):
        speed.text(0, place, f" {methods[name]['speedup_over_full']:.2f}x", va="center", color="white", weight="bold")
    speed.set_yticks(places, names)
    speed.set_xlabel("tokens/s (bar: quartiles of repeats; label: over full)")

    categories = report["categories"]
    wide = 0.8 / len(names)
    for index, name in enumerate(names):
        heights = [figures[name]["speedup_over_full"] for figures in categories.values()]
        ratio.bar([x + index * wide for x in range(len(categories))], heights, wide, color=colours[name], label=name)
    ratio.axhline(1, color="grey", linewidth=0.8)
    ratio.set_xticks([x + 0.4 - wide / 2 for x in range(len(categories))], list(categories), rotation=15)
    ratio.set_ylabel("speed-up over full")
    ratio.legend(fontsize="small")

    for axes in spread:
        top = max(max(lengths) for lengths in drafting.values())
        bins = [1 + (top - 1) * i / 12 for i in range(13)]
        for name, lengths in drafting.items():
            axes.hist(lengths, bins, histtype="step", linewidth=1.6, color=colours[name], label=name)
        axes.set_xlabel("accept length of a prompt")
        axes.set_ylabel("prompts")
        axes.legend(fontsize="small")

    environment = report["environment"]
    figure.suptitle(f"{environment['model']}, {environment['processor']}, batch 1, greedy", fontsize="medium")
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
