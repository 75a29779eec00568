"""Steps that several commands share: settings a bundle already knows, and held-out sequences."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from early_exit_cli.config import BackboneConfig, DataConfig
from early_exit_cli.errors import DataError
from early_exit_cli.report import console
from early_exit_cli.resolve import Resolved
from early_exit_cli.steps import step

if TYPE_CHECKING:
    from early_exit_cli.backbone.backbone import Backbone
    from early_exit_cli.data.documents import Document, Split
    from early_exit_cli.data.packing import Batch
    from early_exit_cli.data.rows import Reading
    from early_exit_cli.engine import Engine


def load_libraries() -> None:
    """PyTorch and transformers, which take seconds, before anything of ours imports them."""
    with step("loading PyTorch"):
        importlib.import_module("torch")
        importlib.import_module("transformers")


def backbone_of_bundle(resolved: Resolved) -> BackboneConfig:
    """The backbone section, with name and quantization taken from the bundle unless somebody set them."""
    from early_exit_cli.bundle.load import bundle_source, with_names_of_bundle

    source = bundle_source(resolved.config.bundle)
    if source.commit:
        console.note(f"{source.repo_id} at {source.commit}")
    return with_names_of_bundle(resolved.config.backbone, source.folder)


def is_without_heads(resolved: Resolved) -> bool:
    """Whether a backbone or its precision was named, and no bundle, and the bundle that is taken otherwise has heads of another."""
    from early_exit_cli.bundle.files import read_bundle_config
    from early_exit_cli.bundle.load import bundle_folder

    names_model, names_precision = (
        not resolved.is_default(f"backbone.{name}") for name in ("model_name", "quantization")
    )
    if not resolved.is_default("bundle.bundle") or not (names_model or names_precision):
        return False
    known, backbone = read_bundle_config(bundle_folder(resolved.config.bundle)), resolved.config.backbone
    if not names_model:
        return known.quantization != backbone.quantization
    same = (known.model_name, known.quantization) == (backbone.model_name, backbone.quantization)
    return not same or backbone.revision is not None


def data_of_bundle(resolved: Resolved, folder: Path) -> Reading:
    """The data set, read before a model loads; without one named, that which the bundle's heads were trained on, so that its
    split is the same.

    Raises:
        DataError: its text cannot be read.
    """
    from early_exit_cli.bundle.files import read_bundle_record
    from early_exit_cli.data.rows import read_data

    record = read_bundle_record(folder)
    trained = record.training.data
    if trained is None and record.eagle is not None and record.eagle.training is not None:
        trained = record.eagle.training.data
    if not resolved.is_default("data.dataset_name") or trained is None:
        return read_data(resolved.config.data)
    set_here = {
        key.split(".")[1]: value
        for key, value, _ in resolved.rows()
        if key.startswith("data.") and not resolved.is_default(key)
    }
    data = DataConfig.model_validate(trained.model_dump(exclude_unset=True) | set_here)
    try:
        return read_data(data)
    except DataError as error:
        raise DataError(
            f"the text that the heads of {folder} were trained on cannot be read: {error.message}",
            hint="--dataset-name FILE names another",
        ) from error


def load_text(reading: Reading, backbone: Backbone) -> tuple[list[Document], list[Document]]:
    """Training and evaluation text; the first process answers prompts, the others then read what it wrote."""
    from accelerate import PartialState

    from early_exit_cli.data.load import load_splits

    processes = PartialState(cpu=backbone.device.type == "cpu")
    with processes.main_process_first(), console.progress("answering prompts", 1) as ticker:
        started = time.monotonic()

        def on_answers(done: int, total: int, tokens: int) -> None:
            ticker.update(done, f"{tokens / (time.monotonic() - started):,.0f} tokens/s", total)

        on_read = console.note if processes.is_main_process else None
        train, held_out = load_splits(reading, backbone, ["train", "eval"], on_answers, on_read)
    return train, held_out


@dataclass(frozen=True)
class HeldOut:
    """One held-out split: its documents, and packed batches of them, in which `Batch.documents` numbers them."""

    batches: list[Batch]
    documents: list[Document]

    @property
    def sources(self) -> list[str]:
        """Where each document came from."""
        return [document.source for document in self.documents]

    @property
    def sequences(self) -> int:
        return sum(batch.input_ids.shape[0] for batch in self.batches)


def held_out_text(
    reading: Reading, engine: Engine, splits: Sequence[Split], limit: int, batch_size: int = 4
) -> list[HeldOut]:
    """At most `limit` sequences of each held-out split."""
    from early_exit_cli.data.load import load_splits
    from early_exit_cli.data.packing import batches, pack

    found = []
    for documents in load_splits(reading, engine.backbone, splits, on_read=console.note):
        rows = pack(documents, reading.config.max_length, engine.backbone.pad_token_id)[:limit]
        found.append(HeldOut(list(batches(rows, batch_size)), documents))
    return found


def dataset_label(config: DataConfig) -> str:
    """The data set's name, without the folder of a local file."""
    name = (
        Path(config.dataset_name or "").name if Path(config.dataset_name or "").exists() else config.dataset_name or ""
    )
    return f"{name}/{config.dataset_config_name}" if config.dataset_config_name else name
