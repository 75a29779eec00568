"""Hidden states on disk: extracted once, trained from many times, without the backbone.

A cache is a folder:

* `shards/SPLIT-NNNNN.safetensors`: states of consecutive packed sequences, padding left out. `block.L` is the state after
  block L (0-based), `final` the normed state after the last block, [tokens, hidden] in bf16, or fp8 (e4m3) with a scale
  per token in `NAME.scale`; `ids` [tokens] int32. `normalizer` [tokens] float32 is the logsumexp of the
  backbone's logits. `row_starts`, `document_starts`, `answer_starts` say where sequences, documents and answers begin.
  No logits: `final` times the LM head gives them back.
* `readout.safetensors`: the LM head, the final norm's weight, the embedding where it is another one, the last block's
  dequantized weights, and how often each token stands in the training text.
* `manifest.json`: the backbone's fingerprint, what was asked for, and every shard with its rows, size and SHA-256.

`extraction.py` writes it, `cached_states.py` reads it for training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from early_exit_cli.backbone.contents import content_of
from early_exit_cli.backbone.load import local_content
from early_exit_cli.backbone.output import FinalNorm, LastBlock, LogitMap
from early_exit_cli.config import BackboneConfig, CacheConfig, DataConfig, HeadsConfig, TrainingConfig
from early_exit_cli.errors import BundleError, CacheError, shown
from early_exit_cli.files.atomic import file_sha256, sha256_of
from early_exit_cli.files.environment import kept_path
from early_exit_cli.files.schemas import read_form
from early_exit_cli.hidden_states.cache_checks import LAST_BLOCK, readout_misfit
from early_exit_cli.hidden_states.manifest import ManifestForm, Shard

MANIFEST, READOUT, SHARDS = "manifest.json", "readout.safetensors", "shards"
LARGEST_FP8 = 448.0
"""Largest finite value of e4m3."""
Report = Callable[[int, int, float], None]
"""Called with (shards done, shards in all, tokens per second)."""


@dataclass(frozen=True)
class Damage:
    """A file of a cache that is not what the manifest says."""

    file: str
    what: str


@dataclass(frozen=True)
class StoredView:
    """A `BackboneView` read from a cache; tensors in the backbone's dtype."""

    name: str
    quantization: str
    fingerprint: dict[str, Any]
    eos_token_ids: frozenset[int]
    num_blocks: int
    final_norm: FinalNorm
    logit_map: LogitMap
    lm_head_weight: Tensor
    lm_head_bias: Tensor | None
    embedding_weight: Tensor
    last_block: LastBlock

    @property
    def device(self) -> torch.device:
        return self.lm_head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head_weight.dtype

    @property
    def vocab_size(self) -> int:
        return self.lm_head_weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.lm_head_weight.shape[1]


class Cache:
    """A cache on disk, by its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = read_form(folder / MANIFEST, ManifestForm)
        except BundleError as error:
            raise CacheError(f"no cache in {folder}: {error.message}", hint="eexit cache extract") from error
        self.exit_layers = self.manifest.exit_layers
        self.shards = list(self.manifest.shards)
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.total_bytes = sum(shard.bytes for shard in self.shards)

    @property
    def data(self) -> DataConfig:
        """Where the text came from."""
        return self.manifest.data

    @property
    def is_complete(self) -> bool:
        return self.manifest.complete

    def require_complete(self) -> None:
        """Refuse a cache whose extraction was stopped."""
        if not self.is_complete:
            raise CacheError(
                f"the cache in {self.folder} is not complete: its extraction was stopped",
                hint="run eexit cache extract again with the same settings; it goes on where it was",
            )

    def require_sizes(self) -> None:
        """Refuse shards that are missing or of another size: what their records promise is then not there."""
        for shard in self.shards:
            what = _size_damage(self.path(shard), shard)
            if what:
                raise CacheError(
                    f"{self.path(shard)} is damaged: {what}", hint=f"eexit cache repair --cache-dir {self.folder}"
                )

    def path(self, shard: Shard) -> Path:
        return self.folder / SHARDS / shard.file

    def split(self, name: str) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == name]

    def sequences(self) -> int:
        return sum(shard.rows for shard in self.split("train"))

    def is_shorter_than(self, config: CacheConfig, training: TrainingConfig, world: int) -> bool:
        """Whether the bounds ask for more than is here, and the text has more."""
        found = self.manifest
        token_bytes = bytes_per_token(found.hidden_size, len(self.exit_layers), found.store)
        wanted = wanted_sequences(config, training, found.max_length, token_bytes, found.available_sequences, world)
        return wanted > self.sequences()

    @cached_property
    def readout_tensors(self) -> dict[str, Tensor]:
        return load_shard(self.folder / READOUT)

    def view(self, device: torch.device) -> StoredView:
        """The backbone's readout, without the backbone."""
        found = self.manifest
        if found.last_block is None:
            raise CacheError(
                f"the cache in {self.folder} was begun by an older version and lacks the last block",
                hint="run eexit cache extract again with the same settings; it adds only these",
            )
        tensors = self.readout_tensors
        what = readout_misfit(tensors, found)
        if what:
            raise CacheError(f"{self.folder / READOUT} is not this cache's: {what}", hint="eexit cache verify")
        lm_head = tensors["lm_head"].to(device)
        bias, lm_head_bias = (
            tensors[name].to(device) if name in tensors else None for name in ("norm_bias", "lm_head_bias")
        )
        weights = {
            name.removeprefix(LAST_BLOCK): value.to(device)
            for name, value in tensors.items()
            if name.startswith(LAST_BLOCK)
        }
        return StoredView(
            name=found.request.model_name,
            quantization=found.fingerprint.quantization,
            fingerprint=found.fingerprint.as_json(),
            eos_token_ids=frozenset(found.eos_token_ids),
            num_blocks=found.num_blocks,
            final_norm=FinalNorm(tensors["norm"].to(device), found.norm_eps, found.norm_subtracts_mean, bias),
            logit_map=found.logit_map or LogitMap(),
            lm_head_weight=lm_head,
            lm_head_bias=lm_head_bias,
            embedding_weight=tensors["embedding"].to(device) if "embedding" in tensors else lm_head,
            last_block=LastBlock(found.last_block, weights),
        )


def bytes_per_token(hidden_size: int, heads: int, store: str) -> int:
    """Bytes of one token: the states after each exit layer and after the last block, and its id, the normalizer."""
    state = hidden_size * 2 if store == "bf16" else hidden_size + 4
    return state * (heads + 1) + 8


LATER_SETTINGS = [("data.answer_turns", "first"), ("data.answers_from", None), ("data.answers_model", None)]
"""Values that caches were made with before there was a setting: a request does not name them."""
CONTENTS = ("backbone.content", "data.content")
"""Compared where both sides know it: a cache may be older, or be named where its backbone is not."""


def cache_request(backbone: BackboneConfig, heads: HeadsConfig, data: DataConfig, cache: CacheConfig) -> dict[str, Any]:
    """All settings that decide what a cache holds, but not how much of it; what is here and no setting by its content.

    Raises:
        CacheError, BackboneError: files that change right now, or a GGUF file that is no whole model.
    """
    settings: dict[str, Any] = {
        f"backbone.{name}": getattr(backbone, name) for name in ("model_name", "revision", "quantization")
    }
    layers = heads.head_layer_indices
    settings["heads"] = layers if layers is not None else f"{heads.num_heads} evenly spread"
    settings |= {f"data.{name}": value for name, value in data.model_dump(mode="json").items()}
    settings |= {f"cache.{name}": getattr(cache, name) for name in ("store", "shard_tokens", "held_out_rows")}
    if data.dataset_name is not None:
        settings |= _identity_of_data(Path(data.dataset_name).expanduser())
    content = local_content(backbone)
    if content is not None:
        settings["backbone.content"] = content
    return {name: value for name, value in settings.items() if (name, value) not in LATER_SETTINGS}


def _identity_of_data(path: Path) -> dict[str, Any]:
    """What a request says of a data set's file or folder; nothing of one that is not here."""
    if path.is_file():
        return {"data.dataset_name": path.name, "data.content": file_sha256(path)[:16]}
    if not path.is_dir():
        return {}
    # datasets may keep files of its own beside those of the set
    content = content_of(sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("cache-")))
    if content is None:
        raise CacheError(f"the files of {path} changed while they were read", hint="wait until they are written")
    return {"data.content": content}


def default_folder(request: dict[str, Any]) -> Path:
    """Where the cache of a request stands when no folder is named."""
    return kept_path("states", sha256_of(json.dumps(request, sort_keys=True))[:24])


def check_request(cache: Cache, request: dict[str, Any]) -> dict[str, Any]:
    """Refuse a cache that was made otherwise.

    Returns:
        What may be recorded of it from now on: a content that was not known when it was begun stays unknown.

    Raises:
        CacheError: every field that differs, with both values.
    """
    made = cache.manifest.request.as_json()
    differing = [
        f"{shown(key)[1:-1]}: {shown(made.get(key))} there, {request.get(key)!r} asked for"
        for key in sorted({*made, *request})
        if made.get(key) != request.get(key) and (key not in CONTENTS or (key in made and key in request))
    ]
    if differing:
        raise CacheError(
            f"the cache in {cache.folder} was made otherwise ({'; '.join(differing)})", hint="use another --cache-dir"
        )
    return {key: value for key, value in request.items() if key in made or key not in CONTENTS}


def wanted_sequences(
    config: CacheConfig, training: TrainingConfig, max_length: int, token_bytes: int, available: int, world: int
) -> int:
    """How many training sequences the bounds ask for, at least one and at most what there is."""
    bounds = [available]
    if config.cache_steps:
        bounds.append(config.cache_steps * training.batch_size * training.gradient_accumulation_steps * world)
    if config.cache_tokens:
        bounds.append(config.cache_tokens // max_length)
    if config.cache_gb:
        bounds.append(int(config.cache_gb * 1e9 / (token_bytes * max_length)) - config.held_out_rows)
    return max(1, min(bounds))


def owned_text(text: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the number of each token's document and its place in the answer: [tokens] int64 each (`data.Batch`)."""
    positions = torch.arange(text["ids"].numel())
    owners = torch.searchsorted(text["document_starts"].long(), positions, right=True) - 1
    return text["ids"].long(), owners, positions - text["answer_starts"].long()[owners]


def measured_positions(text: dict[str, Tensor]) -> Tensor:
    """[tokens] bool: the following token is of the same document, and of an answer (`Batch.measured`)."""
    starts = text["document_starts"].long()
    following = torch.arange(text["ids"].numel()) + 1
    document = torch.searchsorted(starts, following, right=False) - 1  # of the token before `following`
    return (following < starts[document + 1]) & (following >= text["answer_starts"].long()[document])


def unpacked(name: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """[tokens, hidden] in `dtype`."""
    state, scale = tensors[name], tensors.get(f"{name}.scale")
    return state.to(dtype) if scale is None else (state.float() * scale[:, None]).to(dtype)


def verify(cache: Cache, on_shard: Report | None = None) -> list[Damage]:
    """Check every file against the manifest."""
    found = []
    view = cache.folder / READOUT
    written = cache.manifest.readout
    if not view.is_file():
        found.append(Damage(READOUT, "missing"))
    elif written and file_sha256(view) != written.sha256:
        found.append(Damage(READOUT, "its content is not what was written"))
    started, tokens = time.perf_counter(), 0
    for number, shard in enumerate(cache.shards, start=1):
        what = _damage_of(cache, shard)
        if what:
            found.append(Damage(f"{SHARDS}/{shard.file}", what))
        tokens += shard.tokens
        if on_shard:
            on_shard(number, len(cache.shards), tokens / (time.perf_counter() - started))
    return found


def foreign_files(cache: Cache) -> list[str]:
    """Files among the shards that the manifest does not name; nothing ever reads them."""
    ours = {shard.file for shard in cache.shards}
    return sorted(path.name for path in (cache.folder / SHARDS).iterdir() if path.name not in ours)


def _damage_of(cache: Cache, shard: Shard) -> str | None:
    path = cache.path(shard)
    what = _size_damage(path, shard)
    if what:
        return what
    if file_sha256(path) != shard.sha256:
        return "its content is not what was written"
    try:
        tensors = load_shard(path)
    except CacheError as error:
        return error.message
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            return f"NaN or infinite values in {name}"
    return None


def _size_damage(path: Path, shard: Shard) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    return None if size == shard.bytes else f"{size} bytes, written were {shard.bytes}"


def load_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of the cache, mapped into memory.

    Raises:
        CacheError: not a whole safetensors file.
    """
    try:
        return load_file(path)
    except Exception as error:  # besides its own, the reader raises what torch does with a strange dtype or shape
        reason = " ".join(str(error).split())[:300]
        raise CacheError(f"{path} is damaged: {reason}", hint="eexit cache verify names all damage") from error


def info(cache: Cache) -> dict[str, Any]:
    """What a person asks of a cache."""
    found = cache.manifest
    heads, hidden, vocab = len(cache.exit_layers), found.hidden_size, found.fingerprint.vocab_size
    checked = sum(shard.checked for shard in cache.shards)
    return {
        "folder": str(cache.folder),
        "complete": cache.is_complete,
        "model_name": found.request.model_name,
        "quantization": found.fingerprint.quantization,
        "layers": found.layers,
        "store": found.store,
        "sequences": cache.sequences(),
        "available_sequences": found.available_sequences,
        "tokens": cache.tokens,
        "shards": len(cache.shards),
        "bytes": cache.total_bytes,
        "bytes_per_token": cache.total_bytes / max(cache.tokens, 1),
        "bytes_per_token_expected": bytes_per_token(hidden, heads, found.store),
        "bytes_per_token_with_logits": 2 * hidden * heads + 2 * vocab + 8,
        "agreement_of_stored_states": sum(shard.agreed for shard in cache.shards) / checked if checked else None,
        "request": found.request.as_json(),
    }


def damage_record(damaged: list[Damage]) -> list[dict[str, str]]:
    """As JSON."""
    return [asdict(damage) for damage in damaged]
