"""A quantized copy of a backbone, kept after its first load: the next one reads a third of the bytes and quantizes nothing.

bitsandbytes quantizes plain weights at every load, which takes most of a start: 16 GB for a model of 8B parameters. A copy is
found by the content of what it was made from (weights, configuration, settings, versions, and what decides the order of sums
while quantizing), so it holds the very bits that quantizing again would give. Tokenizer, configuration and generation defaults
always come from the original. Nothing here costs an answer: what cannot be read or written is done without.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from early_exit_cli.backbone.auto_model import read_model
from early_exit_cli.backbone.contents import SETTINGS, contents_of, files_of, unread_bytes, weights_folder
from early_exit_cli.backbone.multimodal import NAMES
from early_exit_cli.errors import BackboneError, BundleError
from early_exit_cli.files.atomic import keep_json, sha256_of
from early_exit_cli.files.environment import keeps_nothing, versions
from early_exit_cli.files.kept import MADE_FROM, MADE_FROM_FILE

LAYOUT = 1
"""Of a copy; another number, and those that are there are not found."""
SPARE_BYTES = 10**9
"""So much of the disk stays free."""
ABANDONED_SECONDS = 3600.0


@dataclass
class WeightCopy:
    """The kept copy of one checkpoint, which is there or may be written.

    source, revision: what `from_pretrained` takes, a folder or a Hub id.
    settings: transformers' configuration of the checkpoint.
    quantization: transformers' settings to quantize it with; kept as a dictionary.
    """

    source: str
    revision: str | None
    settings: Any
    quantization: Any
    dtype: torch.dtype
    device: torch.device
    place: Path | None = field(init=False)
    """Folder of the copy; None where nobody can tell yet, before a download, and where no copy can be kept."""
    refused: bool = field(init=False, default=False)
    """A copy was there, and no model came of it."""

    def __post_init__(self) -> None:
        self.quantization = self.quantization.to_dict()  # now: loading may write into the object
        self.place = self._place()

    def read(self) -> Any | None:
        """The model of the copy; None where there is none, or a damaged one."""
        if self.place is None or not self.place.is_dir():
            return None
        self.refused = True  # until a model is there that computes: `keeping` is reached in no other case
        try:
            return load_copy(self.place, self.source, self.settings, self.quantization, self.dtype, self.device)
        except Exception:  # the library raises whatever a damaged file provokes
            return None

    @contextlib.contextmanager
    def keeping(self, model: Any) -> Iterator[None]:
        """Write a copy of a model that was just quantized and has not run yet; it is in place when the block ends well.

        A copy that was refused gives way to it.
        """
        place = self._place()
        downloaded = self.place is None and not Path(self.source).is_dir()
        if self.refused and self.place is not None:
            shutil.rmtree(self.place, ignore_errors=True)
        written = _written(model, self._folder(), place) if place and (downloaded or place == self.place) else None
        try:
            yield
            if written and place:
                keep_json(written / MADE_FROM_FILE, {MADE_FROM: self.source})
                with contextlib.suppress(OSError):  # another process was faster
                    os.rename(written, place)
        finally:
            if written:
                shutil.rmtree(written, ignore_errors=True)

    def _folder(self) -> Path:
        """Where the checkpoint's files lie.

        Raises:
            OSError: not on this machine yet.
        """
        if Path(self.source).is_dir():
            return Path(self.source)
        from transformers.utils.hub import cached_file

        found = cached_file(self.source, SETTINGS[0], revision=self.revision, local_files_only=True)
        return Path(str(found)).parent

    def _contents(self) -> dict[str, str] | None:
        """What the checkpoint's files hold; None also where neither a copy nor hashes can be kept: all of it would have to
        be read at every start.
        """
        folder = self._folder()
        files = files_of(folder)
        unread = unread_bytes(files or [])
        if files is None or (unread and not _has_room(weights_folder(), unread // 3)):
            return None
        return contents_of(folder)

    def _place(self) -> Path | None:
        if self.device.type not in ("cuda", "cpu") or keeps_nothing():
            return None
        try:
            contents = self._contents()
        except (OSError, BundleError):
            return None
        if contents is None:
            return None
        found = versions()
        identity = {
            "layout": LAYOUT,
            "contents": contents,
            "quantization": self.quantization,
            "dtype": str(self.dtype),
            "device": _order_of_sums(self.device),
            "versions": {name: found.get(name) for name in ("torch", "transformers", "bitsandbytes")},
        }
        return weights_folder() / sha256_of(json.dumps(identity, sort_keys=True))[:24]


def save_copy(model: Any, source: Path, folder: Path) -> None:
    """Write a quantized model that has not run yet into `folder`, beside the settings of its checkpoint in `source`.

    Raises:
        OSError: it cannot be written.
    """
    settings = model.config
    model.config = copy.deepcopy(settings)  # saving changes it
    try:
        model.save_pretrained(folder)
    finally:
        model.config = settings
    for name in SETTINGS:
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def load_copy(
    folder: Path, source: str, settings: Any, quantization: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Any:
    """The model of a copy, as `from_pretrained` makes it of `source`; other arguments as in `WeightCopy`.

    Raises:
        BackboneError: tensors are missing, or too many.
        Exception: whatever the library raises over a damaged file.
    """
    settings = copy.deepcopy(settings)
    settings.quantization_config = quantization
    model, report = read_model(folder, settings, dtype, device, use_safetensors=True, key_mapping=NAMES)
    faults = [name for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[name]]
    if faults:
        raise BackboneError(f"the copy in {folder} is not whole: {', '.join(faults)}")
    model.name_or_path = model.config._name_or_path = source
    return model


def _order_of_sums(device: torch.device) -> str:
    """On what the last bits of quantizing depend: double quantization subtracts a mean over all of a matrix's scales."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _has_room(folder: Path, needed: int) -> bool:
    """Whether `needed` bytes may be written into a folder, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free >= needed + SPARE_BYTES


def _written(model: Any, source: Path, place: Path) -> Path | None:
    """A temporary sibling of `place` with the copy in it; None where it cannot be written, or another process does so."""
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        if not _has_room(place.parent, sum(tensor.nbytes for tensor in model.state_dict().values())):
            return None
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place.parent)
        temporary.mkdir()
    except OSError:
        return None
    try:
        save_copy(model, source, temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, Exception):  # the library raises whatever a full disk provokes
            return None
        raise
    return temporary


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes left that were killed while writing."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir() and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
