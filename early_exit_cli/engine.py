"""`EarlyExitModel`: a backbone, its block runner, its heads and their thresholds; and the bundle on disk.

A bundle is a folder: `config.json` and `calibration.json` as DSSD reads them, `heads.safetensors`, `aux_heads.pt` when
the heads are linear, and `eexit.json` with everything else we know: the backbone's fingerprint, the kind of head, the
training and calibration records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.artifacts import fingerprint_differences, read_json, write_atomic, write_json
from early_exit_cli.backbone import Backbone, Readout, load_backbone
from early_exit_cli.blocks import LARGEST_WIDTH, PREFILL_WIDTH, Blocks, KVCache
from early_exit_cli.config import SHIPPED_BUNDLE, BackboneConfig, BundleConfig
from early_exit_cli.data import Batch
from early_exit_cli.errors import BundleError, ConfigError, NumericsError
from early_exit_cli.gating import Thresholds, entropy, level_key
from early_exit_cli.heads import ExitHeads, load_heads
from early_exit_cli.runners import make_blocks

FORMAT_VERSION = 1
CONFIG_FILE, CALIBRATION_FILE, HEADS_FILE, DSSD_HEADS_FILE, RECORD_FILE = (
    "config.json",
    "calibration.json",
    "heads.safetensors",
    "aux_heads.pt",
    "eexit.json",
)
CONFIG_KEYS = {
    "model_name": str,
    "num_heads": int,
    "head_layer_indices": list,
    "quantization": str,
    "hidden_size": int,
    "vocab_size": int,
    "num_hidden_layers": int,
}


@dataclass
class EarlyExitModel:
    """A backbone with exit heads, ready to decode one text at a time."""

    backbone: Backbone
    blocks: Blocks
    heads: ExitHeads | None = None
    thresholds: Thresholds | None = None
    record: dict[str, Any] = field(default_factory=dict)

    def start(self, prompt_ids: list[int], max_new_tokens: int) -> KVCache:
        """A KV cache holding the prompt but for its last token, which is the first one to be run by decoding.

        The number of keys read may decide a token's last bits, so the capacity depends on the request alone.

        Raises:
            ConfigError: empty prompt, or prompt and new tokens beyond the context.
        """
        self.check_length(len(prompt_ids), max_new_tokens)
        outside = [token for token in prompt_ids if not 0 <= token < self.backbone.embedding.num_embeddings]
        if outside:
            raise ConfigError(f"token {outside[0]} of the prompt is not in the vocabulary")
        cache = self.blocks.new_cache(len(prompt_ids) + max_new_tokens + LARGEST_WIDTH)
        for position in range(0, len(prompt_ids) - 1, PREFILL_WIDTH):
            tokens = prompt_ids[position : min(position + PREFILL_WIDTH, len(prompt_ids) - 1)]
            self.run(self.embed(tokens), cache, position, 0, self.blocks.num_blocks)
        cache.length = len(prompt_ids) - 1
        return cache

    def check_length(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Refuse an empty prompt, and one that does not fit the context together with its answer."""
        if prompt_tokens == 0:
            raise ConfigError("the prompt is empty")
        context = self.backbone.context_length
        if prompt_tokens + max_new_tokens > context:
            raise ConfigError(
                f"the prompt's {prompt_tokens} tokens and {max_new_tokens} new ones exceed the context of {context}",
                hint="shorten the prompt, or lower --max-tokens",
            )

    def embed(self, tokens: list[int]) -> Tensor:
        """Token ids -> [len(tokens), hidden]."""
        return self.blocks.embed(torch.tensor(tokens).to(self.backbone.device, non_blocking=True))

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        """Blocks first .. last - 1 over [rows, hidden] at `position`, padded to an invariant width.

        What padding rows leave in the KV cache lies behind the last row and is overwritten before any real row can
        see it.
        """
        rows, largest = hidden.shape[0], self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:  # a device whose invariant widths end earlier takes several passes
            parts = ((hidden[:largest], position), (hidden[largest:], position + largest))
            return torch.cat([self.run(part, cache, place, first, last) for part, place in parts])
        return self.blocks.run(self._padded(hidden), cache, position, first, last)[:rows]

    def _padded(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] with its last row repeated up to an invariant width."""
        rows = hidden.shape[0]
        width = self.blocks.pass_width(rows) if rows <= LARGEST_WIDTH else rows
        return hidden if width == rows else torch.cat((hidden, hidden[-1:].expand(width - rows, -1)))

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last block -> (normed states [rows, hidden], the backbone's choices [rows] on the CPU).

        Raises:
            NumericsError: a NaN or infinite state.
        """
        rows, largest = hidden.shape[0], self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:
            (head, first), (tail, others) = self.finish(hidden[:largest]), self.finish(hidden[largest:])
            return torch.cat((head, tail)), torch.cat((first, others))
        normed, choices = self.blocks.finish(self._padded(hidden))
        choices = choices[:rows].cpu()  # the one time that a pass waits for the device
        if (choices < 0).any():
            raise _not_finite()
        return normed[:rows], choices


def require_finite(best_logits: Tensor) -> None:
    """Refuse a row whose best logit is NaN or infinite: argmax would silently say token 0.

    Raises:
        NumericsError
    """
    if not torch.isfinite(best_logits).all():
        raise _not_finite()


def _not_finite() -> NumericsError:
    return NumericsError(
        "the backbone's logits are NaN or infinite",
        hint="check the model file and the text, or --quantization none",
    )


def bundle_folder(config: BundleConfig) -> Path:
    """The folder a bundle setting names: a folder, its config.json, or the shipped bundle.

    Raises:
        BundleError: nothing there.
    """
    path = Path(config.bundle).expanduser()
    if path.name == CONFIG_FILE:
        path = path.parent
    if path.is_dir():
        return path
    shipped = Path(__file__).parent / "bundles" / config.bundle
    if config.bundle == SHIPPED_BUNDLE and shipped.is_dir():
        return shipped
    raise BundleError(f"no bundle at {config.bundle}", hint="make one with eexit train")


def read_bundle_config(folder: Path) -> dict[str, Any]:
    """config.json of a bundle, with the seven keys that DSSD's loader requires.

    Raises:
        BundleError: a key missing, of another type, or heads out of range.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    for key, kind in CONFIG_KEYS.items():
        if key not in config:
            raise BundleError(f"{path} has no {key!r}")
        if not isinstance(config[key], kind) or isinstance(config[key], bool):
            raise BundleError(f"{path}: {key} must be {kind.__name__}, found {config[key]!r}")
    layers = config["head_layer_indices"]
    depth = config["num_hidden_layers"]
    if (
        len(layers) != config["num_heads"]
        or not layers
        or any(not isinstance(layer, int) or not 0 <= layer < depth for layer in layers)
        or sorted(set(layers)) != layers
    ):
        raise BundleError(
            f"{path}: head_layer_indices {layers} must be {config['num_heads']} ascending blocks between 0 and {depth - 1}"
        )
    return config


def read_thresholds(path: Path, num_heads: int) -> Thresholds:
    """calibration.json's thresholds.

    Raises:
        BundleError: a level without its block, a head without its number.
    """
    record = read_json(path)
    levels = record.get("accuracy_levels")
    blocks = record.get("thresholds")
    if not isinstance(levels, list) or not isinstance(blocks, dict):
        raise BundleError(f"{path} must hold accuracy_levels and thresholds")
    found: dict[str, list[float]] = {}
    for level in levels:
        block = blocks.get(level_key(level)) if isinstance(level, (int, float)) else None
        if not isinstance(block, dict):
            raise BundleError(f"{path}: level {level!r} has no thresholds")
        row = [block.get(str(head)) for head in range(num_heads)]
        for head, value in enumerate(row):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
                raise BundleError(f"{path}: level {level_key(level)}, head {head}: no threshold, found {value!r}")
        found[level_key(level)] = [float(value) for value in row if value is not None]
    return Thresholds(found)


def load_model(
    backbone_config: BackboneConfig, bundle: BundleConfig | None, *, with_thresholds: bool = True
) -> EarlyExitModel:
    """Load a backbone and, with `bundle`, its heads and thresholds.

    Raises:
        BundleError: damaged bundle, or heads that were made for another backbone (both values are named).
    """
    folder = bundle_folder(bundle) if bundle else None
    config = read_bundle_config(folder) if folder else None
    backbone = load_backbone(backbone_config)
    model = EarlyExitModel(backbone, make_blocks(backbone, backbone_config.runner, backbone_config.cuda_graphs))
    if folder is None or config is None or bundle is None:
        return model
    model.record = read_json(folder / RECORD_FILE)
    check_fingerprint(config, model.record, backbone, folder)
    heads = model.record.get("heads", {})
    model.heads = load_heads(
        folder / HEADS_FILE,
        backbone,
        heads.get("kind", "linear"),
        config["head_layer_indices"],
        int(heads.get("rank", 0)),
    )
    calibration = bundle.calibration_path or folder / CALIBRATION_FILE
    if with_thresholds and (bundle.calibration_path or calibration.exists()):
        model.thresholds = read_thresholds(calibration, config["num_heads"])
    return model


def check_fingerprint(config: dict[str, Any], record: dict[str, Any], backbone: Backbone, folder: Path) -> None:
    """Refuse heads of another backbone, naming the field and both values."""
    found = backbone.fingerprint
    declared = {key: config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers", "quantization")}
    differences = fingerprint_differences(declared, found) or fingerprint_differences(
        record.get("fingerprint", {}), found
    )
    if differences:
        named = "; ".join(f"{key}: heads {theirs!r}, backbone {ours!r}" for key, theirs, ours in differences)
        raise BundleError(
            f"the heads in {folder} were made for another backbone than {backbone.name} ({named})",
            hint=f"their backbone is {config['model_name']} in {config['quantization']}",
        )


def save_bundle(
    folder: Path,
    readout: Readout,
    heads: ExitHeads,
    training_config: dict[str, Any],
    record: dict[str, Any],
) -> None:
    """Write heads, config.json and eexit.json; a calibration of other heads is removed. eexit.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (CALIBRATION_FILE, DSSD_HEADS_FILE, RECORD_FILE):
        (folder / stale).unlink(missing_ok=True)
    heads.save(folder / HEADS_FILE, readout.dtype)
    if heads.kind == "linear":
        weights = heads.dssd_state_dict(readout.dtype)
        write_atomic(folder / DSSD_HEADS_FILE, lambda temporary: torch.save(weights, temporary))
    write_json(
        folder / CONFIG_FILE,
        {
            "model_name": readout.name,
            "num_heads": len(heads),
            "head_layer_indices": heads.layers,
            "quantization": readout.quantization,
            "hidden_size": readout.hidden_size,
            "vocab_size": readout.vocab_size,
            "num_hidden_layers": readout.num_blocks,
            "training_config": training_config,
        },
    )
    write_json(
        folder / RECORD_FILE,
        {
            "format_version": FORMAT_VERSION,
            "fingerprint": readout.fingerprint,
            "heads": {
                "kind": heads.kind,
                "rank": heads.rank,
                "draft_vocab": 0 if heads.draft_vocab is None else int(heads.draft_vocab.numel()),
            },
            **record,
        },
    )


@dataclass(frozen=True)
class Readings:
    """What backbone and heads say at the positions of a batch where the next token is known.

    All on the CPU. choices, targets: [positions] int64, the backbone's argmax and the text's next token.
    backbone_top5: [positions, 5]. tokens, entropies: [heads, positions]; top5: [heads, positions, 5], token ids.
    """

    choices: Tensor
    targets: Tensor
    backbone_top5: Tensor
    tokens: Tensor
    entropies: Tensor
    top5: Tensor


def read_batch(model: EarlyExitModel, batch: Batch) -> Readings:
    """Run a packed batch and read every head at the positions that count (`Batch.measured`).

    Raises:
        NumericsError: NaN or infinite logits of the backbone.
    """
    heads = require_heads(model)
    batch = batch.to(model.backbone.device)
    with torch.inference_mode():
        states = model.backbone.hidden_states_at(batch.input_ids, batch.block_mask(), heads.exit_layers)
        valid = batch.measured
        targets = batch.input_ids.roll(-1, 1)[valid]
        *exits, final = [state[valid] for state in states]
        backbone_logits = model.backbone.lm_head(final)
        highest, choices = backbone_logits.max(-1)
        require_finite(highest)
        tokens, entropies, top5 = [], [], []
        for head, hidden in enumerate(exits):
            logits = heads.logits(head, hidden)
            entropies.append(entropy(logits))
            best = heads.token_ids(logits.topk(5, -1).indices)
            top5.append(best)
            tokens.append(best[:, 0])
        return Readings(
            choices.cpu(),
            targets.cpu(),
            backbone_logits.topk(5, -1).indices.cpu(),
            torch.stack(tokens).cpu(),
            torch.stack(entropies).cpu(),
            torch.stack(top5).cpu(),
        )


def require_heads(model: EarlyExitModel) -> ExitHeads:
    """The model's heads.

    Raises:
        BundleError: loaded without a bundle.
    """
    if model.heads is None:
        raise BundleError("this needs trained heads", hint="name a bundle with --bundle")
    return model.heads
