"""`eexit evaluate`: resolve, load model and held-out text, score, explain, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from early_exit_cli.cli.options import configured
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.files.atomic import write_json
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.evaluation.acceptance import Acceptance
    from early_exit_cli.evaluation.agreement import Evaluation


@configured(
    *("bundle", "backbone", "data", "evaluation"),
    without=("backbone.assistant",),
    examples=(
        "eexit evaluate --bundle runs/heads",
        "eexit evaluate --bundle runs/heads --dataset-name other.jsonl --output-path evaluation.json",
    ),
)
def command(resolved: Resolved, as_json: bool) -> None:
    """Measure each head against the text and against the backbone, and say why drafts are not accepted."""
    load_libraries()
    from early_exit_cli.bundle.load import bundle_source, load_engine
    from early_exit_cli.cli.shared import backbone_of_bundle, data_of_bundle, dataset_label, held_out_text
    from early_exit_cli.evaluation.agreement import evaluate

    config = resolved.config
    source = bundle_source(config.bundle)
    reading = data_of_bundle(resolved, source.folder)
    engine = load_engine(backbone_of_bundle(resolved), config.bundle)
    if engine.thresholds is not None:
        engine.thresholds.at(config.evaluation.accuracy_level)  # refuse an uncalibrated level before the heads read
    (text,) = held_out_text(reading, engine, ["eval"], config.evaluation.num_samples)
    with console.progress("evaluating", text.sequences) as ticker:
        result = evaluate(engine, text.batches, text.sources, config.evaluation.accuracy_level, ticker.update)
    record = {
        **result.record(),
        "dataset": dataset_label(reading.config),
        "bundle": source.record(),
    }
    if config.evaluation.output_path:
        write_json(config.evaluation.output_path, record)
    if as_json:
        console.emit_json(record)
        return
    print_scores(result, engine.blocks.num_blocks)
    print_groups(result)
    if result.acceptance is None:
        console.note("not calibrated, so no drafts to follow: eexit calibrate")
    else:
        print_acceptance(result.acceptance)


def print_scores(result: Evaluation, depth: int) -> None:
    """Heads and backbone against the text and against each other."""
    rows = [
        (
            f"head {score.head_idx}",
            score.exit_layer,
            f"{score.accuracy_vs_lm_head:.1%}",
            f"{score.top5_accuracy_vs_lm_head:.1%}",
            f"{score.accuracy:.1%}",
            f"{score.top5_accuracy:.1%}",
        )
        for score in result.auxiliary_heads
    ]
    main = result.main_head
    rows.append(("backbone", depth, "100.0%", "100.0%", f"{main['accuracy']:.1%}", f"{main['top5_accuracy']:.1%}"))
    console.table(
        f"{result.model_name}: {result.num_samples} sequences, {result.total_tokens:,} tokens",
        ["", "blocks run", "agreement", "backbone's in top 5", "accuracy on text", "text in top 5"],
        rows,
        result=True,
    )


def print_groups(result: Evaluation) -> None:
    """Agreement by position, frequency and source."""
    titles = {
        "position": "token of the answer",
        "frequency": "the backbone's choice, of all its choices here",
        "source": "source",
    }
    for title, groups in result.agreement_by.items():
        console.table(
            f"agreement by {title}",
            [titles[title], "tokens", *(f"head {score.head_idx}" for score in result.auxiliary_heads)],
            [(found.name, f"{found.tokens:,}", *(f"{share:.1%}" for share in found.agreement)) for found in groups],
            result=True,
        )


def print_acceptance(found: Acceptance) -> None:
    """What became of the tokens asked for."""
    from early_exit_cli.evaluation.acceptance import REASONS

    record = found.record()
    rate = record["acceptance_rate"]
    accepted = "" if rate is None else f", {rate:.1%} of them accepted"
    console.table(
        f"drafts at level {found.level:.2f}: {found.drafted:,} tokens{accepted}; accept length {record['accept_length']:.2f}",
        ["what became of the tokens asked for", "tokens", "share", "meaning"],
        [
            (reason, f"{found.counts[reason]:,}", f"{share:.1%}", REASONS[reason])
            for reason, share in record["shares"].items()
        ],
        result=True,
    )
