"""Writing a cache of hidden states, in part or in whole.

Which sequences a shard holds depends on the text alone, and each shard is computed in the same passes whoever computes
it: so processes share the work, a stopped run goes on at the next shard, a longer cache continues a shorter one, and a
damaged shard is computed again by itself. Until all is done, finished shards are recorded in `shards/*.json` files.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.output import logits_of
from early_exit_cli.config import CacheConfig, DataConfig, TrainingConfig
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import Batch, batches, pack
from early_exit_cli.errors import BundleError, CacheError, NumericsError, shown
from early_exit_cli.files.atomic import (
    file_sha256,
    fingerprint_differences,
    read_json,
    sha256_of,
    write_atomic,
    write_json,
)
from early_exit_cli.files.forms import to_block_numbers
from early_exit_cli.files.schemas import FORMAT_VERSION, read_form
from early_exit_cli.hidden_states.cache import (
    LARGEST_FP8,
    MANIFEST,
    READOUT,
    SHARDS,
    Cache,
    Damage,
    Report,
    bytes_per_token,
    check_request,
    unpacked,
    wanted_sequences,
)
from early_exit_cli.hidden_states.cache_checks import LAST_BLOCK, state_names
from early_exit_cli.hidden_states.live import run_states
from early_exit_cli.hidden_states.manifest import Plan, Shard, StoredSplit
from early_exit_cli.hidden_states.states import count_tokens, log_normalizer

ROWS_PER_PASS = 4
NORMALIZED_AT_ONCE = 128
"""Positions whose logits stand in memory together: on a CPU these stay in its caches."""
CHECKED_POSITIONS = 256


class Processes(Protocol):
    """The part of accelerate's process state that extraction uses."""

    num_processes: int
    process_index: int
    is_main_process: bool

    def wait_for_everyone(self) -> None: ...


@dataclass(frozen=True)
class Estimate:
    """What an extraction will take: what is kept, and what of it is still missing."""

    sequences: int
    tokens: int
    total_bytes: int
    missing_shards: int
    missing_bytes: int
    free_bytes: int
    seconds: float | None


def extract(
    folder: Path,
    request: dict[str, Any],
    backbone: Backbone,
    exit_layers: list[int],
    train: list[Document],
    held_out: list[Document],
    data: DataConfig,
    config: CacheConfig,
    training: TrainingConfig,
    processes: Processes,
    on_plan: Callable[[Estimate], None] | None = None,
    on_shard: Report | None = None,
) -> Cache:
    """Write a cache, or what is missing of it. Every process computes every world-th shard.

    Raises:
        CacheError: the folder holds a cache of another request; too little disk, before anything is computed; or a
            disk that fills up meanwhile (finished shards stay).
        NumericsError: NaN or infinite states, with the sequence and the block.
    """
    rows = _rows_of(train, held_out, backbone, data, config)
    token_bytes = bytes_per_token(backbone.hidden_size, len(exit_layers), config.store)
    available = len(rows["train"])
    wanted = wanted_sequences(config, training, data.max_length, token_bytes, available, processes.num_processes)
    rows["train"] = rows["train"][:wanted]
    if (folder / MANIFEST).exists():
        request = check_request(Cache(folder), request)
        check_backbone(Cache(folder), backbone)
    known = _recorded_shards(folder)
    plans = _plans(rows, config.shard_tokens // data.max_length)
    missing = [plan for plan in plans if not _is_done(folder, plan, known.get(plan.file))]
    estimate = _estimate(folder, plans, missing, token_bytes, backbone, exit_layers, rows)
    if on_plan and processes.is_main_process:
        on_plan(estimate)
    if estimate.missing_bytes > estimate.free_bytes:
        raise CacheError(
            f"the cache needs {estimate.missing_bytes / 1e9:.2f} GB more, but {folder} has "
            f"{estimate.free_bytes / 1e9:.2f} GB free",
            hint="shrink it with --cache-gb, --cache-tokens, --cache-steps or --store fp8",
        )
    header = _header(request, data, backbone, exit_layers, config.store, available)
    started = time.perf_counter()
    try:
        if processes.is_main_process:
            write_json(
                folder / MANIFEST,
                {**header, "complete": False, "shards": [shard.as_json() for shard in known.values()]},
            )
        processes.wait_for_everyone()
        mine = missing[processes.process_index :: processes.num_processes]
        done_tokens = 0
        for number, plan in enumerate(mine, start=1):
            shard = _write_shard(folder, plan, rows, backbone, exit_layers, config.store)
            write_json(_record_path(folder, plan), shard.as_json())
            done_tokens += shard.tokens
            if on_shard and processes.is_main_process:
                rate = done_tokens / (time.perf_counter() - started) * processes.num_processes
                on_shard(min(number * processes.num_processes, len(missing)), len(missing), rate)
        processes.wait_for_everyone()
        if processes.is_main_process:
            _finish(folder, header, plans, rows["train"], backbone)
        processes.wait_for_everyone()
    except OSError as error:
        raise _write_error(folder, error) from error
    return Cache(folder)


def _header(
    request: dict[str, Any],
    data: DataConfig,
    backbone: Backbone,
    exit_layers: list[int],
    store: str,
    available_sequences: int,
) -> dict[str, Any]:
    """What the manifest says before anything is computed."""
    return {
        "format_version": FORMAT_VERSION,
        "request": request,
        "data": data.model_dump(mode="json"),
        "fingerprint": backbone.fingerprint,
        "layers": to_block_numbers(exit_layers),
        "hidden_size": backbone.hidden_size,
        "num_blocks": backbone.num_blocks,
        "norm_eps": backbone.final_norm.eps,
        "norm_subtracts_mean": backbone.final_norm.subtracts_mean,
        "logit_map": backbone.logit_map.model_dump(),
        "eos_token_ids": sorted(backbone.eos_token_ids),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "store": store,
        "max_length": data.max_length,
        "available_sequences": available_sequences,
    }


def repair(
    cache: Cache,
    damaged: list[Damage],
    backbone: Backbone,
    train: list[Document],
    held_out: list[Document],
    data: DataConfig,
    config: CacheConfig,
    on_shard: Report | None = None,
) -> list[str]:
    """Compute the damaged files again, and only those.

    Returns:
        Files that are whole again but not byte for byte what they were (another device or version).

    Raises:
        CacheError: the backbone or the text is not the one the cache was made from.
    """
    check_backbone(cache, backbone)
    rows = _rows_of(train, held_out, backbone, data, config)
    rows["train"] = rows["train"][: cache.sequences()]
    plans = {plan.file: plan for plan in _plans(rows, config.shard_tokens // data.max_length)}
    names = {Path(damage.file).name for damage in damaged}
    wanted = [index for index, shard in enumerate(cache.shards) if shard.file in names]
    changed = []
    started, tokens = time.perf_counter(), 0
    try:
        for number, index in enumerate(wanted, start=1):
            shard = cache.shards[index]
            plan = plans.get(shard.file)
            if plan is None or plan.text != shard.text:
                raise CacheError(
                    f"the text of {shard.file} is not the text it was made from", hint="extract a new cache"
                )
            store = cache.manifest.store
            cache.shards[index] = _write_shard(cache.folder, plan, rows, backbone, cache.exit_layers, store)
            if cache.shards[index].sha256 != shard.sha256:
                changed.append(shard.file)
            tokens += shard.tokens
            if on_shard:
                on_shard(number, len(wanted), tokens / (time.perf_counter() - started))
        manifest = read_json(cache.folder / MANIFEST)
        write_json(cache.folder / MANIFEST, {**manifest, "shards": [shard.as_json() for shard in cache.shards]})
        if READOUT in names:
            finished = ("complete", "last_block", "readout", "shards")
            header = {key: value for key, value in manifest.items() if key not in finished}
            _finish(cache.folder, header, list(plans.values()), rows["train"], backbone)
    except OSError as error:
        raise _write_error(cache.folder, error) from error
    return changed


def check_backbone(cache: Cache, backbone: Backbone) -> None:
    """Refuse a backbone that is not the one a cache was made by, its tokenizer included.

    Raises:
        CacheError: every field that differs, with both values.
    """
    differences = fingerprint_differences(cache.manifest.fingerprint.as_json(), backbone.fingerprint)
    content = cache.manifest.request.as_json().get("backbone.content")
    if content is not None and content != backbone.content:
        differences.append(("content", content, backbone.content))
    if differences:
        named = "; ".join(f"{key}: {shown(theirs)} there, {ours!r} here" for key, theirs, ours in differences)
        raise CacheError(
            f"the cache in {cache.folder} was made by another backbone than {backbone.name} ({named})",
            hint="use another --cache-dir",
        )


def _rows_of(
    train: list[Document], held_out: list[Document], backbone: Backbone, data: DataConfig, config: CacheConfig
) -> dict[StoredSplit, list[Batch]]:
    pad = backbone.pad_token_id
    return {
        "train": pack(train, data.max_length, pad),
        "eval": pack(held_out, data.max_length, pad)[: config.held_out_rows],
    }


def _plans(rows: dict[StoredSplit, list[Batch]], rows_per_shard: int) -> list[Plan]:
    """Which sequences each shard holds, and a hash of their text."""
    step = max(1, rows_per_shard)
    plans = []
    for split, part in rows.items():
        for number, first in enumerate(range(0, len(part), step)):
            last = min(first + step, len(part))
            text = _text(part[first:last])
            plans.append(
                Plan(
                    file=f"{split}-{number:05d}.safetensors",
                    split=split,
                    first=first,
                    last=last,
                    tokens=text["ids"].numel(),
                    text=sha256_of(*(tensor.numpy().tobytes() for tensor in text.values()))[:32],
                )
            )
    return plans


def _text(rows: list[Batch]) -> dict[str, Tensor]:
    """Ids of packed sequences without padding, and where sequences, documents and answers start; all int32."""
    ids, row_starts, document_starts, answer_starts = [], [0], [], []
    place = 0
    for row in rows:
        owners = row.documents[0][row.valid[0]]
        answers = row.answers[0][: owners.numel()]
        ids.append(row.input_ids[0, : owners.numel()])
        for owner in owners.unique_consecutive().tolist():
            places = (owners == owner).nonzero()[:, 0]
            answer = answers[places].nonzero()
            document_starts.append(place + int(places[0]))
            answer_starts.append(place + int(places[0]) + (int(answer[0]) if answer.numel() else places.numel()))
        place += owners.numel()
        row_starts.append(place)
    tensors = {
        "ids": torch.cat(ids),
        "row_starts": torch.tensor(row_starts),
        "document_starts": torch.tensor([*document_starts, place]),
        "answer_starts": torch.tensor(answer_starts),
    }
    return {name: tensor.to(torch.int32) for name, tensor in tensors.items()}


def _estimate(
    folder: Path,
    plans: list[Plan],
    missing: list[Plan],
    token_bytes: int,
    backbone: Backbone,
    exit_layers: list[int],
    rows: dict[StoredSplit, list[Batch]],
) -> Estimate:
    """Sizes exactly, time from one pass."""
    tokens = sum(plan.tokens for plan in plans)
    missing_tokens = sum(plan.tokens for plan in missing)
    readout_bytes = backbone.lm_head_weight.numel() * backbone.lm_head_weight.element_size()
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    seconds = None
    if missing:
        plan = missing[0]
        sample = rows[plan.split][plan.first : plan.first + ROWS_PER_PASS]
        started = time.perf_counter()
        states = run_states(backbone, next(batches(sample, ROWS_PER_PASS)), exit_layers)
        seconds = (time.perf_counter() - started) / states.final.shape[0] * missing_tokens
    return Estimate(
        sequences=sum(plan.rows for plan in plans),
        tokens=tokens,
        total_bytes=tokens * token_bytes + readout_bytes,
        missing_shards=len(missing),
        missing_bytes=missing_tokens * token_bytes + (0 if (folder / READOUT).exists() else readout_bytes),
        free_bytes=shutil.disk_usage(existing).free,
        seconds=seconds,
    )


def _write_shard(
    folder: Path,
    plan: Plan,
    rows: dict[StoredSplit, list[Batch]],
    backbone: Backbone,
    exit_layers: list[int],
    store: str,
) -> Shard:
    """Compute one shard and write it; its record for the manifest."""
    part, names = rows[plan.split][plan.first : plan.last], state_names(exit_layers)
    parts: list[list[Tensor]] = []
    normalizers: list[Tensor] = []
    for number, batch in enumerate(batches(part, ROWS_PER_PASS)):
        states = run_states(backbone, batch, exit_layers)
        for name, state in zip(names, [*states.exits, states.final], strict=True):
            if not torch.isfinite(state).all():
                block = "the last block" if name == "final" else name.replace(".", " ")
                first = plan.first + number * ROWS_PER_PASS
                last = first + batch.input_ids.shape[0] - 1
                raise NumericsError(
                    f"NaN or infinite states after {block} in sequences {first} to {last} of the {plan.split} text",
                    hint="check the model file and the text",
                )
        at_once = states.final.split(NORMALIZED_AT_ONCE)
        normalizers += [log_normalizer(logits_of(backbone, some)).cpu() for some in at_once]
        parts.append([state.cpu() for state in (*states.exits, states.final)])
    tensors = {**_text(part), "normalizer": torch.cat(normalizers)}
    agreed = checked = 0
    for name, pieces in zip(names, zip(*parts, strict=True), strict=True):
        state = torch.cat(pieces)
        tensors |= _packed(name, state, store)
        if name == "final" and store == "fp8":
            exact, kept = (
                backbone.lm_head(x[:CHECKED_POSITIONS].to(backbone.device)).argmax(-1)
                for x in (state, unpacked(name, tensors, state.dtype))
            )
            agreed, checked = int((exact == kept).sum()), exact.numel()
    path = folder / SHARDS / plan.file
    write_atomic(path, lambda temporary: save_file(tensors, temporary))
    size = path.stat().st_size
    return Shard(**plan.as_json(), bytes=size, sha256=file_sha256(path), checked=checked, agreed=agreed)


def _packed(name: str, state: Tensor, store: str) -> dict[str, Tensor]:
    """A state tensor in the cache's form."""
    if store == "bf16":
        return {name: state.to(torch.bfloat16).contiguous()}
    scale = (state.float().abs().amax(-1) / LARGEST_FP8).clamp(min=1e-12)  # [tokens]
    return {name: (state.float() / scale[:, None]).to(torch.float8_e4m3fn), f"{name}.scale": scale}


def _finish(folder: Path, header: dict[str, Any], plans: list[Plan], train: list[Batch], backbone: Backbone) -> None:
    """The readout, and the manifest that makes the cache complete."""
    last, norm = backbone.last_block, backbone.final_norm
    tensors = {
        "lm_head": backbone.lm_head_weight,
        "norm": norm.weight,
        **({} if norm.bias is None else {"norm_bias": norm.bias}),
        **({} if backbone.lm_head_bias is None else {"lm_head_bias": backbone.lm_head_bias}),
        **({} if backbone.embedding.weight is backbone.lm_head.weight else {"embedding": backbone.embedding_weight}),
        **{f"{LAST_BLOCK}{name}": weight for name, weight in last.weights.items()},
    }
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    tensors["token_counts"] = count_tokens(train, backbone.vocab_size)
    write_atomic(folder / READOUT, lambda temporary: save_file(tensors, temporary))
    known = _recorded_shards(folder)
    write_json(
        folder / MANIFEST,
        {
            **header,
            "complete": True,
            "last_block": last.shape.model_dump(),
            "readout": {"file": READOUT, "sha256": file_sha256(folder / READOUT)},
            "shards": [known[plan.file].as_json() for plan in plans],
        },
    )
    for record in (folder / SHARDS).glob("*.json"):
        record.unlink()


def _record_path(folder: Path, plan: Plan) -> Path:
    return (folder / SHARDS / plan.file).with_suffix(".json")


def _recorded_shards(folder: Path) -> dict[str, Shard]:
    """Finished shards by file: those of the manifest, and those that a stopped run left records of."""
    known: dict[str, Shard] = {}
    if (folder / MANIFEST).exists():
        known = {shard.file: shard for shard in Cache(folder).shards}
    for path in sorted((folder / SHARDS).glob("*.json")):
        with contextlib.suppress(BundleError):  # torn: its shard is computed again
            record = read_form(path, Shard)
            known[record.file] = record
    return known


def _is_done(folder: Path, plan: Plan, shard: Shard | None) -> bool:
    if shard is None or any(getattr(shard, key) != getattr(plan, key) for key in Plan.model_fields):
        return False
    path = folder / SHARDS / plan.file
    return path.is_file() and path.stat().st_size == shard.bytes


def _write_error(folder: Path, error: OSError) -> CacheError:
    if error.errno == errno.ENOSPC:
        return CacheError(
            f"the disk of {folder} is full; finished shards are kept",
            hint="free some space and run the same command again, or shrink the cache with --cache-gb",
        )
    return CacheError(f"cannot write the cache in {folder}: {error.strerror}")
