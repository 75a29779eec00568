"""`eexit evaluate`: resolve, load model and held-out text, score, report."""

from __future__ import annotations

from early_exit_cli import console
from early_exit_cli.artifacts import write_json
from early_exit_cli.cli.options import configured
from early_exit_cli.resolve import Resolved


@configured("bundle", "backbone", "data", "evaluation")
def command(resolved: Resolved, as_json: bool) -> None:
    """Measure each head against the text and against the backbone."""
    from early_exit_cli.cli.shared import backbone_of_bundle, dataset_label, held_out_batches
    from early_exit_cli.engine import bundle_source, load_model
    from early_exit_cli.evaluation import evaluate

    config = resolved.config
    model = load_model(backbone_of_bundle(resolved), config.bundle, with_thresholds=False)
    batches, data = held_out_batches(resolved, model, "calibrate", config.evaluation.num_samples)
    with console.progress("evaluating", sum(batch.input_ids.shape[0] for batch in batches)) as ticker:
        result = evaluate(model, batches, ticker.update)
    record = {
        **result.record(),
        "dataset": dataset_label(data),
        "bundle": bundle_source(config.bundle).record(),
    }
    if config.evaluation.output_path:
        write_json(config.evaluation.output_path, record)
    if as_json:
        console.emit_json(record)
        return
    depth = model.blocks.num_blocks
    rows = [
        (
            f"head {score.head_idx}",
            score.layer_idx + 1,
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
