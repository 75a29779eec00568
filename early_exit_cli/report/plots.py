"""Pictures of records. matplotlib is optional (`pip install 'eexit[plots]'`): `available` says whether it is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from early_exit_cli.files.atomic import write_atomic
from early_exit_cli.report.palette import BAD, GOOD, HEADS, method_colours


def available() -> bool:
    """Whether pictures can be drawn here."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_bench(report: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """Tokens/s per method with quartiles, speed-up per category, and how accept lengths are spread over prompts."""
    from matplotlib.figure import Figure

    methods = report["methods"]
    names = list(methods)
    colours = method_colours(names)
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
    for place, name, rate in zip(places, names, rates, strict=True):
        has_room = rate > 0.2 * max(rates)
        label, colour = f" {methods[name]['speedup_over_full']:.2f}x", "white" if has_room else "black"
        speed.text(0 if has_room else rate, place, label, va="center", color=colour, weight="bold")
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
    ratio.set_ylim(top=1.3 * ratio.get_ylim()[1])  # room for the legend
    ratio.legend(fontsize="small", loc="upper center", ncols=4)

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
    _save(figure, path)


def draw_calibration(calibration: dict[str, Any], folder: Path) -> list[Path]:
    """Three pictures of the calibration record of eexit.json: coverage.png, uncertainty.png, reliability.png."""
    drawings = {
        "coverage.png": _draw_coverage,
        "uncertainty.png": _draw_uncertainty,
        "reliability.png": _draw_reliability,
    }
    for name, draw in drawings.items():
        _save(draw(calibration), folder / name)
    return [folder / name for name in drawings]


def _save(figure: Any, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _named(calibration: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(colour, name, record) of each head."""
    return [
        (HEADS[index % len(HEADS)], f"head {index}, after {head['exit_layer']} blocks", head)
        for index, head in enumerate(calibration["heads"])
    ]


def _draw_coverage(calibration: dict[str, Any]) -> Any:
    """Agreement of each head against the share of tokens it decides, surest first; a mark for each level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for colour, name, head in _named(calibration):
        coverage, agreement = zip(*head["curve"], strict=True)
        axes.plot(coverage, agreement, color=colour, label=name)
        cells = [cell for cell in head["rules"]["independent"].values() if cell["agreement"] is not None]
        axes.plot(
            [cell["coverage"] for cell in cells], [cell["agreement"] for cell in cells], ".", color=colour, markersize=9
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(top=1.01)
    axes.set_xlabel("coverage: share of tokens that exit, each head alone")
    axes.set_ylabel("agreement with the backbone")
    axes.set_title("Agreement against coverage (dots: the levels, calibrated alone)", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _draw_uncertainty(calibration: dict[str, Any]) -> Any:
    """How uncertain each head is where it is right and where it is wrong."""
    from matplotlib.figure import Figure

    edges, heads = calibration["edges"], _named(calibration)
    figure = Figure(figsize=(4.2 * len(heads), 3.8), layout="constrained")
    unit = "entropy (nats)" if calibration["uncertainty_metric"] == "entropy" else "minus the highest probability"
    first = None
    for number, (_, name, head) in enumerate(heads, start=1):
        axes = figure.add_subplot(1, len(heads), number, sharey=first)
        first = first or axes
        axes.stairs(head["right"], edges, fill=True, alpha=0.45, color=GOOD.dark, label="right")
        axes.stairs(head["wrong"], edges, linewidth=1.6, color=BAD.light, label="wrong")
        axes.set_title(f"{name}: {head['agreement']:.0%} right", fontsize="medium")
        axes.set_xlabel(unit)
        if number == 1:
            axes.set_ylabel("tokens")
            axes.legend()
    return figure


def _draw_reliability(calibration: dict[str, Any]) -> Any:
    """Promised against reached on the second text, a panel for each rule; small dots: too few tokens to judge."""
    from matplotlib.figure import Figure

    rules = ["conditional", "independent"]
    heads = _named(calibration)
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, rule in zip(panels, rules, strict=True):
        for number, (colour, name, head) in enumerate(heads):
            cells = [(float(level), cell) for level, cell in head["rules"][rule].items() if cell["checked_tokens"]]
            shift = (number - (len(heads) - 1) / 2) * 0.004
            axes.scatter(
                [level + shift for level, _ in cells],
                [cell["reached"] for _, cell in cells],
                [50 if cell["checked_tokens"] > calibration["enough_tokens"] else 10 for _, cell in cells],
                color=colour,
                label=name,
            )
        ends = [min(calibration["levels"]), max(calibration["levels"])]
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.plot(
            ends,
            [end - calibration["margin"] for end in ends],
            color="grey",
            linewidth=0.8,
            linestyle="--",
        )
        kept = calibration["promises_kept"][rule]
        written = ", written" if rule == calibration["threshold_rule"] else ""
        axes.set_title(f"{rule}{written}: {kept['kept']} of {kept['of']} promises kept", fontsize="medium")
        axes.set_xlabel("promised: the level")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("reached on the second text, heads read in order")
    for handle in panels[0].legend(fontsize="small").legend_handles:
        handle.set_sizes([50])
    figure.suptitle(
        f"Solid: promised. Dashed: {calibration['margin']:g} below. "
        f"Large dots: more than {calibration['enough_tokens']:,} tokens",
        fontsize="medium",
    )
    return figure
