"""`eexit bench`: resolve, load one worker per method, measure in turns, report."""

from __future__ import annotations

from typing import Any

from early_exit_cli.cli.options import configured
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.config import BackboneConfig
from early_exit_cli.files.atomic import write_json
from early_exit_cli.files.environment import environment, run_record
from early_exit_cli.files.instruction_sets import instruction_set
from early_exit_cli.report import console, plots
from early_exit_cli.report.numbers import rate
from early_exit_cli.resolve import Resolved


@configured(
    *("bench", "bundle", "backbone", "sampling"),
    examples=(
        "eexit bench --prompts prompts.jsonl --limit 2 --methods full,auto,transformers",
        "eexit bench --costs",
    ),
)
def command(resolved: Resolved, as_json: bool) -> None:
    """Compare methods side by side on a set of prompts."""
    load_libraries()
    from early_exit_cli.backbone.load import load_tokenizer
    from early_exit_cli.bundle.load import bundle_source
    from early_exit_cli.cli.shared import backbone_of_bundle, is_without_heads
    from early_exit_cli.data.rows import read_prompts
    from early_exit_cli.errors import ConfigError
    from early_exit_cli.evaluation.bench import run_bench, select_prompts, summarize
    from early_exit_cli.evaluation.bench_methods import Setup, check_methods, left_out_without_heads

    config = resolved.config.bench
    if config.costs:
        show_costs(resolved, as_json)
        return
    if config.prompts is None:
        raise ConfigError("no prompts to measure on", hint="--prompts FILE.jsonl")
    sampling = resolved.config.sampling
    check_methods(config.methods, sampling)
    prompts = select_prompts(read_prompts(config.prompts), config)
    backbone, bundle, made_with = resolved.config.backbone, None, None
    if is_without_heads(resolved):
        left_out = left_out_without_heads(config.methods, backbone.model_name)
        for reason in left_out.values():
            console.note(reason)
        config = config.model_copy(update={"methods": [name for name in config.methods if name not in left_out]})
    else:
        backbone, source = backbone_of_bundle(resolved), bundle_source(resolved.config.bundle)
        bundle = resolved.config.bundle.model_copy(update={"bundle": str(source.folder)})  # one commit for all workers
        made_with = source.record()
    setup = Setup(backbone, bundle, sampling, config.accuracy_level, config.read_heads)
    encode = load_tokenizer(backbone)
    total = len(prompts) * len(config.methods) * config.repeats
    with console.progress("measuring", total) as ticker:
        records, start_up = run_bench(config, setup, prompts, encode, ticker.update)
    report = summarize(records, start_up, config, setup)
    processor = place_of(backbone)
    report["environment"] |= {"processor": processor, "bundle": made_with}
    write_json(config.output_dir / "report.json", report)
    write_json(config.output_dir / "run.json", run_record(resolved.rows(), processor, bundle=made_with))
    if plots.available():
        plots.draw_bench(report, records, config.output_dir / "bench.png")
    if as_json:
        console.emit_json(report)
        return
    print_report(report)
    console.note(f"records, report{' and picture' * plots.available()}: {config.output_dir}")
    if not plots.available():
        console.note("no picture: pip install 'eexit[plots]'")


def place_of(backbone: BackboneConfig) -> str:
    """The device, and on a CPU the instruction set that compiled passes use there."""
    from early_exit_cli.backbone.backbone import device_name
    from early_exit_cli.backbone.load import pick_device

    device = pick_device(backbone.device)
    is_compiled = device.type == "cpu" and backbone.runner in ("auto", "native")
    variant = instruction_set() if is_compiled else None
    return device_name(device) + ("" if variant is None else f", {variant.name}")


def show_costs(resolved: Resolved, as_json: bool) -> None:
    """Measure the cost table of this device, keep it, show it."""
    from early_exit_cli.bundle.load import load_engine
    from early_exit_cli.cli.shared import backbone_of_bundle, is_without_heads
    from early_exit_cli.drafting.costs import CONTEXT, cost_table

    if is_without_heads(resolved):
        engine = load_engine(resolved.config.backbone, None, with_mtp=True)
    else:
        engine = load_engine(backbone_of_bundle(resolved), resolved.config.bundle, with_thresholds=False, with_mtp=True)
    costs = cost_table(engine, refresh=True)
    if as_json:
        console.emit_json(
            {
                "costs": costs.model_dump(),
                "widths": engine.blocks.widths,
                "runner": engine.blocks.name,
                "environment": environment(engine.backbone.device_name),
            }
        )
        return
    depth = engine.blocks.num_blocks
    rows = []
    for width in costs.per_block:
        whole = costs.plain(depth, width)
        rows.append(
            (
                width,
                "yes" if width in engine.blocks.widths else "no",
                f"{whole:.2f}",
                f"{whole / costs.plain(depth, 1):.2f}x",
                f"{costs.per_block[width]:.3f}",
                f"{costs.finish[width]:.2f}",
            )
        )
    console.table(
        f"{engine.backbone.name}, {engine.backbone.quantization}; ms on {engine.backbone.device_name} "
        f"by {engine.blocks.name}; "
        f"invariant: {engine.blocks.is_invariant}; reading a head: {costs.head:.2f} ms"
        + (
            f"; the EAGLE head: {costs.eagle_read:.2f} ms for a first token, {costs.eagle_step:.2f} for a next"
            if costs.eagle_step
            else ""
        )
        + (
            f"; the {engine.mtp.kind}: {costs.mtp_read:.2f} ms for a first token, {costs.mtp_step:.2f} for a next"
            if engine.mtp is not None
            else ""
        ),
        ["width", "used", "pass", "of width 1", "one block", "norm and LM head"],
        rows,
        result=True,
    )
    console.note(f"a pass is {depth} blocks over {CONTEXT} keys, final norm and LM head (argmax)")


def print_report(report: dict[str, Any]) -> None:
    """The two tables: methods, then speed-ups per category."""
    where = report["environment"]
    temperature = where["sampling"]["temperature"]
    sampled = f", sampled at temperature {temperature:g}" if temperature else ""
    rows = []
    for name, figure in report["methods"].items():
        accept, first = figure["accept_length"], figure["ttft_s"]
        rows.append(
            (
                name,
                f"{figure['tokens_per_second']:.1f}",
                f"{figure['speedup_over_full']:.2f}x",
                rate(figure["prefill_tokens_per_second"]),
                rate(figure["decode_tokens_per_second"]),
                f"{accept:.2f}" if accept else "-",
                f"{figure['identical_prompts']}/{figure['prompts']}",
                "-" if figure["bit_exact_prompts"] is None else f"{figure['bit_exact_prompts']}/{figure['prompts']}",
                f"{first * 1000:.0f} ms" if first else "-",
                f"{where['start_up'][name]['load_s']:.1f} s",
            )
        )
    console.table(
        f"{where['processor']}; at most {where['max_tokens']} new tokens, {where['repeats']} repeats{sampled}; "
        "prefill and decode in tokens/s",
        [
            "method",
            "tokens/s",
            "over full",
            "prefill",
            "decode",
            "accept length",
            "same tokens",
            "same bits",
            "first token",
            "load",
        ],
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
    print_repeats(report)


def print_repeats(report: dict[str, Any]) -> None:
    """How much of the answers repeats itself, which flatters lookup."""
    repeats = report["repeats"]
    without = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in repeats["speedup_without"].items() if name != "full")
    console.note(
        f"{repeats['share']:.0%} of full's tokens stand in verbatim repeats of {repeats['length']} or more, in "
        f"{repeats['prompts_with']} answers" + (f"; over full on the others: {without}" if without else "")
    )
