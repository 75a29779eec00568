"""What `eexit infer` shows: answers in the drafters' colours, statistics, tables, and the page of `--html`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from early_exit_cli.errors import EexitError
from early_exit_cli.files.atomic import write_text
from early_exit_cli.files.environment import versions
from early_exit_cli.report import console
from early_exit_cli.report.html_page import render_page
from early_exit_cli.report.palette import decider_of

if TYPE_CHECKING:
    from early_exit_cli.decoding.answer import Generation, Stats
    from early_exit_cli.engine import Engine
    from early_exit_cli.evaluation.compare import Comparison
    from early_exit_cli.evaluation.comprehensive import MethodRun


def writer(coloured: bool) -> Callable[[str, str], None]:
    """What takes the pieces of an answer, and the drafter of each."""
    return console.stream_coloured if coloured else lambda piece, decider: console.stream_text(piece)


def finished_answer(engine: Engine, run: Generation, coloured: bool) -> None:
    """An answer that was not streamed."""
    from early_exit_cli.decoding.records import round_records

    if coloured:
        for step in round_records(engine, run, 0):
            for token in step["tokens"]:
                console.stream_coloured(token["text"], decider_of(token))
    else:
        console.stream_text(run.text)
    console.stream_text("\n")


def legend(stats: Stats) -> None:
    """Tokens by drafter, and the statistics in a line."""
    backbone_last = sorted(stats.exit_distribution.items(), key=lambda item: item[0] == "full")
    counts = {decider_name(name): count for name, count in backbone_last}
    line = f"{stats.total_tokens_generated} tokens, {stats.tokens_per_second:.1f} tokens/s"
    if stats.tokens_drafted:
        line += f", accept length {stats.accept_length:.2f}, {share(stats.acceptance_rate)} of drafts accepted"
    console.legend(counts, f"{line}, average exit layer {stats.average_exit_layer:.1f}")


def decider_name(counted: str) -> str:
    """A key of the exit distribution as people read it."""
    return "backbone" if counted == "full" else f"head {counted}" if counted.isdigit() else counted


def share(value: float | None) -> str:
    """A share in percent, a dash for none."""
    return "-" if value is None else f"{value:.1%}"


def distribution(stats: Stats) -> str:
    """Tokens by drafter."""
    return "  ".join(f"{decider_name(name)}: {count}" for name, count in stats.exit_distribution.items())


def stats_rows(stats: Stats) -> list[tuple[str, str]]:
    """Statistics of one answer for a person."""
    memory = [] if stats.peak_gpu_memory_gb is None else [("peak GPU memory", f"{stats.peak_gpu_memory_gb:.1f} GB")]
    return [
        ("tokens", str(stats.total_tokens_generated)),
        ("tokens/s", f"{stats.tokens_per_second:.1f}"),
        ("time to first token", f"{stats.time_to_first_token_seconds * 1000:.0f} ms"),
        ("accept length", f"{stats.accept_length:.2f}"),
        (
            "drafted, accepted",
            f"{stats.tokens_drafted}, {stats.tokens_accepted} ({share(stats.acceptance_rate)})",
        ),
        ("average exit layer", f"{stats.average_exit_layer:.1f}"),
        ("tokens by drafter", distribution(stats)),
        *memory,
    ]


def comparison(result: Comparison, title: str, repeats: int) -> None:
    """Two methods in a table, and the verdict."""
    full, drafted = dict(stats_rows(result.full.stats)), dict(stats_rows(result.drafted.stats))
    console.table(title, ["", "full", result.drafted.stats.mode], [(name, full[name], drafted[name]) for name in full])
    same = "identical" if result.identical else f"DIFFERENT from token {result.first_difference}"
    bits = "bit-exact" if result.bit_exact else "not bit-exact"
    console.note(f"{same}, {bits}; speed-up {result.speedup:.2f}x (median of {repeats} alternating repeats)")


def all_methods(results: dict[str, MethodRun], title: str, repeats: int) -> None:
    """Every method in a table."""
    columns = [
        "method",
        "tokens/s",
        "speed-up",
        "drafted",
        "accepted",
        "acceptance",
        "layer",
        "text",
        "tokens by drafter",
    ]
    rows = []
    for name, result in results.items():
        stats = result.run.stats
        same = "bit-exact" if result.bit_exact else "same" if result.identical else "DIFFERENT"
        rows.append(
            (
                name,
                f"{stats.tokens_per_second:.1f}",
                f"{result.speedup:.2f}x",
                stats.tokens_drafted,
                stats.tokens_accepted,
                share(stats.acceptance_rate),
                f"{stats.average_exit_layer:.1f}",
                same,
                "  ".join(f"{key}: {count}" for key, count in stats.exit_distribution.items()),
            )
        )
    console.table(title, columns, rows)
    console.note(
        f"median of {repeats} repeats, methods in turns; tokens by drafter: head numbers, full is the backbone"
    )


def write_page(
    path: Path,
    engine: Engine,
    prompt: str,
    prompt_tokens: int,
    shown: Generation,
    methods: dict[str, dict[str, Any]],
    accuracy_level: float | None,
) -> None:
    """The page of an answer: its rounds, and the records of all methods by name.

    Args:
        shown: the run whose tokens are drawn; its mode is a key of `methods`.
    """
    from early_exit_cli.decoding.records import round_records

    name = engine.backbone.name
    record = {
        "model": Path(name).name if Path(name).exists() else name,
        "quantization": engine.backbone.quantization,
        "num_blocks": engine.blocks.num_blocks,
        "exit_layers": engine.heads.exit_layers if engine.heads is not None else [],
        "accuracy_level": accuracy_level,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "shown": shown.stats.mode,
        "rounds": round_records(engine, shown, prompt_tokens),
        "methods": methods,
        "processor": engine.backbone.device_name,
        "version": versions()["eexit"],
    }
    try:
        write_text(path, render_page(record))
    except OSError as error:
        raise EexitError(f"cannot write the page to {path}: {error.strerror}") from error
    console.note(f"page: {path}")
