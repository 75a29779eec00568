"""The model card of a bundle, from its records: numbers that were measured, each with what it was measured on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from early_exit_cli.bundle.files import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    DSSD_HEADS_FILE,
    EAGLE_FILE,
    HEADS_FILE,
    RECORD_FILE,
)
from early_exit_cli.config_fields import HUB_ID, todays_word
from early_exit_cli.errors import ConfigError
from early_exit_cli.files.schemas import (
    BenchForm,
    BundleForm,
    CalibrationForm,
    EvaluationForm,
    Heads,
    RecordForm,
    Source,
    read_form,
)

TAGS = ["speculative-decoding", "self-speculative-decoding", "early-exit", "dynamic-inference", "lossless"]
DATA_SET = re.compile(r"[\w-]+(/[\w.-]+)?", re.ASCII)
CONTENTS = {
    HEADS_FILE: "the heads",
    DSSD_HEADS_FILE: "the same heads as a state dict, for the DSSD demo",
    EAGLE_FILE: "a head that rolls forward from the deep states of verified tokens, in EAGLE-3's layout",
    CONFIG_FILE: "the backbone's shape and where the heads read, as DSSD writes it",
    CALIBRATION_FILE: "an entropy threshold for each head and target accuracy, as DSSD writes it",
    RECORD_FILE: "the backbone's fingerprint, the training and calibration records",
}


def read_evaluation(path: Path, heads: str) -> EvaluationForm:
    """The record of `eexit evaluate`, of the heads whose file has this SHA-256.

    Raises:
        ConfigError: of other heads.
    """
    record = read_form(path, EvaluationForm)
    require_heads(path, record.bundle, heads)
    return record


def read_bench(path: Path, heads: str) -> BenchForm:
    """The report of `eexit bench`, as `read_evaluation`."""
    report = read_form(path, BenchForm)
    require_heads(path, report.environment.bundle, heads)
    return report.model_copy(update={"methods": {todays_word(name): found for name, found in report.methods.items()}})


def require_heads(path: Path, source: Source, heads: str) -> None:
    """Refuse numbers that were measured on other heads, or without saying on which."""
    if source.heads != heads:
        measured = "heads it does not name" if source.heads is None else f"heads with SHA-256 {source.heads[:12]}"
        raise ConfigError(f"{path} was measured on {measured}, the bundle's have {heads[:12]}")


def model_card(
    repo_id: str,
    config: BundleForm,
    heads: Heads,
    calibration: CalibrationForm,
    record: RecordForm,
    files: Sequence[str],
    *,
    evaluation: EvaluationForm | None = None,
    bench: BenchForm | None = None,
    license: str | None = None,
) -> str:
    """README.md: metadata for the Hub, then what a person asks first.

    Args:
        config, calibration, record: config.json, calibration.json and eexit.json of the bundle. heads: as in the record.
        files: names of what is uploaded beside the card.
    """
    backbone = config.model_name
    trained_on = training_data(config, record)
    name = repo_id.split("/")[1]
    data = ModelCardData(
        library_name="eexit",
        base_model=backbone if is_hub_id(backbone) else None,
        tags=TAGS,
        datasets=[trained_on] if trained_on and is_data_set(trained_on) else None,
        license=license,
        model_name=name if evaluation else None,
        eval_results=eval_results(evaluation) if evaluation else None,
    )
    parts = [
        f"# {name}",
        introduction(config),
        usage(repo_id),
        contents(config, heads, record, trained_on, files),
        thresholds(calibration, record),
        evaluated(evaluation) if evaluation else "",
        speed(bench) if bench else "",
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be one on the Hub, not a local folder."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def is_data_set(name: str) -> bool:
    """Whether a data set's name can be one on the Hub, not a local file."""
    return DATA_SET.fullmatch(name) is not None and not Path(name).exists()


def training_data(config: BundleForm, record: RecordForm) -> str | None:
    """Name of the data set that the heads were trained on, where that is recorded."""
    data = record.training.data or config.training_config
    name = None if data is None else data.dataset_name
    return Path(name).name if name and Path(name).is_absolute() else name


def eval_results(evaluation: EvaluationForm) -> list[EvalResult]:
    """The evaluation as the Hub's metadata has it: per head, agreement with the backbone and accuracy on the text."""
    found = []
    for head in evaluation.auxiliary_heads:
        named = f"head {head.head_idx} after {head.exit_layer} blocks"
        for metric, value in (
            ("agreement with the backbone", head.accuracy_vs_lm_head),
            ("accuracy on the text", head.accuracy),
        ):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=evaluation.dataset,
                    dataset_name=evaluation.dataset,
                    metric_type="accuracy",
                    metric_name=f"{metric}, {named}",
                    metric_value=value,
                )
            )
    return found


def introduction(config: BundleForm) -> str:
    """What this is, in a sentence or two."""
    backbone = config.model_name
    named = f"[{backbone}](https://huggingface.co/{backbone})" if is_hub_id(backbone) else f"`{Path(backbone).name}`"
    precision = "" if config.quantization == "none" else f" in {config.quantization}"
    return (
        f"Exit heads for {named}{precision}: small heads on intermediate layers draft tokens, and the model itself "
        "verifies every draft. The answer is the one the model gives alone, token for token; only the time differs."
    )


def usage(repo_id: str) -> str:
    """Three lines."""
    return f"""## Usage

```bash
eexit infer --bundle {repo_id} --prompt "Why is the sky blue?"
eexit infer --bundle {repo_id} --mode compare --prompt "Why is the sky blue?"
eexit pull {repo_id} --output-dir heads
```"""


def contents(config: BundleForm, heads: Heads, record: RecordForm, trained_on: str | None, files: Sequence[str]) -> str:
    """The files, the heads, how they were trained."""
    training = record.training
    facts = [f"{config.num_heads} {heads.kind} heads after {blocks(config)} of {config.num_hidden_layers} blocks"]
    if heads.kind != "linear":
        facts.append(f"rank {heads.rank}")
    if heads.draft_vocab:
        facts.append(f"draft vocabulary of {heads.draft_vocab:,} tokens")
    lines = [", ".join(facts) + "."]
    if training.tokens_seen:
        source = "the backbone's own answers to " if training.data is not None and training.data.on_policy else ""
        lines.append(
            f"Trained for {training.step:,} steps on {training.tokens_seen:,} tokens of {source}`{trained_on}`."
        )
    elif trained_on:
        lines.append(f"Trained on `{trained_on}`.")
    if record.imported is not None:
        lines.append(f"Imported from {record.imported.source}.")
    rows = [(f"`{name}`", meaning) for name, meaning in CONTENTS.items() if name in files]
    return "## What is inside\n\n" + " ".join(lines) + "\n\n" + table(["file", "holds"], rows)


def blocks(config: BundleForm) -> str:
    """Numbers of blocks run before each head, as words."""
    numbers = [str(layer) for layer in config.exit_layers]
    return " and ".join([", ".join(numbers[:-1]), numbers[-1]] if len(numbers) > 1 else numbers)


def thresholds(calibration: CalibrationForm, record: RecordForm) -> str:
    """Agreement of each head, and what calibration found for every target accuracy."""
    measured = record.calibration.heads
    heads = [
        (index, percent(found.overall_accuracy), f"{found.num_samples:,}")
        for index, found in calibration.statistics.items()
    ]
    rows = []
    for level, of_heads in calibration.thresholds.items():
        for index, threshold in of_heads.items():
            known = []
            if int(index) < len(measured):
                head = measured[int(index)]
                known = [percent(head.coverage.get(level)), percent(head.agreement_at.get(level))]
            rows.append((level, index, f"{threshold:.4f}", *known))
    columns = ["target accuracy", "head", "threshold (nats)", *(["coverage", "agreement"] if measured else [])]
    title = (
        "Agreement is the share of tokens where the head's choice is the backbone's; coverage the share that exits. On "
        f"{calibration.calibration_samples:,} sequences of `{calibration.calibration_dataset}`."
    )
    parts = ["## Agreement and coverage", title]
    if heads:
        parts.append(table(["head", "agreement on all tokens", "tokens"], heads))
    return "\n\n".join([*parts, table(columns, rows)])


def evaluated(evaluation: EvaluationForm) -> str:
    """The evaluation as a table."""
    rows = [
        (
            head.head_idx,
            head.exit_layer,
            percent(head.accuracy_vs_lm_head),
            percent(head.top5_accuracy_vs_lm_head),
            percent(head.accuracy),
        )
        for head in evaluation.auxiliary_heads
    ]
    columns = ["head", "blocks run", "agreement", "backbone's choice in top 5", "accuracy on the text"]
    data_set = f" of `{evaluation.dataset}`" if "dataset" in evaluation.model_fields_set else ""
    title = (
        f"{evaluation.num_samples:,} sequences{data_set}, {evaluation.total_tokens:,} tokens; the backbone's own "
        f"accuracy on the text is {percent(evaluation.main_head.accuracy)}."
    )
    return "\n\n".join(["## Evaluation", title, table(columns, rows)])


def speed(bench: BenchForm) -> str:
    """The bench as a table, with the machine and the protocol."""
    where = bench.environment
    rows = [
        (
            name,
            f"{found.tokens_per_second:.1f}",
            f"{found.speedup_over_full:.2f}x",
            f"{found.accept_length:.2f}" if found.accept_length else "-",
            f"{found.identical_prompts}/{found.prompts}",
        )
        for name, found in bench.methods.items()
    ]
    made_with = ", ".join(
        f"{name} {where.versions[name]}" for name in ("eexit", "torch", "transformers") if name in where.versions
    )
    title = (
        f"{where.processor}; {made_with}. Greedy, one text at a time, at most {where.max_tokens} new tokens; whole "
        f"answers are timed, methods take turns, and the median of {where.repeats} repeats counts. `full` is plain decoding "
        "in the same program."
    )
    columns = ["method", "tokens/s", "over full", "accept length", "same tokens"]
    return "\n\n".join(["## Speed", title, table(columns, rows)])


def percent(share: float | None) -> str:
    """A share for a person; a dash where there was nothing to measure."""
    return "-" if share is None else f"{share:.1%}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
