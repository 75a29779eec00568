"""What the files of a checkpoint hold, as hashes: of each whole file, read once and remembered by where it lies.

Everything that is kept under the name of a backbone is found by these, so that other weights in a folder or file of the same
name, size and head are another backbone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from early_exit_cli.errors import BackboneError, BundleError
from early_exit_cli.files.atomic import file_sha256, read_json, sha256_of, write_json
from early_exit_cli.files.environment import user_cache_dir

HASHES = "hashes.json"
MOST_HASHES = 4096
"""What is remembered: the newest."""
WEIGHTS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""One file, or the index of several, in the order in which transformers looks for them."""
SETTINGS = ("config.json", "generation_config.json")
SETTLED_NS = 10**8
READERS = 4
LOOKS = 3
"""At files that seem to change while they are read, before they count as changing."""
BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def weights_folder() -> Path:
    """Where quantized copies are kept, a folder each, and the hashes of the files that anything kept was made from."""
    return user_cache_dir() / "weights"


def content_of(files: Sequence[Path]) -> str | None:
    """One hash over what some files hold, whatever they are called; None where one changes right now.

    Raises:
        OSError: a file cannot be read.
    """
    hashes = hashes_of(files)
    return None if hashes is None else sha256_of(json.dumps(hashes))[:32]


def content_of_tensors(model: nn.Module) -> str:
    """One hash over what a model holds in memory: names, parameters, buffers, and the scales of quantized ones.

    It is another one where the same weights are quantized anew on another device or by other threads.
    """
    with ThreadPoolExecutor(READERS) as pool:
        hashes = list(pool.map(lambda named: _hash_of(*named), _tensors_of(model)))
    return sha256_of(json.dumps(hashes))[:32]


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield name, tensor
        parts: list[tuple[str, Any]] = list(vars(tensor).items())
        for part, value in parts:  # of bitsandbytes: the 8-bit scales, or a state with scales that may have scales
            if isinstance(value, Tensor):
                yield f"{name}.{part}", value
            elif hasattr(value, "absmax"):
                parts.extend((f"{part}.{inner}", found) for inner, found in vars(value).items())
    for name, module in model.named_modules():
        scales = getattr(getattr(module, "state", None), "SCB", None)  # where the 8-bit scales are after the first pass
        if isinstance(scales, Tensor):
            yield f"{name}.SCB", scales


def _hash_of(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def contents_of(folder: Path) -> dict[str, str] | None:
    """What a checkpoint's files hold, by name: each one's hash.

    Returns:
        None where that cannot be told: files are missing or change right now.

    Raises:
        OSError, BundleError: a file cannot be read.
    """
    files = files_of(folder)
    hashes = None if files is None else hashes_of(files)
    return None if files is None or hashes is None else dict(zip((path.name for path in files), hashes, strict=True))


def files_of(folder: Path) -> list[Path] | None:
    """The files that decide a model's weights and defaults; None for what is more or less than a plain checkpoint.

    Raises:
        BundleError: one that names others is no JSON.
    """
    settings = [folder / name for name in SETTINGS if (folder / name).is_file()]
    if (folder / "adapter_config.json").exists() or "transformers_weights" in read_json(folder / SETTINGS[0]):
        return None
    for single, index in WEIGHTS:
        if (folder / single).is_file():
            return [*settings, folder / single]
        if (folder / index).is_file():
            shards = shards_of(folder / index)
            return None if shards is None else [*settings, folder / index, *shards]
    return None


def shards_of(index: Path) -> list[Path] | None:
    """The files that an index names, each once; None where it names none.

    Raises:
        BundleError: not readable JSON.
    """
    shards = read_json(index).get("weight_map")
    return (
        [index.parent / name for name in sorted(set(map(str, shards.values())))] if isinstance(shards, dict) else None
    )


def hashes_of(paths: Sequence[Path]) -> list[str] | None:
    """The hash of each file, remembered by device, inode, size and times; None where one changes at every look.

    The Hub's own cache names files by their hashes; those are not read. Some filesystems settle the times of a file late, so
    what seems to have changed meanwhile is looked at again.

    Raises:
        OSError: a file cannot be read.
    """
    table = weights_folder() / HASHES
    known = _remembered(table)
    blobs = {path: blob for path in paths if (blob := _blob_name(path)) is not None}
    for _ in range(LOOKS):
        places = {path: place_of(path) for path in paths if path not in blobs}
        unread = [path for path, place in places.items() if place not in known]
        started = time.time_ns()
        with ThreadPoolExecutor(READERS) as pool:
            read = dict(zip(unread, pool.map(file_sha256, unread), strict=True))
        still = [path for path in unread if place_of(path) == places[path]]
        # a file that changed just now may change again without a difference in its times
        settled = {places[path]: read[path] for path in still if started - path.stat().st_ctime_ns > SETTLED_NS}
        if settled:
            known |= settled
            with contextlib.suppress(OSError):
                write_json(table, dict([*known.items()][-MOST_HASHES:]))
        if len(still) == len(unread):
            found = blobs | {path: read.get(path) or known[place] for path, place in places.items()}
            return [found[path] for path in paths]
    return None


def unread_bytes(paths: Sequence[Path]) -> int:
    """How much of some files would have to be read for `hashes_of`.

    Raises:
        OSError: a file is missing.
    """
    known = _remembered(weights_folder() / HASHES)
    return sum(path.stat().st_size for path in paths if _blob_name(path) is None and place_of(path) not in known)


def place_of(path: Path) -> str:
    """Where a file lies, how large it is and when it was written: another content has another one."""
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def changing(path: Path) -> BackboneError:
    """What to say of a file that is not the one it was a moment ago."""
    return BackboneError(f"{path} changed while it was read", hint="wait until it is written")


def _remembered(table: Path) -> dict[str, str]:
    try:
        return {place: known for place, known in read_json(table).items() if isinstance(known, str)}
    except BundleError:
        return {}


def _blob_name(path: Path) -> str | None:
    """The hash by which the Hub's cache names the file that `path` is a link to."""
    if not path.is_symlink():
        return None
    target = path.resolve(strict=True)
    return target.name if target.parent.name == "blobs" and BLOB.fullmatch(target.name) else None
