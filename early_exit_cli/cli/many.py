"""`eexit infer --prompts`: a record for every row, whatever becomes of the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from early_exit_cli.cli.job import Job, encode, warm_up
from early_exit_cli.errors import EexitError, StepError, doing
from early_exit_cli.report import console
from early_exit_cli.report.answer_text import AnswerWriter
from early_exit_cli.report.numbers import rate, verdict
from early_exit_cli.steps import step

if TYPE_CHECKING:
    from early_exit_cli.data.rows import PromptRow
    from early_exit_cli.decoding.answer import Generation

COPIED = ("question_id", "category")
"""Columns of a row that its record holds too."""


class Answers:
    """What became of the rows: token ids of those that can be asked, records, and what is wrong with the others.

    Each answer is shown and each record written as it comes.
    """

    def __init__(self, job: Job, rows: list[PromptRow]) -> None:
        self.job, self.rows = job, rows
        self.writer = AnswerWriter(job.coloured)
        self.encoded: dict[int, list[int]] = {}
        self.records: dict[int, dict[str, Any]] = {}
        self.failed = 0
        for place, row in enumerate(rows):
            try:
                if row.error is not None:
                    self.fail(place, row.error)
                else:
                    self.encoded[place] = encode(job.engine, job.settings, row.prompt)
            except EexitError as error:
                self.fail(place, error.message)

    def announce(self, place: int) -> None:
        """On stdout, before the answer of a row."""
        if not self.job.as_json:
            category = self.rows[place].columns.get("category")
            about = f", {category}" if category else ""
            console.heading(f"prompt {place + 1} of {len(self.rows)}{about}")

    def streamed(self, piece: str, decider: str) -> None:
        """A piece of the answer that is being made."""
        if not self.job.as_json:
            self.writer.write(piece, decider)

    def end(self) -> None:
        """The answer on stdout is over."""
        if not self.job.as_json:
            self.writer.end()

    def keep(self, place: int, found: dict[str, Any]) -> None:
        """A row has its answer."""
        self._record(place, {"prompt_tokens": len(self.encoded[place]), **found})

    def fail(self, place: int, message: str) -> None:
        """A row has no answer: said at once."""
        self.failed += 1
        self._record(place, {"error": message})
        console.warn(f"{self.rows[place].place}: {message}")

    def _record(self, place: int, found: dict[str, Any]) -> None:
        row = self.rows[place]
        known = {key: row.columns[key] for key in COPIED if key in row.columns}
        self.records[place] = {"row": row.number, **known, **found}
        if self.job.output:
            self.job.output.write(self.records[place])

    def in_order(self) -> list[dict[str, Any]]:
        """The records there are, in the order of their rows."""
        return [self.records[place] for place in sorted(self.records)]


def answer_many(job: Job, rows: list[PromptRow]) -> None:
    """Answer all rows that can be; print what there is, also when the run is interrupted.

    Raises:
        StepError: rows without an answer, after everything was printed.
    """
    answers = Answers(job, rows)
    answer = answer_in_batches if job.settings.batch > 1 else answer_in_turn
    started = time.perf_counter()
    try:
        if answers.encoded:
            with step("warming up"):
                warm_up(job, next(iter(answers.encoded.values())), job.drafter)
            started = time.perf_counter()
            with console.progress("prompts", len(answers.encoded), beside_results=not job.as_json) as ticker:
                answer(job, answers, ticker.update)
    finally:
        report(job, answers, time.perf_counter() - started)
    if answers.failed:
        raise StepError(f"{answers.failed} of {len(rows)} prompts have no answer")


def answer_in_turn(job: Job, answers: Answers, on_answer: Callable[[int], None]) -> None:
    """One prompt after another."""
    from early_exit_cli.evaluation.compare import compare

    settings = job.settings
    for done, (place, ids) in enumerate(answers.encoded.items(), start=1):
        try:
            with doing("answering"):
                request = job.request(ids, answers.rows[place].prompt)
                answers.announce(place)
                if settings.mode == "compare":
                    compared = compare(job.engine, request, job.drafter, width=job.width, repeats=settings.repeats)
                    answers.streamed(compared.drafted.text, "backbone")
                    found = compared.record()
                else:
                    found = {job.drafter.name: job.generate(request, on_text=answers.streamed).record()}
                answers.keep(place, found)
        except EexitError as error:
            answers.fail(place, error.message)
        finally:
            answers.end()
        on_answer(done)


def answer_in_batches(job: Job, answers: Answers, on_answer: Callable[[int], None]) -> None:
    """`--batch` prompts at a time in the same passes; where that fails, those without an answer one after another, to find
    whose fault it is."""
    from early_exit_cli.decoding.batch import generate_batch

    places = [*answers.encoded]
    requests = [job.request(ids, answers.rows[place].prompt) for place, ids in answers.encoded.items()]

    def on_end(number: int, run: Generation) -> None:
        answers.announce(places[number])
        answers.streamed(run.text, "backbone")
        answers.end()
        answers.keep(places[number], {job.drafter.name: run.record()})
        on_answer(len(answers.records))

    try:
        with doing("answering"):
            generate_batch(
                job.engine,
                requests,
                job.drafter,
                mode=job.drafter.name,
                batch=job.settings.batch,
                width=job.width,
                on_end=on_end,
            )
    except EexitError:
        answers.encoded = {place: ids for place, ids in answers.encoded.items() if place not in answers.records}
        answer_in_turn(job, answers, on_answer)


def report(job: Job, answers: Answers, seconds: float) -> None:
    """The records as JSON, or their speeds as a table."""
    records = answers.in_order()
    if job.as_json:
        console.emit_json({"records": records})
        return
    methods = ["full", job.drafter.name] if job.settings.mode == "compare" else [job.drafter.name]
    compared = ["speed-up", "text"] if job.settings.mode == "compare" else []
    rows: list[tuple[Any, ...]] = []
    for place in sorted(answers.records):
        record = answers.records[place]
        if "error" in record:
            continue
        stats = record[methods[-1]]["stats"]
        speeds = [rate(record[method]["stats"]["tokens_per_second"]) for method in methods]
        extra = [f"{record['speedup']:.2f}x", verdict(record["identical"], record["bit_exact"])] if compared else []
        ends = record[methods[-1]]["finish_reason"]
        rows.append(
            (
                place + 1,
                str(record.get("category", "")),
                record["prompt_tokens"],
                stats["total_tokens_generated"],
                ends,
                *speeds,
                *extra,
            )
        )
    columns = ["prompt", "category", "tokens read", "written", "ends", *(f"{method} tokens/s" for method in methods)]
    if rows:
        console.table("", [*columns, *compared], rows)
    if job.settings.batch > 1:
        tokens = sum(row[3] for row in rows)
        console.note(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s in batches")
