"""`eexit infer`: resolve, load, decode, report. Text goes to stdout as it is committed, statistics to stderr."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from early_exit_cli import console
from early_exit_cli.artifacts import write_json
from early_exit_cli.cli.options import configured
from early_exit_cli.config import InferenceConfig
from early_exit_cli.errors import ConfigError, DataError
from early_exit_cli.resolve import Resolved

if TYPE_CHECKING:
    from early_exit_cli.decoding import Stats
    from early_exit_cli.drafters import Drafter
    from early_exit_cli.engine import EarlyExitModel


@configured("bundle", "backbone", "inference")
def command(resolved: Resolved, as_json: bool) -> None:
    """Answer prompts."""
    settings = resolved.config.inference
    prompts = gather_prompts(settings)
    if settings.trace and settings.mode == "compare":
        raise ConfigError("--trace runs every head on every token and would spoil the times of --mode compare")
    job = prepare(resolved, as_json)
    encoded = [encode(job.model, settings, prompt["prompt"]) for prompt in prompts]
    if settings.prompts:
        answer_many(job, prompts, encoded)
    elif settings.mode == "compare":
        answer_compare(job, encoded[0])
    else:
        answer_one(job, encoded[0])


@dataclass(frozen=True)
class Job:
    """Everything but the prompt."""

    model: EarlyExitModel
    settings: InferenceConfig
    drafter: Drafter
    width: int
    as_json: bool


def prepare(resolved: Resolved, as_json: bool) -> Job:
    """Load the model and make the drafter of the mode."""
    from early_exit_cli.blocks import LARGEST_WIDTH
    from early_exit_cli.decoding import default_width

    settings = resolved.config.inference
    kind = drafter_kind(resolved)
    model = load(resolved, kind)
    width = settings.width or default_width(model)
    drafter = make_drafter(model, settings, kind, width)
    if settings.width is None and kind in ("lookup", "lookahead", "auto"):  # these weigh draft lengths at every width
        width = LARGEST_WIDTH
    return Job(model, settings, drafter, width, as_json)


def drafter_kind(resolved: Resolved) -> str:
    """The drafter that was named, or that the mode means: `adaptive` is early exit; without either it is `auto`."""
    settings = resolved.config.inference
    if settings.mode == "full":
        return "none"
    return settings.drafter or ("auto" if resolved.is_default("inference.mode") else "exit")


def gather_prompts(settings: InferenceConfig) -> list[dict[str, Any]]:
    """The prompts to answer, from exactly one place.

    Raises:
        ConfigError: several places, or an empty prompt.
    """
    given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"several prompts given: {', '.join('--' + name.replace('_', '-') for name in given)}")
    if settings.prompts:
        from early_exit_cli.data import read_prompts

        return read_prompts(settings.prompts)[: settings.limit]
    if settings.prompt_file:
        try:
            prompt = settings.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {settings.prompt_file}: {error}") from error
    elif settings.prompt is not None:
        prompt = settings.prompt
    else:
        if sys.stdin.isatty():
            console.note("type the prompt, then Ctrl-D:")
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise ConfigError("the prompt is empty", hint='eexit infer --prompt "..."')
    return [{"prompt": prompt}]


def load(resolved: Resolved, kind: str) -> EarlyExitModel:
    """The model; a backbone that was named without a bundle is loaded alone where no head must be read."""
    from early_exit_cli.cli.shared import backbone_of_bundle
    from early_exit_cli.engine import load_model

    config = resolved.config
    if (
        kind not in ("exit", "lookahead")
        and resolved.is_default("bundle.bundle")
        and not resolved.is_default("backbone.model_name")
    ):
        return load_model(config.backbone, None)
    return load_model(backbone_of_bundle(resolved), config.bundle, with_thresholds=kind in ("exit", "auto"))


def make_drafter(model: EarlyExitModel, settings: InferenceConfig, kind: str, width: int) -> Drafter:
    """The drafter of that kind; says on stderr which heads early exit leaves unread."""
    from early_exit_cli.costs import auto_drafter, exit_drafter, lookahead_drafter, lookup_drafter
    from early_exit_cli.drafters import NoDrafter

    if kind == "none":
        return NoDrafter()
    if kind == "lookup":
        return lookup_drafter(model)
    if kind == "lookahead":
        return lookahead_drafter(model)
    if kind == "auto":
        if model.heads is not None and model.thresholds is None:
            console.note("the bundle is not calibrated: its heads are not read (eexit calibrate)")
        return auto_drafter(model, settings.accuracy_level, width, settings.read_heads)
    drafter = exit_drafter(model, settings.accuracy_level, width, settings.read_heads)
    if drafter.active is not None and len(drafter.active) < len(drafter.thresholds):
        unread = [str(head) for head in range(len(drafter.thresholds)) if head not in drafter.active]
        console.note(
            f"head {', '.join(unread)} not read: by the costs measured here it would not pay (--read-heads all)"
        )
    return drafter


def encode(model: EarlyExitModel, settings: InferenceConfig, prompt: str) -> list[int]:
    """Token ids of a prompt, refused when it is empty or beyond the context."""
    ids = model.backbone.encode_prompt(prompt, raw=settings.raw)
    model.check_length(len(ids), settings.max_tokens)
    return ids


def answer_one(job: Job, ids: list[int]) -> None:
    """One prompt, one method, streamed."""
    from early_exit_cli.decoding import generate, trace_records

    result = generate(
        job.model,
        ids,
        job.drafter,
        job.settings.max_tokens,
        mode=job.drafter.name,
        width=job.width,
        trace=job.settings.trace is not None,
        on_text=None if job.as_json else console.stream_text,
    )
    if job.settings.trace:
        write_json(job.settings.trace, trace_records(job.model, result, len(ids)))
    if job.as_json:
        console.emit_json({job.drafter.name: result.record()})
        return
    console.stream_text("\n")
    console.table("", ["", "value"], stats_rows(result.stats))


def answer_compare(job: Job, ids: list[int]) -> None:
    """Both methods on one prompt, after a warm-up that is not counted."""
    from early_exit_cli.decoding import generate
    from early_exit_cli.drafters import NoDrafter
    from early_exit_cli.evaluation import compare

    for warm in (job.drafter, NoDrafter()):
        generate(job.model, ids, warm, min(8, job.settings.max_tokens), mode="warm-up", width=job.width)
    result = compare(
        job.model, ids, job.drafter, job.settings.max_tokens, width=job.width, repeats=job.settings.repeats
    )
    if job.as_json:
        console.emit_json(result.record())
        return
    console.stream_text(result.drafted.text + "\n")
    full, drafted = dict(stats_rows(result.full.stats)), dict(stats_rows(result.drafted.stats))
    console.table(
        f"{job.model.backbone.name}, {job.model.backbone.quantization}, accuracy level {job.settings.accuracy_level:.2f}",
        ["", "full", job.drafter.name],
        [(name, full[name], drafted[name]) for name in full],
    )
    same = "identical" if result.identical else f"DIFFERENT from token {result.first_difference}"
    bits = "bit-exact" if result.bit_exact else "not bit-exact"
    console.note(
        f"{same}, {bits}; speed-up {result.speedup:.2f}x (median of {job.settings.repeats} alternating repeats)"
    )


def answer_many(job: Job, prompts: list[dict[str, Any]], encoded: list[list[int]]) -> None:
    """A record per prompt."""
    from early_exit_cli.decoding import generate
    from early_exit_cli.evaluation import compare

    generate(job.model, encoded[0], job.drafter, 8, mode="warm-up", width=job.width)
    records: list[dict[str, Any]] = []
    with console.progress("prompts", len(prompts)) as ticker:
        for prompt, ids in zip(prompts, encoded, strict=True):
            known: dict[str, Any] = {key: prompt[key] for key in ("question_id", "category") if key in prompt}
            if job.settings.mode == "compare":
                record = compare(
                    job.model, ids, job.drafter, job.settings.max_tokens, width=job.width, repeats=job.settings.repeats
                ).record()
            else:
                run = generate(
                    job.model, ids, job.drafter, job.settings.max_tokens, mode=job.drafter.name, width=job.width
                )
                record = {job.drafter.name: run.record()}
            records.append({**known, "prompt_tokens": len(ids), **record})
            ticker.update(len(records))
    if job.as_json:
        console.emit_json({"records": records})
        return
    methods = ["full", job.drafter.name] if job.settings.mode == "compare" else [job.drafter.name]
    rows = []
    for number, record in enumerate(records):
        speeds = [f"{record[method]['stats']['tokens_per_second']:.1f}" for method in methods]
        extra = [f"{record['speedup']:.2f}x", record["identical"], record["bit_exact"]] if "speedup" in record else []
        rows.append((number, str(record.get("category", "")), record["prompt_tokens"], *speeds, *extra))
    compared = ["speed-up", "identical", "bit-exact"] if job.settings.mode == "compare" else []
    console.table("tokens/s", ["prompt", "category", "tokens", *methods, *compared], rows, result=True)


def stats_rows(stats: Stats) -> list[tuple[str, str]]:
    """Statistics of one answer for a person."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    exits = "  ".join(
        f"{'backbone' if name == 'full' else 'head ' + name if name.isdigit() else name}: {count}"
        for name, count in stats.exit_distribution.items()
    )
    return [
        ("tokens", str(stats.total_tokens_generated)),
        ("tokens/s", f"{stats.tokens_per_second:.1f}"),
        ("time to first token", f"{stats.time_to_first_token_seconds * 1000:.0f} ms"),
        ("accept length", f"{stats.accept_length:.2f}"),
        (
            "drafted, accepted",
            f"{stats.tokens_drafted}, {stats.tokens_accepted} ({share(stats.acceptance_rate)})",
        ),
        ("average exit layer", f"{stats.average_exit_layer:.1f}"),
        ("decided by", exits),
    ]
