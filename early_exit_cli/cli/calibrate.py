"""`eexit calibrate`: resolve, load model and held-out text, fit thresholds, report."""

from __future__ import annotations

from early_exit_cli import console
from early_exit_cli.cli.options import configured
from early_exit_cli.errors import ConfigError
from early_exit_cli.resolve import Resolved


@configured("bundle", "backbone", "data", "calibration")
def command(resolved: Resolved, as_json: bool) -> None:
    """Fit an entropy threshold for each head and target accuracy on held-out text."""
    from early_exit_cli.calibration import calibrate, calibration_json, save_calibration
    from early_exit_cli.cli.shared import backbone_of_bundle, dataset_label, held_out_batches
    from early_exit_cli.engine import CALIBRATION_FILE, bundle_source, load_model
    from early_exit_cli.gating import level_key

    config = resolved.config
    source = bundle_source(config.bundle)
    if source.repo_id:
        raise ConfigError(
            f"calibration writes into the bundle, and {source.repo_id} is one of the Hub",
            hint=f"eexit pull {source.repo_id} --output-dir FOLDER, then eexit calibrate --bundle FOLDER",
        )
    folder = source.folder
    model = load_model(backbone_of_bundle(resolved), config.bundle, with_thresholds=False)
    batches, data = held_out_batches(resolved, model, "calibrate", config.calibration.num_samples)
    sequences = sum(batch.input_ids.shape[0] for batch in batches)
    with console.progress("calibrating", sequences) as ticker:
        result = calibrate(model, batches, config.calibration, dataset_label(data), ticker.update)
    output = config.calibration.output_path or config.bundle.calibration_path or folder / CALIBRATION_FILE
    save_calibration(result, folder, output)
    if as_json:
        console.emit_json(calibration_json(result))
        return
    for index, head in enumerate(result.heads):
        console.table(
            f"head {index}, after {head.exit_layer} of {model.blocks.num_blocks} blocks: agreement {head.agreement:.1%} "
            f"over {head.samples:,} tokens",
            ["target accuracy", "entropy threshold", "coverage", "agreement"],
            [
                (
                    key,
                    f"{cell.threshold:.4f}",
                    f"{cell.coverage:.1%}",
                    f"{cell.agreement:.1%}" if cell.agreement is not None else "never exits",
                )
                for key, cell in head.cells.items()
            ],
            result=True,
        )
    for level in config.calibration.accuracy_levels:
        missed = [str(i) for i, head in enumerate(result.heads) if not head.cells[level_key(level)].reachable]
        if missed:
            console.warn(f"level {level_key(level)} was not reached by head {', '.join(missed)}: it never exits there")
    console.note(f"written: {output}")
