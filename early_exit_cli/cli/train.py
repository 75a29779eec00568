"""`eexit train`: resolve, load the backbone and the text, train, report."""

from __future__ import annotations

from early_exit_cli import console
from early_exit_cli.artifacts import run_record, write_json
from early_exit_cli.cli.options import configured
from early_exit_cli.resolve import Resolved


@configured("backbone", "heads", "data", "training")
def command(resolved: Resolved, as_json: bool) -> None:
    """Train exit heads on the hidden states of the running backbone."""
    from accelerate import PartialState

    from early_exit_cli.backbone import load_backbone
    from early_exit_cli.data import load_documents, read_records
    from early_exit_cli.training import StepReport, Trainer, check_tracker, result_record

    config = resolved.config
    check_tracker(config.training.report_to)
    read_records(config.data)  # refuse unreadable data before a model loads
    backbone = load_backbone(config.backbone)
    processes = PartialState(cpu=backbone.device.type == "cpu")
    # The first process answers the prompts; the others then read what it wrote.
    with processes.main_process_first(), console.progress("answering prompts", 1) as ticker:

        def on_answers(done: int, total: int, tokens: int) -> None:
            ticker.update(done, f"{tokens:,} tokens", total)

        train = load_documents(config.data, backbone, "train", on_answers)
        held_out = load_documents(config.data, backbone, "eval", on_answers)
    trainer = Trainer(backbone, config.heads, config.training, config.data, train, held_out, {})
    if trainer.step:
        console.note(f"resuming at step {trainer.step}")
    console.note(
        f"{len(trainer.heads)} {trainer.heads.kind} heads after blocks {trainer.heads.layers} of {backbone.num_blocks}; "
        f"{len(train):,} texts, {len(trainer.rows):,} sequences of {config.data.max_length} tokens"
    )
    main_process = trainer.accelerator.is_main_process
    if main_process:
        write_json(config.training.output_dir / "run.json", run_record(resolved.rows(), device=str(backbone.device)))
    with console.progress("training", config.training.max_steps) as ticker:

        def on_step(report: StepReport) -> None:
            losses = " ".join(f"{loss:.3f}" for loss in report.losses)
            ticker.update(report.step, f"loss {losses}  {report.tokens_per_second:,.0f} tokens/s")
            if report.agreement:
                shares = "  ".join(f"head {head} {share:.1%}" for head, share in enumerate(report.agreement))
                console.note(
                    f"step {report.step}: held-out agreement {shares}; loss {losses}; {report.tokens_per_second:,.0f} tokens/s"
                )

        result = trainer.run(on_step)
    if not main_process:
        return
    if as_json:
        console.emit_json(result_record(result))
        return
    console.table(
        f"{result.output_dir}: {result.steps} steps, {result.tokens_seen:,} tokens, {result.seconds:,.0f} s",
        ["head", "blocks run", "agreement (best)", "agreement (last)"],
        [
            (head, layer, f"{best:.1%}", f"{last:.1%}")
            for head, (layer, best, last) in enumerate(
                zip(result.exit_layers, result.best_agreement, result.last_agreement, strict=True)
            )
        ],
        result=True,
    )
    console.note(f"next: eexit calibrate --bundle {result.output_dir}")
