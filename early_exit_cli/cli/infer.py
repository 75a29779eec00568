"""`eexit infer`: resolve, load, decode, report. Text goes to stdout as it is committed, statistics to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from early_exit_cli.cli import show
from early_exit_cli.cli.job import Job, encode, warm_up
from early_exit_cli.cli.many import answer_many
from early_exit_cli.cli.options import configured
from early_exit_cli.cli.prepare import MODE_KINDS, drafter_kind, prepare
from early_exit_cli.config import DYNAMIC_LENGTH, InferenceConfig
from early_exit_cli.config_fields import is_unicode
from early_exit_cli.errors import ConfigError, DataError
from early_exit_cli.files.atomic import read_text, write_json
from early_exit_cli.report import console
from early_exit_cli.report.answer_text import AnswerWriter
from early_exit_cli.report.status import paused
from early_exit_cli.resolve import Resolved
from early_exit_cli.steps import step

if TYPE_CHECKING:
    from early_exit_cli.decoding.answer import Generation


@configured(
    *("inference", "sampling", "bundle", "backbone"),
    argument="inference.prompt",
    examples=(
        'eexit infer "Why is the sky blue?"',
        "eexit infer --mode compare --html answer.html < question.txt",
    ),
)
def command(resolved: Resolved, as_json: bool) -> None:
    """Answer prompts."""
    settings = resolved.config.inference
    check_combinations(resolved)
    require_one_prompt(settings)
    if settings.prompts:
        from early_exit_cli.data.rows import prompt_rows

        rows = prompt_rows(settings.prompts)[: settings.limit]
        answer_many(prepare(resolved, as_json), rows)
        return
    with paused():
        prompt = read_prompt(settings)
    job = prepare(resolved, as_json)
    ids = encode(job.engine, settings, prompt)
    answer = {"compare": answer_compare, "comprehensive": answer_comprehensive}.get(settings.mode, answer_one)
    answer(job, prompt, ids)


def check_combinations(resolved: Resolved) -> None:
    """Refuse settings that do not go together, before anything is loaded.

    Raises:
        ConfigError: which, all of them.
        DataError: the lookup corpus cannot be read.
    """
    settings = resolved.config.inference
    faults = []
    if settings.mode in ("compare", "comprehensive") and settings.trace:
        faults.append(f"--trace runs every head on every token and would spoil the times of --mode {settings.mode}")
    if settings.mode in MODE_KINDS and settings.drafter is not None:
        faults.append(f"--mode {settings.mode} says itself how tokens are proposed; leave --drafter out")
    if settings.width is not None and settings.mode == "fixed_layerskip":
        faults.append("--mode fixed_layerskip takes --draft-length, which decides the width; leave --width out")
    if settings.width is not None and settings.mode == "dynamic_early_exit":
        faults.append(f"--mode dynamic_early_exit drafts up to {DYNAMIC_LENGTH} tokens; leave --width out")
    if settings.prompts and settings.mode == "comprehensive":
        faults.append("--mode comprehensive takes one prompt; eexit bench compares methods on many")
    if settings.batch > 1 and not settings.prompts:
        faults.append("--batch takes many prompts; give them with --prompts")
    if settings.batch > 1 and settings.mode == "compare":
        faults.append("--mode compare times one answer at a time; leave --batch out")
    if settings.system is not None and settings.raw:
        faults.append("--system goes into the chat template, which --raw leaves out")
    if settings.prompts and settings.html:
        faults.append("--html shows one answer; give one prompt")
    if settings.lookup_corpus:
        if (kind := drafter_kind(resolved)) not in ("lookup", "auto"):
            faults.append(f"--lookup-corpus is for the drafters lookup and auto, and this is {kind}")
        read_text(settings.lookup_corpus)
    if settings.mode == "fixed_layerskip":
        from early_exit_cli.bundle.files import read_bundle_config
        from early_exit_cli.bundle.load import bundle_folder

        heads = read_bundle_config(bundle_folder(resolved.config.bundle)).num_heads
        if settings.fixed_head >= heads:
            faults.append(f"--fixed-head {settings.fixed_head}: the bundle has heads 0 to {heads - 1}")
    if faults:
        raise ConfigError("\n".join(faults))


def require_one_prompt(settings: InferenceConfig) -> None:
    """Refuse prompts from several places."""
    given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(settings, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"several prompts given: {', '.join('--' + name.replace('_', '-') for name in given)}")


def read_prompt(settings: InferenceConfig) -> str:
    """The prompt of the settings, or of standard input.

    Raises:
        DataError: not text. ConfigError: empty.
    """
    if settings.prompt_file:
        prompt = read_text(settings.prompt_file)
    elif settings.prompt is not None:
        prompt = settings.prompt
    else:
        if sys.stdin.isatty():
            console.note("type the prompt, then Ctrl-D:")
        try:
            prompt = sys.stdin.read().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error
    if not is_unicode(prompt):
        raise DataError("the prompt is not UTF-8")
    if not prompt.strip():
        raise ConfigError("the prompt is empty", hint='eexit infer "..."')
    return prompt


def answer_one(job: Job, prompt: str, ids: list[int]) -> None:
    """One prompt, one method, streamed. Interrupted, it says what there is."""
    from early_exit_cli.decoding.answer import Interrupted
    from early_exit_cli.decoding.records import trace_records

    settings = job.settings
    writer = AnswerWriter(job.coloured)
    try:
        on_text = None if job.as_json else writer.write
        result = job.generate(job.request(ids, prompt), trace=settings.trace is not None, on_text=on_text)
    except Interrupted as interruption:
        writer.end()
        report_answer(job, interruption.generation)
        raise
    writer.end()
    if settings.trace:
        write_json(settings.trace, trace_records(job.engine, result, len(ids)))
    report_answer(job, result)
    write_page(job, prompt, ids, result, {job.drafter.name: result.record()})


def report_answer(job: Job, result: Generation) -> None:
    """The record, or the statistics below an answer that was streamed."""
    record = {job.drafter.name: result.record()}
    if job.output:
        job.output.write(record)
    if job.as_json:
        console.emit_json(record)
    else:
        show.legend(result.stats, job.coloured)
        console.table("", ["", ""], show.stats_rows(result))


def answer_compare(job: Job, prompt: str, ids: list[int]) -> None:
    """Both methods on one prompt, after a warm-up that is not counted."""
    from early_exit_cli.drafting.drafter import NoDrafter
    from early_exit_cli.evaluation.compare import compare

    settings = job.settings
    with step("warming up"):
        for warm in (job.drafter, NoDrafter()):
            warm_up(job, ids, warm)
    with step(f"answering {settings.repeats} times plainly and with drafts, in turns"):
        result = compare(job.engine, job.request(ids, prompt), job.drafter, width=job.width, repeats=settings.repeats)
    if job.output:
        job.output.write(result.record())
    if job.as_json:
        console.emit_json(result.record())
    else:
        show.finished_answer(job.engine, result.drafted, job.coloured)
        show.legend(result.drafted.stats, job.coloured)
        show.comparison(result, job.title, settings.repeats)
    verdict = {"speedup": result.speedup, "identical": result.identical, "bit_exact": result.bit_exact}
    methods = {"full": result.full.record(), job.drafter.name: {**result.drafted.record(), **verdict}}
    write_page(job, prompt, ids, result.drafted, methods)


def answer_comprehensive(job: Job, prompt: str, ids: list[int]) -> None:
    """Full, fixed drafts of every head, every calibrated level; the page shows the fastest that drafts."""
    from early_exit_cli.evaluation.comprehensive import all_methods, run_all

    settings = job.settings
    methods = all_methods(job.engine, job.width, settings.read_heads)
    with console.progress("runs", len(methods) * settings.repeats) as ticker:
        results = run_all(job.engine, job.request(ids, prompt), methods, settings.repeats, ticker.update)
    records = {name: result.record() for name, result in results.items()}
    best = max(
        (result.run for name, result in results.items() if name != "full"), key=lambda r: r.stats.tokens_per_second
    )
    if job.output:
        job.output.write(records)
    if job.as_json:
        console.emit_json(records)
    else:
        show.finished_answer(job.engine, best, job.coloured)
        show.legend(best.stats, job.coloured)
        show.all_methods(results, job.title, settings.repeats)
    write_page(job, prompt, ids, best, records)


def write_page(job: Job, prompt: str, ids: list[int], shown: Generation, methods: dict[str, dict[str, Any]]) -> None:
    """The page of `--html`, where one is wanted."""
    if job.settings.html:
        show.write_page(job.settings.html, job.engine, prompt, len(ids), shown, methods, job.level)
