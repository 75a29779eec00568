"""What a trainer can train: the exit heads of a bundle, or its EAGLE head, behind one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from early_exit_cli.bundle.files import (
    HEADS_FILE,
    eagle_file,
    kind_of_heads,
    read_bundle_config,
    read_bundle_record,
)
from early_exit_cli.bundle.save import save_bundle, save_eagle
from early_exit_cli.config import HeadsConfig
from early_exit_cli.errors import BundleError, shown
from early_exit_cli.files.forms import to_block_numbers
from early_exit_cli.files.schemas import RecordForm
from early_exit_cli.heads.eagle import EagleHead, load_eagle
from early_exit_cli.heads.exit_heads import DRAFT_VOCAB, ExitHeads, load_heads
from early_exit_cli.hidden_states.states import Prediction, States, StateSource
from early_exit_cli.training.distillation import draft_vocabulary


class Student(Protocol):
    """Something trainable that predicts what the backbone says."""

    parts: list[str]
    """Names of its predictions, in order: heads, or steps."""
    exit_layers: list[int]
    variation: float
    """Share of total variation in the loss."""
    only_answers: bool
    """Whether it learns nothing from the positions of a prompt, which is never drafted."""

    @property
    def module(self) -> nn.Module:
        """Its parameters; called as `predict` calls it."""

    @property
    def draft_vocab(self) -> Tensor | None: ...

    def predict(self, module: nn.Module, states: States, *, only_measured: bool = False) -> list[Prediction]:
        """A prediction for each part, by `module`: the student's own, or what accelerate wrapped around it."""

    def token_ids(self, columns: Tensor) -> Tensor: ...

    def save(self, folder: Path, training_config: dict[str, Any], record: dict[str, Any]) -> None:
        """Into a bundle."""

    def identity(self) -> dict[str, Any]:
        """What must be equal when a run is resumed."""


class ExitStudent:
    """All exit heads of a bundle, trained together."""

    variation = 0.0
    only_answers = False

    def __init__(self, source: StateSource, config: HeadsConfig) -> None:
        self.view, self.exit_layers = source.view, source.exit_layers
        vocab = draft_vocabulary(source.token_counts(), config.draft_vocab, self.view.eos_token_ids)
        self.module = ExitHeads(
            self.view, config.kind, self.exit_layers, config.rank, None if config.kind == "linear" else vocab
        ).to(self.view.device)
        self.module.start_from(self.view)
        if config.start_from is not None:
            folder, record = _same_heads(config.start_from, "heads", self.exit_layers)
            made = kind_of_heads(record, folder)
            if (made.kind, made.rank) != (config.kind, self.module.rank):
                raise BundleError(
                    f"{folder} has {made.kind} heads of rank {made.rank}", hint="--head and --rank as there"
                )
            _take_over(self.module, load_heads(folder / HEADS_FILE, self.view, made.kind, self.exit_layers, made.rank))
        self.parts = [f"head {head}, after {layer} blocks" for head, layer in enumerate(self.exit_layers)]

    @property
    def draft_vocab(self) -> Tensor | None:
        return self.module.draft_vocab

    def predict(self, module: nn.Module, states: States, *, only_measured: bool = False) -> list[Prediction]:
        learned = states.measured if only_measured else torch.ones_like(states.measured)
        positions = learned.nonzero()[:, 0]
        return [Prediction(logits, positions) for logits in module(states, positions)]

    def token_ids(self, columns: Tensor) -> Tensor:
        return self.module.token_ids(columns)

    def save(self, folder: Path, training_config: dict[str, Any], record: dict[str, Any]) -> None:
        save_bundle(folder, self.view, self.module, training_config, record)

    def identity(self) -> dict[str, Any]:
        blocks = to_block_numbers(self.exit_layers)
        return {"head_layer_indices": blocks, "kind": self.module.kind, "rank": self.module.rank}


class EagleStudent:
    """An EAGLE head, trained in roll-outs of `config.roll_out` steps."""

    only_answers = True

    def __init__(self, source: StateSource, config: HeadsConfig) -> None:
        self.view, self.exit_layers = source.view, source.exit_layers
        self.steps, self.variation = config.roll_out, config.variation
        vocab = draft_vocabulary(source.token_counts(), config.draft_vocab, self.view.eos_token_ids)
        self.module = EagleHead(self.view, self.exit_layers, vocab).to(self.view.device)
        self.module.start_from(self.view)
        if config.start_from is not None:
            folder, _ = _same_heads(config.start_from, "eagle", self.exit_layers)
            _take_over(self.module, load_eagle(eagle_file(folder), self.view, self.exit_layers))
        self.parts = [f"draft position {step + 1}" for step in range(self.steps)]

    @property
    def draft_vocab(self) -> Tensor | None:
        return self.module.draft_vocab

    def predict(self, module: nn.Module, states: States, *, only_measured: bool = False) -> list[Prediction]:
        return module(states, self.steps, only_measured)

    def token_ids(self, columns: Tensor) -> Tensor:
        return self.module.token_ids(columns)

    def save(self, folder: Path, training_config: dict[str, Any], record: dict[str, Any]) -> None:
        save_eagle(folder, self.view, self.module, training_config, record)

    def identity(self) -> dict[str, Any]:
        return {"kind": "eagle", "exit_layers": self.exit_layers, "roll_out": self.steps}


def _same_heads(folder: Path, kind: str, exit_layers: list[int]) -> tuple[Path, RecordForm]:
    """A bundle to start from, and its record.

    Raises:
        BundleError: no bundle, or without such heads after the same blocks.
    """
    record = read_bundle_record(folder)
    if kind == "eagle":
        found = [] if record.eagle is None else record.eagle.exit_layers
        if record.eagle is not None and record.eagle.layout is not None:
            raise BundleError(f"cannot start from {folder}: its EAGLE head was trained elsewhere, in another layout")
    else:
        found = read_bundle_config(folder).exit_layers
    if found != exit_layers:
        has = f"heads after {shown(found)} blocks" if found else "no such heads"
        raise BundleError(f"cannot start from {folder}: it has {has}, and these read after {shown(exit_layers)}")
    return folder, record


def _take_over(module: nn.Module, found: nn.Module) -> None:
    """The weights of `found`, but not its draft vocabulary."""
    weights = {name: value for name, value in found.state_dict().items() if name != DRAFT_VOCAB}
    module.load_state_dict(weights, strict=False)


def make_student(source: StateSource, config: HeadsConfig) -> Student:
    """What the configuration asks for, with its starting weights."""
    return EagleStudent(source, config) if config.kind == "eagle" else ExitStudent(source, config)
