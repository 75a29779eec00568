"""`eexit bench`: resolve, load one worker per method, measure in turns, report."""

from __future__ import annotations

from typing import Any

from early_exit_cli import console
from early_exit_cli.artifacts import run_record, write_json
from early_exit_cli.cli.options import configured
from early_exit_cli.resolve import Resolved


@configured("bench", "bundle", "backbone")
def command(resolved: Resolved, as_json: bool) -> None:
    """Compare methods side by side on a set of prompts."""
    from early_exit_cli.backbone import load_tokenizer
    from early_exit_cli.bench import run_bench, select_prompts, summarize
    from early_exit_cli.bench_methods import check_methods
    from early_exit_cli.cli.shared import backbone_of_bundle
    from early_exit_cli.data import read_prompts
    from early_exit_cli.errors import ConfigError

    config = resolved.config.bench
    if config.prompts is None:
        raise ConfigError("no prompts to measure on", hint="--prompts FILE.jsonl")
    check_methods(config.methods)
    prompts = select_prompts(read_prompts(config.prompts), config)
    backbone = backbone_of_bundle(resolved)
    encode = load_tokenizer(backbone)
    total = len(prompts) * len(config.methods) * config.repeats
    with console.progress("measuring", total) as ticker:
        records, costs = run_bench(config, backbone, resolved.config.bundle, prompts, encode, ticker.update)
    report = summarize(records, costs, config)
    write_json(config.output_dir / "report.json", report)
    write_json(config.output_dir / "run.json", run_record(resolved.rows()))
    if as_json:
        console.emit_json(report)
        return
    print_report(report)
    console.note(f"records and report: {config.output_dir}")


def print_report(report: dict[str, Any]) -> None:
    """The two tables: methods, then speed-ups per category."""
    environment = report["environment"]
    rows = []
    for name, figure in report["methods"].items():
        accept, first = figure["accept_length"], figure["ttft_s"]
        rows.append(
            (
                name,
                f"{figure['tokens_per_second']:.1f}",
                f"{figure['speedup_over_full']:.2f}x",
                f"{accept:.2f}" if accept else "-",
                f"{figure['identical_prompts']}/{figure['prompts']}",
                "-" if figure["bit_exact_prompts"] is None else f"{figure['bit_exact_prompts']}/{figure['prompts']}",
                f"{first * 1000:.0f} ms" if first else "-",
                f"{environment['start_up'][name]['load_s']:.1f} s",
            )
        )
    console.table(
        f"{environment['processor']}; at most {environment['max_tokens']} new tokens, {environment['repeats']} repeats",
        ["method", "tokens/s", "over full", "accept length", "same tokens", "same bits", "first token", "load"],
        rows,
        result=True,
    )
    methods = list(report["methods"])
    console.table(
        "over full, per category",
        ["category", *methods],
        [
            (category, *(f"{figures[name]['speedup_over_full']:.2f}x" for name in methods))
            for category, figures in report["categories"].items()
        ],
        result=True,
    )
