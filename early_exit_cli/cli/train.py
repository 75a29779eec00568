"""`eexit train`: resolve, find the states (running backbone or cache), train, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from early_exit_cli.cli.options import configured
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.config import Config
from early_exit_cli.files.atomic import write_json
from early_exit_cli.files.environment import run_record
from early_exit_cli.files.forms import to_block_numbers, to_exit_layers
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.hidden_states.cached import CachedStates
    from early_exit_cli.hidden_states.states import StateSource
    from early_exit_cli.training.trainer import StepReport, TrainingResult


@configured(
    *("training", "data", "heads", "backbone", "cache"),
    without=("backbone.assistant",),
    sweeps=True,
    examples=(
        "eexit train --model-name ORG/NAME --dataset-name prompts.jsonl --on-policy --output-dir runs/heads",
        "eexit train --mode offline --dataset-name text.jsonl --cache-gb 2 --set heads.rank=[64,256]",
    ),
)
def command(variants: list[Resolved], as_json: bool) -> None:
    """Train exit heads on hidden states, of the running backbone or from a cache."""
    load_libraries()
    from early_exit_cli.backbone.backbone import device_name
    from early_exit_cli.training.checkpoints import complete_checkpoints, half_written_checkpoints
    from early_exit_cli.training.launch import check_launcher, check_tracker
    from early_exit_cli.training.trainer import Lessons, Trainer, result_record, train_together

    config = variants[0].config
    check_tracker(config.training.report_to)
    check_launcher()
    source: StateSource
    data = config.data
    if config.training.mode == "online":
        source = online_states(config)
    else:
        cached = offline_states(variants[0])
        if cached is None:
            return
        source, data = cached, cached.cache.data
    lessons = Lessons(source)
    trainers = []
    for number, variant in enumerate(variants):
        training = variant.config.training
        if len(variants) > 1:
            training = training.model_copy(update={"output_dir": training.output_dir / f"variant-{number}"})
        for left in half_written_checkpoints(training.output_dir) if training.resume else []:
            console.warn(f"{left} was never finished; it is passed over")
        trainers.append(Trainer(lessons, variant.config.heads, training, data, {}))
    first = trainers[0]
    for trainer, variant in zip(trainers, variants, strict=True):
        if trainer.step:
            console.note(f"resuming at step {trainer.step}")
        elif trainer.accelerator.is_main_process and (older := complete_checkpoints(trainer.config.output_dir)):
            console.note(f"starting over: --resume would go on from {older[-1]}, which this run replaces")
        if trainer.accelerator.is_main_process:
            record = run_record(variant.rows(), device_name(source.view.device), device=str(source.view.device))
            write_json(trainer.config.output_dir / "run.json", record)
    rank, world = first.place
    kind, blocks = variants[0].config.heads.kind, to_block_numbers(source.exit_layers)
    console.note(
        f"{'an EAGLE head' if kind == 'eagle' else f'{len(first.student.parts)} {kind} heads'} after blocks "
        f"{blocks} of {source.view.num_blocks}; {source.sequences(rank, world):,} sequences"
    )
    with console.progress("training", config.training.max_steps) as ticker:

        def on_step(number: int, report: StepReport) -> None:
            losses = " ".join(f"{loss:.3f}" for loss in report.losses)
            ticker.update(report.step, f"loss {losses}  {report.tokens_per_second:,.0f} tokens/s")
            if report.agreement:
                name = f"variant {number}, " if len(trainers) > 1 else ""
                shares = "  ".join(f"{share:.1%}" for share in report.agreement)
                console.note(
                    f"{name}step {report.step}: held-out agreement {shares}; loss {losses}; "
                    f"{report.tokens_per_second:,.0f} tokens/s"
                )

        try:
            results = train_together(trainers, on_step)
        except KeyboardInterrupt:
            if first.accelerator.is_main_process:
                console.note(
                    f"interrupted; kept at step {first.step}: the same command with --resume goes on from there"
                )
            raise
    if not first.accelerator.is_main_process:
        return
    if as_json:
        records = [result_record(result) for result in results]
        console.emit_json(records[0] if len(records) == 1 else {"variants": records})
        return
    for result, variant in zip(results, variants, strict=True):
        show(result, ", ".join(f"{key} = {value}" for key, value in variant.swept.items()))


def show(result: TrainingResult, swept: str) -> None:
    """One table per set of heads."""
    console.table(
        f"{result.output_dir}{f' ({swept})' if swept else ''}: {result.steps} steps, {result.tokens_seen:,} tokens, "
        f"{result.seconds:,.0f} s",
        ["", "agreement (best)", "agreement (last)"],
        [
            (part, f"{best:.1%}", f"{last:.1%}")
            for part, best, last in zip(result.parts, result.best_agreement, result.last_agreement, strict=True)
        ],
        result=True,
    )
    console.note(f"next: eexit calibrate --bundle {result.output_dir}")


def online_states(config: Config) -> StateSource:
    """The running backbone and the text."""
    from early_exit_cli.backbone.load import load_backbone
    from early_exit_cli.cli.shared import load_text
    from early_exit_cli.data.rows import read_data
    from early_exit_cli.heads.exit_heads import exit_layers_of
    from early_exit_cli.hidden_states.live import BackboneStates

    text = read_data(config.data)  # refuse unreadable data before a model loads
    backbone = load_backbone(config.backbone)
    exit_layers = exit_layers_of(config.heads, backbone.num_blocks)
    train, held_out = load_text(text, backbone)
    return BackboneStates(backbone, exit_layers, train, held_out, config.data, config.training)


def offline_states(resolved: Resolved) -> CachedStates | None:
    """The cache, extracted first where it is missing or too short; None when `max_steps` says that this is all."""
    from early_exit_cli.backbone.load import pick_device
    from early_exit_cli.cli.cache import find_or_extract
    from early_exit_cli.heads.exit_heads import exit_layers_of
    from early_exit_cli.hidden_states.cached import CachedStates

    config = resolved.config
    cache = find_or_extract(resolved)
    if config.training.max_steps == 0:
        console.note(f"extracted to {cache.folder}; --max-steps 0 trains nothing")
        return None
    blocks = config.heads.head_layer_indices
    exit_layers = None if blocks is None else to_exit_layers(blocks)
    if config.heads.kind == "eagle":
        exit_layers = exit_layers_of(config.heads, cache.manifest.num_blocks)
    return CachedStates(cache, exit_layers, config.training, pick_device(config.backbone.device))
