"""What `eexit infer` shows: answers in the drafters' colours, statistics, tables, and the page of `--html`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from early_exit_cli.errors import EexitError
from early_exit_cli.files.atomic import write_text
from early_exit_cli.files.environment import versions
from early_exit_cli.report import console
from early_exit_cli.report.answer_text import AnswerWriter
from early_exit_cli.report.html_page import render_page
from early_exit_cli.report.numbers import ENDS, rate, share, verdict
from early_exit_cli.report.palette import decider_of

if TYPE_CHECKING:
    from early_exit_cli.decoding.answer import Generation, Stats
    from early_exit_cli.engine import Engine
    from early_exit_cli.evaluation.compare import Comparison
    from early_exit_cli.evaluation.comprehensive import MethodRun


def finished_answer(engine: Engine, run: Generation, coloured: bool) -> None:
    """An answer that was not streamed."""
    from early_exit_cli.decoding.records import round_records

    writer = AnswerWriter(coloured)
    for step in round_records(engine, run, 0):
        for token in step["tokens"]:
            writer.write(token["text"], decider_of(token))
    writer.end()


def legend(stats: Stats, coloured: bool) -> None:
    """Tokens by drafter, those that drafted any; the backbone's last."""
    backbone_last = sorted(stats.exit_distribution.items(), key=lambda item: item[0] == "full")
    console.legend({decider_name(name): count for name, count in backbone_last if count}, coloured)


def decider_name(counted: str) -> str:
    """A key of the exit distribution as people read it."""
    return "backbone" if counted == "full" else f"head {counted}" if counted.isdigit() else counted


def exits_drafted(stats: Stats) -> bool:
    """Whether exit heads drafted any of the tokens: only then does an average exit layer say anything."""
    return any(count for name, count in stats.exit_distribution.items() if name.isdigit())


def stats_rows(run: Generation, with_exits: bool | None = None) -> list[tuple[str, str]]:
    """Statistics of one answer for a person.

    Args:
        with_exits: show the average exit layer; by default where exit heads drafted.
    """
    stats = run.stats
    rows = [
        ("tokens", str(stats.total_tokens_generated)),
        ("ended", ENDS[run.finish_reason]),
        ("tokens/s, whole answer", rate(stats.tokens_per_second)),
        ("prompt tokens", f"{stats.prompt_tokens:,}"),
        ("first token", f"{stats.time_to_first_token_seconds * 1000:,.0f} ms"),
        ("prefill tokens/s", rate(stats.prefill_tokens_per_second)),
        ("decode tokens/s", rate(stats.decode_tokens_per_second)),
        ("accept length", f"{stats.accept_length:.2f}"),
        ("drafted", str(stats.tokens_drafted)),
        ("accepted", f"{stats.tokens_accepted} ({share(stats.acceptance_rate)})" if stats.tokens_drafted else "-"),
    ]
    if exits_drafted(stats) if with_exits is None else with_exits:
        rows.append(("average exit layer", f"{stats.average_exit_layer:.1f}"))
    if stats.peak_gpu_memory_gb is not None:
        rows.append(("peak GPU memory", f"{stats.peak_gpu_memory_gb:.1f} GB"))
    return rows


def comparison(result: Comparison, title: str, repeats: int) -> None:
    """Two methods in a table, and the verdict."""
    with_exits = exits_drafted(result.drafted.stats)
    full, drafted = (dict(stats_rows(run, with_exits)) for run in (result.full, result.drafted))
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
        drafted = (f"{decider_name(key)} {count}" for key, count in stats.exit_distribution.items() if count)
        rows.append(
            (
                name,
                f"{stats.tokens_per_second:.1f}",
                f"{result.speedup:.2f}x",
                stats.tokens_drafted,
                stats.tokens_accepted,
                share(stats.acceptance_rate),
                f"{stats.average_exit_layer:.1f}" if exits_drafted(stats) else "-",
                verdict(result.identical, result.bit_exact),
                ", ".join(drafted),
            )
        )
    console.table(title, columns, rows)
    console.note(f"median of {repeats} repeats, methods in turns")


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
