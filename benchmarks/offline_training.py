"""What offline training costs: from the cache, from memory, and beside the running backbone, in turns in one run.

    python benchmarks/offline_training.py CACHE_DIR [--steps 6] [--rounds 3]

The cache must hold answers that are still known (`eexit cache extract --on-policy`). Tokens per second, medians over
rounds; then where an offline step's time goes; then the peak memory over this cache, for comparison with a larger one.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch

from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.config import BackboneConfig, HeadsConfig, TrainingConfig
from early_exit_cli.data.load import load_documents
from early_exit_cli.hidden_states.cache import Cache
from early_exit_cli.hidden_states.cached import CachedStates
from early_exit_cli.hidden_states.live import BackboneStates
from early_exit_cli.training.distillation import distillation_loss, teach
from early_exit_cli.training.students import Student
from early_exit_cli.training.trainer import Lessons, Trainer


class InMemory(CachedStates):
    """The same batches, read before the clock starts."""

    def read_all(self, steps: int) -> None:
        self.kept = [super(InMemory, self).batch(number, 0, 1) for number in range(steps)]

    def batch(self, number, rank, world):
        return self.kept[number % len(self.kept)]


def trainer(source, folder):
    config = TrainingConfig(output_dir=Path(folder), max_steps=10_000, eval_every=10_000, save_every=10_000)
    return Trainer(Lessons(source), HeadsConfig(), config, source.cache.data if hasattr(source, "cache") else DATA, {})


def rate(run: Trainer, steps: int) -> float:
    """Tokens per second of so many optimizer steps."""
    seen, started = run.tokens_seen, time.perf_counter()
    for _ in range(steps):
        run.advance()
    return (run.tokens_seen - seen) / (time.perf_counter() - started)


def where_time_goes(source: CachedStates, student: Student) -> dict[str, float]:
    """Milliseconds of the parts of one step."""
    times: dict[str, list[float]] = {"read": [], "teach": [], "heads": [], "loss": [], "backward": []}
    for number in range(5):
        marks = [time.perf_counter()]
        states = source.batch(number, 0, 1)
        marks.append(time.perf_counter())
        with torch.no_grad():
            teacher = teach(source.view, states, student.draft_vocab)
        marks.append(time.perf_counter())
        with torch.autocast("cpu", torch.bfloat16):
            said = student.predict(student.module, states)
        marks.append(time.perf_counter())
        loss = sum(distillation_loss(each.logits, teacher.at(each.positions)) for each in said)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        for name, (begin, end) in zip(times, zip(marks, marks[1:], strict=False), strict=True):
            times[name].append((end - begin) * 1000)
    return {name: round(statistics.median(values), 1) for name, values in times.items()}


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("cache", type=Path)
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--dataset", type=Path, help="where the text is now, if it moved")
parser.add_argument(
    "--memory-only", action="store_true", help="160 batches from the cache, 10 of them trained on, then the peak memory"
)
arguments = parser.parse_args()
cache = Cache(arguments.cache)
DATA = cache.data.model_copy(update={"dataset_name": str(arguments.dataset)} if arguments.dataset else {})
settings = TrainingConfig()
with tempfile.TemporaryDirectory() as scratch:
    cached = CachedStates(cache, None, settings, torch.device("cpu"))
    if arguments.memory_only:
        run = trainer(cached, f"{scratch}/cached")
        for number in range(160):
            cached.batch(number, 0, 1)
            if number % 16 == 0:
                run.advance()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{cache.tokens} tokens, {cache.total_bytes / 1e6:.0f} MB on disk: peak memory {peak:.0f} MB")
        raise SystemExit
    memory = InMemory(cache, None, settings, torch.device("cpu"))
    memory.read_all(arguments.steps)
    backbone = load_backbone(BackboneConfig())
    train, held_out = (load_documents(DATA, backbone, split) for split in ("train", "eval"))
    online = BackboneStates(backbone, cache.exit_layers, train, held_out, DATA, settings)
    runs = {
        name: trainer(source, f"{scratch}/{name}")
        for name, source in (("cached", cached), ("memory", memory), ("online", online))
    }
    for run in runs.values():
        run.advance()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            rates[name].append(rate(run, arguments.steps if name != "online" else max(2, arguments.steps // 3)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print({name: round(value) for name, value in medians.items()}, "tokens/s")
    print(f"cached over online {medians['cached'] / medians['online']:.2f}x")
    print(f"memory over cached {medians['memory'] / medians['cached']:.2f}x")
    print("ms of a step:", where_time_goes(cached, runs["cached"].student))
