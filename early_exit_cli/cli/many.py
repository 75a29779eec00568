"""`eexit infer --prompts`: a record for every row, whatever becomes of the others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from early_exit_cli.cli.job import Job, encode, warm_up
from early_exit_cli.errors import EexitError, StepError, doing
from early_exit_cli.report import console

if TYPE_CHECKING:
    from early_exit_cli.data.rows import PromptRow

COPIED = ("question_id", "category")
"""Columns of a row that its record holds too."""


class Answers:
    """What became of the rows: token ids of those that can be asked, records, and what is wrong with the others."""

    def __init__(self, job: Job, rows: list[PromptRow]) -> None:
        self.rows = rows
        self.encoded: dict[int, list[int]] = {}
        self.found: dict[int, dict[str, Any]] = {}
        self.faults: dict[int, str] = {}
        for place, row in enumerate(rows):
            try:
                if row.error is not None:
                    self.fail(place, row.error)
                else:
                    self.encoded[place] = encode(job.engine, job.settings, row.prompt)
            except EexitError as error:
                self.fail(place, error.message)

    def fail(self, place: int, message: str) -> None:
        """A row has no answer: said at once."""
        self.faults[place] = message
        console.warn(f"{self.rows[place].place}: {message}")

    def records(self) -> list[dict[str, Any]]:
        """A record for every row that has an answer or a fault, in their order."""
        records = []
        for place, row in enumerate(self.rows):
            known = {key: row.columns[key] for key in COPIED if key in row.columns}
            if place in self.found:
                records.append({**known, "prompt_tokens": len(self.encoded[place]), **self.found[place]})
            elif place in self.faults:
                records.append({**known, "row": row.number, "error": self.faults[place]})
        return records


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
            warm_up(job, next(iter(answers.encoded.values())), job.drafter)
            started = time.perf_counter()
            with console.progress("prompts", len(answers.encoded)) as ticker:
                answer(job, answers, ticker.update)
    finally:
        report(job, answers, time.perf_counter() - started)
    if answers.faults:
        raise StepError(f"{len(answers.faults)} of {len(rows)} prompts have no answer")


def answer_in_turn(job: Job, answers: Answers, on_answer: Callable[[int], None]) -> None:
    """One prompt after another."""
    from early_exit_cli.decoding.answer import generate
    from early_exit_cli.evaluation.compare import compare

    settings = job.settings
    for place, ids in answers.encoded.items():
        try:
            with doing("answering"):
                request = job.request(ids)
                if settings.mode == "compare":
                    compared = compare(job.engine, request, job.drafter, width=job.width, repeats=settings.repeats)
                    answers.found[place] = compared.record()
                else:
                    run = generate(job.engine, request, job.drafter, mode=job.drafter.name, width=job.width)
                    answers.found[place] = {job.drafter.name: run.record()}
        except EexitError as error:
            answers.fail(place, error.message)
        on_answer(len(answers.found))


def answer_in_batches(job: Job, answers: Answers, on_answer: Callable[[int], None]) -> None:
    """`--batch` prompts at a time in the same passes; where that fails, one after another, to find whose fault it is."""
    from early_exit_cli.decoding.batch import generate_batch

    requests = [dataclasses.replace(job.request(ids), chooser=job.chooser.fork()) for ids in answers.encoded.values()]
    try:
        with doing("answering"):
            runs = generate_batch(
                job.engine,
                requests,
                job.drafter,
                mode=job.drafter.name,
                batch=job.settings.batch,
                width=job.width,
                on_end=on_answer,
            )
    except EexitError:
        answer_in_turn(job, answers, on_answer)
        return
    answers.found = {place: {job.drafter.name: run.record()} for place, run in zip(answers.encoded, runs, strict=True)}


def report(job: Job, answers: Answers, seconds: float) -> None:
    """The records as JSON, or their speeds as a table."""
    records = answers.records()
    if job.as_json:
        console.emit_json({"records": records})
        return
    methods = ["full", job.drafter.name] if job.settings.mode == "compare" else [job.drafter.name]
    rows: list[tuple[Any, ...]] = []
    for number, record in enumerate(records):
        if "error" in record:
            continue
        speeds = [f"{record[method]['stats']['tokens_per_second']:.1f}" for method in methods]
        extra = [f"{record['speedup']:.2f}x", record["identical"], record["bit_exact"]] if "speedup" in record else []
        rows.append((number, str(record.get("category", "")), record["prompt_tokens"], *speeds, *extra))
    compared = ["speed-up", "identical", "bit-exact"] if job.settings.mode == "compare" else []
    console.table("tokens/s", ["prompt", "category", "tokens", *methods, *compared], rows, result=True)
    if job.settings.batch > 1:
        tokens = sum(
            record[methods[0]]["stats"]["total_tokens_generated"] for record in records if methods[0] in record
        )
        console.note(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s in batches")
