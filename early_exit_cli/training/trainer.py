"""Training exit heads: one loop, beside the running, frozen backbone or from a cache of its hidden states.

One step: every head reads the states after its exit layer and learns the backbone's own distribution for the same
position by KL divergence. Where states come from is a `StateSource`. `accelerate` carries processes, accumulation and
checkpoints. Several trainers can go through the same source together: each batch is then read, and taught, once.

On disk, under `output_dir`: the best bundle so far (by held-out agreement, averaged over heads), `last/` with the newest
one, `checkpoints/step-N/` with what resuming needs. Everything is written to a temporary sibling and renamed; a folder
without its marker is not a checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from early_exit_cli.config import DataConfig, HeadsConfig, TrainingConfig
from early_exit_cli.errors import CheckpointError, DataError, NumericsError
from early_exit_cli.files.atomic import atomic_folder, write_errno, write_json
from early_exit_cli.files.schemas import MarkerForm
from early_exit_cli.hidden_states.states import States, StateSource
from early_exit_cli.numerics import bfloat16_products, require_finite
from early_exit_cli.training.checkpoints import KEPT_CHECKPOINTS, MARKER, complete_checkpoints, resumable
from early_exit_cli.training.distillation import Teacher, distillation_loss, teach
from early_exit_cli.training.launch import stop_requests
from early_exit_cli.training.students import Student, make_student


@dataclass(frozen=True)
class StepReport:
    """Progress of one optimizer step; losses are per head, in nats."""

    step: int
    max_steps: int
    losses: list[float]
    learning_rate: float
    tokens_per_second: float
    agreement: list[float] | None
    """Held-out agreement per head, when this step evaluated."""


@dataclass(frozen=True)
class TrainingResult:
    """Where the bundles are and how good the heads became on held-out text."""

    output_dir: str
    steps: int
    tokens_seen: int
    seconds: float
    exit_layers: list[int]
    parts: list[str]
    """What each agreement is of: a head, or a step of the EAGLE head."""
    best_step: int
    best_agreement: list[float]
    last_agreement: list[float]


class Lessons:
    """States, and what the backbone says of them, made once for all trainers that ask for the same batch."""

    def __init__(self, source: StateSource) -> None:
        self.source = source
        self._key: tuple[int, int, int] | None = None
        self._states: States | None = None
        self._teachers: list[tuple[Student, Teacher]] = []

    def get(self, number: int, rank: int, world: int, student: Student) -> tuple[States, Teacher]:
        """The number-th training batch of a process, and what this student shall learn of it."""
        if self._states is None or self._key != (number, rank, world):
            with torch.no_grad():
                self._states = self.source.batch(number, rank, world)
            self._key, self._teachers = (number, rank, world), []
        for other, teacher in self._teachers:
            if other.only_answers == student.only_answers and _same_vocab(other.draft_vocab, student.draft_vocab):
                return self._states, teacher
        with torch.no_grad():
            teacher = teach(self.source.view, self._states, student.draft_vocab, student.only_answers)
        self._teachers.append((student, teacher))
        return self._states, teacher


def _same_vocab(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


class Trainer:
    """The training of one set of heads: `run` goes from the current step to the end."""

    def __init__(
        self,
        lessons: Lessons,
        heads_config: HeadsConfig,
        config: TrainingConfig,
        data_config: DataConfig,
        record: dict[str, Any],
    ) -> None:
        self.lessons, self.source, self.view = lessons, lessons.source, lessons.source.view
        self.config, self.data_config, self.record = config, data_config, record
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=self.view.device.type == "cpu",
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=str(config.output_dir),
        )
        set_seed(config.seed)
        self.student = make_student(self.source, heads_config)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.place = (rank, world)
        if not self.source.sequences(rank, world):
            raise DataError(
                "too little training text: less than one sequence for each process",
                hint="--max-length N, or more text",
            )
        warmup = math.ceil(0.05 * config.max_steps) if config.warmup_steps is None else config.warmup_steps
        from transformers import get_cosine_schedule_with_warmup

        optimizer = self._optimizer()
        # accelerate steps a prepared scheduler once per process and step; the counts are scaled to match.
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup * world, max(config.max_steps, 1) * world)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(self.student.module, optimizer, schedule)
        self.step = 0
        self.tokens_seen = 0
        self.best_step, self.best_agreement = 0, [-1.0] * len(self.student.parts)
        self.last_agreement: list[float] = []
        self.started, self.seen_before = time.perf_counter(), 0
        if config.resume:
            self._resume()

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [
            {
                "params": [p for p in self.student.module.parameters() if p.ndim > 1],
                "weight_decay": self.config.weight_decay,
            },
            {"params": [p for p in self.student.module.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        eight_bit = self.config.optimizer == "adamw8bit" or (
            self.config.optimizer == "auto" and self.view.quantization != "none" and self.view.device.type == "cuda"
        )
        if eight_bit:
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(parameters, lr=self.config.lr)
        return torch.optim.AdamW(parameters, lr=self.config.lr)

    def run(self, on_step: Callable[[StepReport], None] | None = None) -> TrainingResult:
        """Train to max_steps. Ctrl-C writes a checkpoint and goes on as KeyboardInterrupt.

        Raises:
            NumericsError: a loss that is not finite, with the step.
        """
        (result,) = train_together([self], lambda _, report: on_step(report) if on_step else None)
        return result

    def begin(self) -> None:
        """Before the first step."""
        self.started, self.seen_before = time.perf_counter(), self.tokens_seen
        self.accelerator.init_trackers("eexit", config=json.loads(self.config.model_dump_json()))

    def advance(self) -> StepReport:
        """One optimizer step, and what is due after it: evaluation, bundle, checkpoint."""
        config = self.config
        losses = self._optimizer_step()
        self.step += 1
        last = self.step == config.max_steps
        agreement = self.evaluate() if last or self.step % config.eval_every == 0 else []
        if agreement:
            self._keep(agreement)
        if last or self.step % config.save_every == 0:
            self.save_checkpoint()
        report = StepReport(
            self.step,
            config.max_steps,
            losses,
            self.schedule.get_last_lr()[0],
            (self.tokens_seen - self.seen_before) / (time.perf_counter() - self.started),
            agreement or None,
        )
        self._track(report)
        return report

    def finish(self) -> TrainingResult:
        """After the last step."""
        if not self.last_agreement:  # nothing was left to do: max_steps 0, or a resumed run that was complete
            self._keep(self.evaluate())
        self.accelerator.end_training()
        return TrainingResult(
            str(self.config.output_dir),
            self.step,
            self.tokens_seen,
            time.perf_counter() - self.started,
            self.student.exit_layers,
            self.student.parts,
            self.best_step,
            self.best_agreement,
            self.last_agreement,
        )

    def _optimizer_step(self) -> list[float]:
        sums = [0.0] * len(self.student.parts)
        accumulation = self.config.gradient_accumulation_steps
        for micro in range(accumulation):
            number = self.step * accumulation + micro
            states, teacher = self.lessons.get(number, *self.place, self.student)
            with self.accelerator.accumulate(self.model):
                with bfloat16_products(self.view.device, self.view.dtype):
                    predictions = self.student.predict(self.model, states, only_measured=self.student.only_answers)
                losses = [
                    distillation_loss(said.logits, teacher.at(said.positions), self.student.variation)
                    for said in predictions
                ]
                self.accelerator.backward(torch.stack(losses).sum())
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            for head, loss in enumerate(losses):
                sums[head] += float(loss.detach()) / accumulation
            self.tokens_seen += states.final.shape[0] * self.accelerator.num_processes
        if not all(math.isfinite(value) for value in sums):
            raise NumericsError(f"the loss is not finite at step {self.step + 1}: {sums}", hint="lower --lr")
        return sums

    def evaluate(self) -> list[float]:
        """Held-out agreement per part: share of predictions whose argmax equals the backbone's."""
        hits = torch.zeros(len(self.student.parts), dtype=torch.float64)
        totals = torch.zeros_like(hits)
        with torch.no_grad():
            for states in self.source.held_out():
                choices = torch.full(states.measured.shape, -1, device=states.final.device)
                measured = F.linear(states.final[states.measured], self.view.lm_head_weight, self.view.lm_head_bias)
                best, choices[states.measured] = measured.max(-1)
                require_finite(best)
                with bfloat16_products(self.view.device, self.view.dtype):
                    predictions = self.student.predict(self.student.module, states, only_measured=True)
                for part, said in enumerate(predictions):
                    hits[part] += (
                        (self.student.token_ids(said.logits.argmax(-1)) == choices[said.positions]).sum().cpu()
                    )
                    totals[part] += said.positions.numel()
        return (hits / totals.clamp(min=1)).tolist()

    def _keep(self, agreement: list[float]) -> None:
        """Write last/, and the best bundle when this is the best so far."""
        self.last_agreement = agreement
        better = sum(agreement) > sum(self.best_agreement)
        if better:
            self.best_step, self.best_agreement = self.step, agreement
        if self.accelerator.is_main_process:
            training_config = {
                "dataset_name": self.data_config.dataset_name,
                "dataset_config_name": self.data_config.dataset_config_name,
                **{
                    key: getattr(self.config, key)
                    for key in ("batch_size", "gradient_accumulation_steps", "max_steps", "lr", "mode")
                },
                "max_length": self.data_config.max_length,
            }
            record = {
                "training": {
                    "step": self.step,
                    "tokens_seen": self.tokens_seen,
                    "agreement": agreement,
                    "data": json.loads(self.data_config.model_dump_json()),
                    **self.record,
                }
            }
            for folder in [self.config.output_dir / "last", *([self.config.output_dir] if better else [])]:
                self.student.save(folder, training_config, record)
        self.accelerator.wait_for_everyone()

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed."""
        config = json.loads(
            self.config.model_dump_json(exclude={"output_dir", "resume", "eval_every", "save_every", "report_to"})
        )
        return {
            "world_size": self.accelerator.num_processes,
            **self.source.identity(),
            **self.student.identity(),
            **config,
        }

    def save_checkpoint(self) -> None:
        """Write checkpoints/step-N, marker last, and drop all but the newest two."""
        folder = self.config.output_dir / "checkpoints"
        target = folder / f"step-{self.step:07d}"
        state = MarkerForm(
            step=self.step,
            tokens_seen=self.tokens_seen,
            best_step=self.best_step,
            best_agreement=self.best_agreement,
            identity=self._identity(),
        ).model_dump()
        try:
            if self.accelerator.num_processes == 1:
                with atomic_folder(target) as temporary:
                    self.accelerator.save_state(str(temporary), safe_serialization=True)
                    write_json(temporary / MARKER, state)
            else:  # all processes write into one folder, which counts once its marker is there
                if self.accelerator.is_main_process:
                    shutil.rmtree(target, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                self.accelerator.save_state(str(target), safe_serialization=True)
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    write_json(target / MARKER, state)
        except Exception as error:  # torch says in its own way that a file cannot be written
            number = write_errno(error)
            reason = " ".join(str(error).split())[:200] if number is None else os.strerror(number)
            raise CheckpointError(
                f"cannot write the checkpoint {target}: {reason}",
                hint="earlier ones are kept: --resume goes on from there",
            ) from error
        if self.accelerator.is_main_process:
            there = complete_checkpoints(self.config.output_dir)
            ours = there[: there.index(target) + 1]  # later ones are of a run that this one began anew
            for old in {*there} - {*ours[-KEPT_CHECKPOINTS:]}:
                shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        found = resumable(self.config.output_dir, self._identity())
        if found is None:
            return
        folder, state = found
        try:
            self.accelerator.load_state(str(folder))
        except Exception as error:  # a damaged file fails in any way it likes
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {' '.join(str(error).split())[:200]}",
                hint=f"remove it to go on from the one before: rm -r {folder}",
            ) from error
        self.step, self.tokens_seen = state.step, state.tokens_seen
        self.best_step, self.best_agreement = state.best_step, state.best_agreement

    def _track(self, report: StepReport) -> None:
        values: dict[str, Any] = {
            "tokens_per_second": report.tokens_per_second,
            "learning_rate": report.learning_rate,
        }
        for part, loss in zip(self.student.parts, report.losses, strict=True):
            values[f"{part}/loss"] = loss
        for part, share in zip(self.student.parts, report.agreement or []):  # noqa: B905 (empty between evaluations)
            values[f"{part}/agreement"] = share
        self.accelerator.log(values, step=report.step)


def train_together(
    trainers: list[Trainer], on_step: Callable[[int, StepReport], None] | None = None
) -> list[TrainingResult]:
    """Train all to the end, step by step in turns. Ctrl-C writes checkpoints and goes on as KeyboardInterrupt.

    Args:
        trainers: sharing their lessons, so that each batch is read once.
        on_step: called with (index of the trainer, report) in the main process.
    """
    for trainer in trainers:
        trainer.begin()
    try:
        with stop_requests() as stopped:
            while True:
                unfinished = [trainer for trainer in trainers if trainer.step < trainer.config.max_steps]
                if not unfinished:
                    break
                step = min(trainer.step for trainer in unfinished)
                for trainer in [trainer for trainer in unfinished if trainer.step == step]:
                    report = trainer.advance()
                    if on_step and trainer.accelerator.is_main_process:
                        on_step(trainers.index(trainer), report)
                if stopped():
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        for trainer in trainers:
            trainer.save_checkpoint()
        raise
    return [trainer.finish() for trainer in trainers]


def result_record(result: TrainingResult) -> dict[str, Any]:
    """The result as JSON."""
    return asdict(result)
