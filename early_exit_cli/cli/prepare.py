"""The model and the drafter that some settings mean, loaded once for all prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from early_exit_cli.cli.job import Job, RecordFile
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.drafting.drafter import Drafter
    from early_exit_cli.engine import Engine

MODE_KINDS = {"fixed_layerskip": "fixed", "dynamic_early_exit": "dynamic", "comprehensive": "all"}
"""Modes that say themselves how tokens are proposed, and the kind of drafter each means."""


def prepare(resolved: Resolved, as_json: bool) -> Job:
    """Load the model and make the drafter of the mode."""
    load_libraries()
    from early_exit_cli.drafting.choose import make_drafter

    settings = resolved.config.inference
    output = None if settings.output is None else RecordFile(settings.output)
    kind = drafter_kind(resolved)
    if kind == "all" and resolved.is_default("inference.read_heads"):
        settings = settings.model_copy(update={"read_heads": "all"})
    engine = load(resolved, kind)
    say_how_it_runs(engine)
    if not settings.raw and not engine.backbone.tokenizer.chat_template:
        console.note(f"{engine.backbone.name} has no chat template: it goes on with prompts as plain text")
    check_level(resolved, engine)
    drafter, width = make_drafter(engine, settings, kind)
    say_what_is_not_read(engine, drafter)
    coloured = console.wants_colour(settings.color) and not as_json
    return Job(
        engine,
        settings,
        resolved.config.sampling,
        drafter,
        width,
        as_json,
        coloured,
        output,
    )


def drafter_kind(resolved: Resolved) -> str:
    """The drafter that was named, or that the mode means: `adaptive` is early exit, in all others it is `auto`."""
    settings = resolved.config.inference
    if settings.mode in MODE_KINDS:
        return MODE_KINDS[settings.mode]
    if settings.mode == "full":
        return "none"
    asked_for_exits = settings.mode == "adaptive_early_exit" and not resolved.is_default("inference.mode")
    return settings.drafter or ("exit" if asked_for_exits else "auto")


def load(resolved: Resolved, kind: str) -> Engine:
    """The model; a backbone that was named without a bundle is loaded alone where no head must be read, and is told."""
    from early_exit_cli.bundle.load import load_engine
    from early_exit_cli.cli.shared import backbone_of_bundle, is_without_heads
    from early_exit_cli.drafting.choose import DRAFTS_BY_MTP, HEADLESS

    config, with_mtp = resolved.config, kind in DRAFTS_BY_MTP
    if kind in HEADLESS and is_without_heads(resolved):
        engine = load_engine(config.backbone, None, with_mtp=with_mtp)
        if kind == "auto":
            own = "checkpoint's MTP layer" if config.backbone.assistant is None else "assistant"
            who = "lookup drafts" if engine.mtp is None else f"its {own} drafts, and lookup"
            console.note(f"no heads for {config.backbone.model_name} (--bundle FOLDER): {who}")
        return engine
    needed = kind not in HEADLESS or kind == "auto" or not resolved.is_default("inference.accuracy_level")
    return load_engine(backbone_of_bundle(resolved), config.bundle, with_thresholds=needed, with_mtp=with_mtp)


def check_level(resolved: Resolved, engine: Engine) -> None:
    """Refuse an accuracy level that was asked for and not calibrated, whoever drafts.

    Raises:
        ConfigError: with the levels there are.
    """
    if engine.thresholds is not None and not resolved.is_default("inference.accuracy_level"):
        engine.thresholds.at(resolved.config.inference.accuracy_level)


def say_how_it_runs(engine: Engine) -> None:
    """On stderr: why the passes are not our own code's, and on a GPU what was recorded."""
    blocks = engine.blocks
    if blocks.without_kernels:
        console.note(f"{engine.backbone.device_name}: the library's kernels, since {blocks.without_kernels}")
    if blocks.without_graphs:
        console.note(f"CUDA graphs off: {blocks.without_graphs}")
    if blocks.recording_seconds:
        widths = ", ".join(map(str, blocks.widths))
        console.note(
            f"{engine.backbone.device_name}: passes of {widths} rows recorded in {blocks.recording_seconds:.1f} s"
        )


def say_what_is_not_read(engine: Engine, drafter: Drafter) -> None:
    """On stderr: which of the bundle's heads are left unread, and why; and so of the checkpoint's MTP layer."""
    from early_exit_cli.drafting.auto import AutoDrafter
    from early_exit_cli.drafting.chances import draft_chances_of
    from early_exit_cli.drafting.exit import ExitDrafter

    if isinstance(drafter, AutoDrafter) and engine.without_mtp:
        console.note(f"{engine.without_mtp}: it does not draft")
    if isinstance(drafter, AutoDrafter) and engine.heads is not None and engine.thresholds is None:
        console.note("the bundle is not calibrated: its heads are not read (eexit calibrate)")
    alone = engine.eagle is not None and engine.heads is None
    if isinstance(drafter, AutoDrafter) and alone and not draft_chances_of(engine.record).eagle:
        console.note("the EAGLE head is not calibrated: it is not read (eexit calibrate)")
    if type(drafter) is ExitDrafter and drafter.active is not None and len(drafter.active) < len(drafter.thresholds):
        unread = [str(head) for head in range(len(drafter.thresholds)) if head not in drafter.active]
        console.note(
            f"head {', '.join(unread)} not read: by the costs measured here it would not pay (--read-heads all)"
        )
