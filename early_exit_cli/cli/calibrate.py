"""`eexit calibrate`: resolve, load model and two held-out texts, fit and check thresholds, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from early_exit_cli.cli.options import configured
from early_exit_cli.cli.shared import load_libraries
from early_exit_cli.errors import ConfigError, TargetMissedError
from early_exit_cli.report import console, plots
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.calibration.calibrate import Calibration
    from early_exit_cli.calibration.held_out import HeldOutSample
    from early_exit_cli.cli.shared import HeldOut
    from early_exit_cli.config_training import ThresholdRule, UncertaintyMetric
    from early_exit_cli.drafting.chances import DraftChances, Survival
    from early_exit_cli.engine import Engine

READ_TOGETHER = 2048
"""Tokens of texts of like length that are read together."""


@configured(
    *("bundle", "backbone", "data", "calibration"),
    examples=(
        "eexit calibrate --bundle runs/heads",
        "eexit calibrate --bundle runs/heads --assurance 0.8 --strict",
        "eexit calibrate --model-name Qwen/Qwen3.5-4B --dataset-name text.jsonl",
    ),
)
def command(resolved: Resolved, as_json: bool) -> None:
    """Fit thresholds for each head and target accuracy on held-out text, and check them on other held-out text; and what
    drafts are worth, those of a layer for multi-token prediction that the model brings, or of its assistant, too."""
    load_libraries()
    from early_exit_cli.bundle.files import CALIBRATION_FILE
    from early_exit_cli.bundle.load import bundle_source, load_engine
    from early_exit_cli.calibration.calibrate import calibrate, calibration_json, calibration_record, save_calibration
    from early_exit_cli.calibration.draft_chances import fit_draft_chances
    from early_exit_cli.cli.shared import (
        backbone_of_bundle,
        data_of_bundle,
        dataset_label,
        held_out_text,
        is_without_heads,
    )
    from early_exit_cli.drafting.chances import save_draft_chances

    config = resolved.config
    if is_without_heads(resolved):
        calibrate_mtp_alone(resolved, as_json)
        return
    source = bundle_source(config.bundle)
    if source.repo_id:
        raise ConfigError(
            f"calibration writes into the bundle, and {source.repo_id} is one of the Hub",
            hint=f"eexit pull {source.repo_id} --output-dir FOLDER, then eexit calibrate --bundle FOLDER",
        )
    folder = source.folder
    if source.is_shipped:
        raise ConfigError(
            f"calibration writes into the bundle, and {config.bundle.bundle} is the program's own",
            hint=f"copy {folder} to a FOLDER, then eexit calibrate --bundle FOLDER",
        )
    text = data_of_bundle(resolved, folder)
    engine = load_engine(backbone_of_bundle(resolved), config.bundle, with_thresholds=False, with_mtp=True)
    fit, check = held_out_text(text, engine, ["calibrate", "eval"], config.calibration.num_samples)
    first, second = read_both(engine, fit, check, config.calibration.uncertainty_metric)
    chances = fit_draft_chances(fit.documents, first, second)
    save_draft_chances(chances, folder)
    if not as_json:
        print_draft_chances(chances, engine.heads is not None)
    mtp = calibrate_mtp(engine, fit, check, as_json)
    if engine.heads is None or first.exits is None or second.exits is None:
        if as_json:
            console.emit_json({"drafting": chances.model_dump()} | mtp)
        return
    layers, label = engine.heads.exit_layers, dataset_label(text.config)
    result = calibrate(first.exits, second.exits, layers, config.calibration, label, fit.sequences)
    output = config.calibration.output_path or config.bundle.calibration_path or folder / CALIBRATION_FILE
    save_calibration(result, folder, output)
    record = calibration_record(result)
    pictures = plots.draw_calibration(record, output.with_suffix("")) if plots.available() else []
    faults = result.faults()
    if as_json:
        found = {"record": record, "faults": faults, "output_path": str(output), "pictures": [str(p) for p in pictures]}
        console.emit_json(calibration_json(result) | found | {"drafting": chances.model_dump()} | mtp)
    else:
        print_calibration(result, engine.blocks.num_blocks, config.calibration.verbose)
    print_warnings(result)
    print_files(output, pictures)
    if config.calibration.strict and faults:
        raise TargetMissedError("\n".join(faults), hint="more held-out text, --assurance, other levels, or --margin")


def calibrate_mtp_alone(resolved: Resolved, as_json: bool) -> None:
    """Of a backbone that was named without a bundle: what its checkpoint's MTP layer or its assistant is worth.

    Raises:
        ConfigError: it has none.
    """
    from early_exit_cli.bundle.load import load_engine
    from early_exit_cli.cli.shared import held_out_text
    from early_exit_cli.data.rows import read_data

    config = resolved.config
    text = read_data(config.data)  # refuse unreadable data before a model loads
    engine = load_engine(config.backbone, None, with_mtp=True)
    if engine.mtp is None:
        name = config.backbone.model_name
        why = engine.without_mtp or f"{name} brings no layer for multi-token prediction"
        raise ConfigError(f"nothing to calibrate: {why}, and no bundle was named", hint="--bundle FOLDER")
    fit, check = held_out_text(text, engine, ["calibrate", "eval"], config.calibration.num_samples)
    found = calibrate_mtp(engine, fit, check, as_json)
    if as_json:
        console.emit_json(found)


def calibrate_mtp(engine: Engine, fit: HeldOut, check: HeldOut, as_json: bool) -> dict[str, Any]:
    """Fit, keep and show what drafts of the MTP layer or the assistant are worth; nothing where there is none. Returns what --json adds."""
    from early_exit_cli.calibration.draft_chances import fit_eagle
    from early_exit_cli.calibration.mtp import read_mtp
    from early_exit_cli.data.packing import apart
    from early_exit_cli.drafting.chances import MtpChances, save_mtp_chances

    if engine.mtp is None:
        return {}
    texts, others = (apart(part.batches, READ_TOGETHER) for part in (fit, check))
    with console.progress(
        f"rolling out the {engine.mtp.kind}", sum(len(batch.input_ids) for batch in (*texts, *others))
    ) as ticker:
        first = read_mtp(engine, engine.mtp, texts, ticker.update)
        count = sum(len(batch.input_ids) for batch in texts)
        second = read_mtp(engine, engine.mtp, others, lambda done: ticker.update(count + done))
    survival, checked = fit_eagle(first, second)
    path = save_mtp_chances(MtpChances(survival=survival, checked=checked), engine.backbone, engine.mtp)
    if not as_json:
        print_survival("mtp", survival, checked)
        console.note(f"kept: {path}")
    return {"mtp": {"survival": [one.model_dump() for one in survival], "checked": checked, "kept": str(path)}}


def read_both(
    engine: Engine, fit: HeldOut, check: HeldOut, metric: UncertaintyMetric
) -> tuple[HeldOutSample, HeldOutSample]:
    """What the heads say of the text to fit on, and of the text to check on."""
    from early_exit_cli.calibration.held_out import read_held_out
    from early_exit_cli.data.packing import apart

    texts, others = (apart(part.batches, READ_TOGETHER) for part in (fit, check))
    count = sum(len(batch.input_ids) for batch in texts)
    with console.progress("calibrating", count + sum(len(batch.input_ids) for batch in others)) as ticker:
        first = read_held_out(engine, texts, metric, ticker.update)
        second = read_held_out(engine, others, metric, lambda done: ticker.update(count + done))
    return first, second


def print_draft_chances(chances: DraftChances, has_exits: bool) -> None:
    """What drafts are worth, by kind of match and by draft position; of exit heads where there are some."""
    from early_exit_cli.drafting.suffix_automaton import SHORTEST

    exits = [(chances.exit_temperature, "exit heads")] if has_exits else []
    found = [*exits, (chances.eagle_temperature, "EAGLE head")] if chances.eagle else exits
    if any(temperature != 1 for temperature, _ in found):
        named = " and ".join(f"{temperature:g} ({heads})" for temperature, heads in found)
        console.note(f"sampled drafts survive most often at {named} times the text's temperature")
    rows = [(length, f"{chance:.1%}") for length, chance in zip(SHORTEST, chances.lookup, strict=True)]
    console.table("lookup", ["match of at least", "next token right"], rows, result=True)
    if chances.eagle:
        print_survival("eagle", chances.eagle, chances.checked)


def print_survival(name: str, survival: list[Survival], checked: list[tuple[float, float]]) -> None:
    """By draft position, how often a drafter is right, and what a second text says of that."""
    console.table(
        f"{name}, given that it agreed so far",
        ["draft position", "agreement", "at 0.5 nats", "at 2 nats", "on the second text: agreement", "expected"],
        [
            (
                place + 1,
                *(f"{share:.1%}" for share in (found.mean, found.at(0.5), found.at(2.0))),
                *(f"{share:.1%}" for share in also),
            )
            for place, (found, also) in enumerate(zip(survival, checked, strict=True))
        ],
        result=True,
    )


def print_calibration(result: Calibration, depth: int, verbose: bool) -> None:
    """A table for each head, then how both rules kept their promises.

    Args:
        verbose: with the certainty of each number, and with the thresholds of the other rule.
    """
    from early_exit_cli.calibration.calibrate import ENOUGH_CHECKED
    from early_exit_cli.calibration.intervals import SURE

    other: ThresholdRule = "independent" if result.rule == "conditional" else "conditional"
    columns = f"level,{result.metric} threshold,coverage,agreement,on the second text".split(",")
    if verbose:
        columns += f"at least ({SURE:.0%}),tokens missing,checked tokens,{other} threshold,reached".split(",")
    for index, head in enumerate(result.heads):
        rows = []
        for key, cell in head.cells[result.rule].items():
            beside = head.cells[other][key]
            row = [
                key,
                f"{cell.threshold:.4f}",
                f"{cell.coverage:.1%}",
                _share(cell.agreement) or "never exits",
                _share(cell.reached) or "-",
            ]
            if verbose:
                row += [
                    _share(cell.at_least) or "-",
                    f"{cell.missing:,}",
                    f"{cell.checked_tokens:,}",
                    f"{beside.threshold:.4f}",
                    _share(beside.reached) or "-",
                ]
            rows.append(row)
        title = f"head {index}, after {head.exit_layer} of {depth} blocks: agreement {head.agreement:.1%} over "
        console.table(f"{title}{head.samples:,} tokens", columns, rows, result=True)
    reached = f"cells that reached their level - {result.margin:g}"
    console.table(
        "promises on the second text",
        ["thresholds", reached, f"cells of more than {ENOUGH_CHECKED:,} checked tokens", ""],
        [(rule, *result.kept(rule), "written" if rule == result.rule else "") for rule in (result.rule, other)],
        result=True,
    )


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def print_warnings(result: Calibration) -> None:
    """Levels that cannot be reached, and how many tokens are missing to be sure of the others."""
    from early_exit_cli.calibration.intervals import SURE

    missed: dict[int, list[str]] = {}
    for level, head, cell in result.cells():
        if not cell.reachable:
            missed.setdefault(head, []).append(f"{level:.2f}")
    if missed:
        levels = "; ".join(f"head {head}: {', '.join(own)}" for head, own in missed.items())
        console.warn(f"levels out of reach, where a head never exits: {levels}")
    unsure = [(level, head, cell) for level, head, cell in result.cells() if cell.reachable and cell.missing]
    if unsure:
        level, head, cell = max(unsure, key=lambda entry: entry[2].missing)
        console.warn(
            f"too few exiting tokens to be {SURE:.0%} sure of a level - {result.margin:g}: "
            f"{len(unsure)} of {len(result.cells())} cells; most are missing at level {level:.2f}, head {head}: "
            f"{cell.tokens:,} tokens are there, {cell.missing:,} more are needed (--verbose shows all)"
        )


def print_files(output: Path, pictures: list[Path]) -> None:
    """Where everything is."""
    console.note(f"written: {output}")
    if pictures:
        console.note(f"pictures: {', '.join(str(path) for path in pictures)}")
    else:
        console.note("no pictures: pip install 'eexit[plots]'")
