"""`Engine`: a backbone, its block runner, its heads and their thresholds, loaded from a bundle and saved as one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.artifacts import atomic_files, fingerprint_differences, write_atomic, write_json
from early_exit_cli.backbone import Backbone
from early_exit_cli.blocks import LARGEST_WIDTH, Blocks, KVCache, Part
from early_exit_cli.bundle import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    DSSD_HEADS_FILE,
    HEADS_FILE,
    LOOKAHEAD_FILE,
    RECORD_FILE,
    BundleSource,
    applied_quantization,
    kind_of_heads,
    lookahead_layers,
    read_bundle_config,
    read_bundle_record,
)
from early_exit_cli.config import HUB_ID, SHIPPED_BUNDLE, BackboneConfig, BundleConfig, HubConfig
from early_exit_cli.cuda_lookahead import cuda_lookahead
from early_exit_cli.errors import BundleError, ConfigError, HubError, NumericsError, shown
from early_exit_cli.exit_reader import ExitReader, exit_reader
from early_exit_cli.formats import FORMAT_VERSION, CalibrationBeside, CalibrationForm, read_form
from early_exit_cli.gating import Thresholds, level_key
from early_exit_cli.heads import ExitHeads, load_heads
from early_exit_cli.loading import load_backbone
from early_exit_cli.lookahead import LookaheadHead, load_lookahead
from early_exit_cli.readout import Readout
from early_exit_cli.runners import make_blocks

See = Callable[[list[int], list[Tensor]], None]


@dataclass
class Engine:
    """A backbone with exit heads, ready to decode one text at a time."""

    backbone: Backbone
    blocks: Blocks
    heads: ExitHeads | None = None
    thresholds: Thresholds | None = None
    lookahead: LookaheadHead | None = None
    record: dict[str, Any] = field(default_factory=dict)
    round_times: Any = None
    """What rounds take here beyond their parts (`drafters.RoundTimes`), learned while it decodes."""

    @functools.cached_property
    def exit_reader(self) -> ExitReader:
        """Reads the exit heads while drafting."""
        return exit_reader(require_heads(self))

    def start(
        self, prompt_ids: list[int], max_new_tokens: int, exit_layers: Sequence[int] = (), see: See | None = None
    ) -> KVCache:
        """A KV cache holding the prompt but for its last token, which is the first one to be run by decoding.

        The number of keys read may decide a token's last bits, so the capacity depends on the request alone.

        Args:
            see: called with the prompt's states after `exit_layers` and the final normed ones (`Drafter.see`).

        Raises:
            ConfigError: empty prompt, or prompt and new tokens beyond the context.
        """
        self.check_length(len(prompt_ids), max_new_tokens)
        outside = [token for token in prompt_ids if not 0 <= token < self.backbone.embedding.num_embeddings]
        if outside:
            raise ConfigError(f"token {outside[0]} of the prompt is not in the vocabulary")
        cache = self.blocks.new_cache(len(prompt_ids) + max_new_tokens + LARGEST_WIDTH)
        for piece in self.blocks.prompt_pieces(len(prompt_ids) - 1):
            stops = [*exit_layers, self.blocks.num_blocks]
            *deep, final = self.run_tokens(prompt_ids[piece], cache, piece.start, stops)
            if see:
                following = prompt_ids[piece.start + 1 : piece.stop + 1]
                see(following, [*deep, self.blocks.final_norm(final)])
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
        return self.blocks.embed_tokens(tokens)

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        """Blocks first .. last - 1 over [rows, hidden] at `position`, padded to an invariant width.

        What padding rows leave in the KV cache lies behind the last row and is overwritten before any real row can
        see it.
        """
        return self.run_through(hidden, cache, position, [last], first)[0]

    def run_through(
        self, hidden: Tensor, cache: KVCache, position: int, stops: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        """States of [rows, hidden] at `position` after each of `stops` blocks, as `run` gives them."""
        rows, largest = hidden.shape[0], self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:  # a device whose invariant widths end earlier takes several passes
            parts = ((hidden[:largest], position), (hidden[largest:], position + largest))
            found = (self.run_through(part, cache, place, stops, first) for part, place in parts)
            return [torch.cat(pair) for pair in zip(*found, strict=True)]
        states = self.blocks.run_through(self._padded(hidden), cache, position, stops, first)
        return [state[:rows] for state in states]

    def run_tokens(self, tokens: list[int], cache: KVCache, position: int, stops: Sequence[int]) -> list[Tensor]:
        """States of embedded tokens at `position` after each of `stops` blocks, [rows, hidden] each, as `run` gives them."""
        rows, largest = len(tokens), self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:
            return self.run_through(self.embed(tokens), cache, position, stops)
        width = self.blocks.pass_width(rows) if rows <= LARGEST_WIDTH else rows
        states = self.blocks.run_tokens(tokens + tokens[-1:] * (width - rows), cache, position, stops)
        return states if width == rows else [state[:rows] for state in states]

    def run_together(
        self, texts: list[Tensor], caches: list[KVCache], positions: list[int], stops: Sequence[int]
    ) -> list[list[Tensor]]:
        """`run_through` for several texts, [rows, hidden] each, in as few passes as their widths allow; the same bits.

        Returns:
            For each text its states after each of `stops` blocks.
        """
        widths = [self.blocks.pass_width(hidden.shape[0]) for hidden in texts]
        outputs: list[list[Tensor]] = []
        while len(outputs) < len(texts):
            start = end = len(outputs)
            while end < len(texts) and sum(widths[start : end + 1]) <= self.blocks.rows_together:
                end += 1
            if end <= start + 1:  # alone, or wider than any pass
                outputs.append(self.run_through(texts[start], caches[start], positions[start], stops))
                continue
            parts = [Part(caches[text], positions[text], widths[text]) for text in range(start, end)]
            rows = self._padded(torch.cat([self._padded(hidden) for hidden in texts[start:end]]))
            split = [state.split(widths[start:end]) for state in self.blocks.run_together(rows, parts, stops)]
            for number, hidden in enumerate(texts[start:end]):
                outputs.append([states[number][: hidden.shape[0]] for states in split])
        return outputs

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
        if min(choices.tolist()) < 0:
            raise _not_finite()
        return normed[:rows], choices

    def read_out(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last block -> (normed states [rows, hidden], the backbone's logits [rows, vocab]).

        Raises:
            NumericsError: a NaN or infinite state.
        """
        rows, largest = hidden.shape[0], self.blocks.widths[-1]
        if largest < rows <= LARGEST_WIDTH:
            (head, first), (tail, others) = self.read_out(hidden[:largest]), self.read_out(hidden[largest:])
            return torch.cat((head, tail)), torch.cat((first, others))
        normed = self.blocks.final_norm(self._padded(hidden))
        logits = self.blocks.logits(normed)[:rows]
        require_finite(logits.amax(-1))
        return normed[:rows], logits


def synchronize(device: torch.device) -> None:
    """Wait for a GPU, so that a clock read after it counts finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def bundle_source(config: BundleConfig) -> BundleSource:
    """Where the bundle of a setting is: an existing folder or its config.json, the shipped bundle, or a Hub id.

    A Hub id is downloaded once a process, so that all who ask see the same commit.

    Raises:
        BundleError: nothing there.
        HubError: a Hub id that cannot be had.
    """
    path = Path(config.bundle).expanduser()
    if path.name == CONFIG_FILE:
        path = path.parent
    if path.is_dir():
        return BundleSource(path)
    shipped = Path(__file__).parent / "bundles" / config.bundle
    if config.bundle == SHIPPED_BUNDLE and shipped.is_dir():
        return BundleSource(shipped)
    repo_id, _, revision = config.bundle.partition("@")
    if HUB_ID.fullmatch(repo_id):
        try:
            return _from_hub(repo_id, revision or None)
        except HubError as error:
            raise HubError(f"no folder {config.bundle}, and as a Hub id: {error.message}", hint=error.hint) from error
    raise BundleError(f"no bundle at {config.bundle}", hint="make one with eexit train")


@functools.cache
def _from_hub(repo_id: str, revision: str | None) -> BundleSource:
    from early_exit_cli.pull import pull  # the Hub's client is loaded only where a Hub id is named

    return pull(HubConfig(repo_id=repo_id, revision=revision))


def bundle_folder(config: BundleConfig) -> Path:
    """The folder of `bundle_source`."""
    return bundle_source(config).folder


def read_thresholds(path: Path, num_heads: int) -> Thresholds:
    """calibration.json's thresholds.

    Raises:
        BundleError: an unknown metric, a level without its block, a head without its number.
    """
    record = read_form(path, CalibrationForm)
    found: dict[str, list[float]] = {}
    for level in record["accuracy_levels"]:
        block = record["thresholds"].get(level_key(level))
        if block is None:
            raise BundleError(f"{path}: level {level!r} has no thresholds")
        missing = [head for head in range(num_heads) if str(head) not in block]
        if missing:
            raise BundleError(f"{path}: level {level_key(level)}, head {missing[0]}: no threshold")
        found[level_key(level)] = [float(block[str(head)]) for head in range(num_heads)]
    return Thresholds(found, record.get("uncertainty_metric", "entropy"))


def calibration_record_path(folder: Path, calibration: Path) -> Path:
    """Where the record of a calibration stands: the bundle's eexit.json for its own, else NAME.eexit.json beside it."""
    own = calibration.resolve() == (folder / CALIBRATION_FILE).resolve()
    return folder / RECORD_FILE if own else calibration.with_suffix(f".{RECORD_FILE}")


def with_names_of_bundle(config: BackboneConfig, folder: Path) -> BackboneConfig:
    """The backbone section, with name and quantization taken from the bundle unless somebody set them."""
    known = read_bundle_config(folder)
    changes = {name: known[name] for name in ("model_name", "quantization") if name not in config.model_fields_set}
    return BackboneConfig.model_validate(config.model_dump() | changes)


def load_model(
    backbone_config: BackboneConfig,
    bundle: BundleConfig | None,
    *,
    with_thresholds: bool = True,
    backbone: Backbone | None = None,
) -> Engine:
    """Load a backbone and, with `bundle`, its heads and thresholds.

    Args:
        backbone: one that is loaded already, to take instead.

    Raises:
        BundleError: damaged bundle, or heads that were made for another backbone (both values are named).
    """
    folder = bundle_folder(bundle) if bundle else None
    config = read_bundle_config(folder) if folder else None
    backbone = backbone or load_backbone(backbone_config)
    model = Engine(backbone, make_blocks(backbone, backbone_config.runner, backbone_config.cuda_graphs))
    if folder is None or config is None or bundle is None:
        return model
    model.record = read_bundle_record(folder)
    check_fingerprint(config, model.record, backbone, folder)
    if config["num_heads"]:
        kind, rank = kind_of_heads(model.record, folder)
        model.heads = load_heads(folder / HEADS_FILE, backbone, kind, config["head_layer_indices"], rank)
    if "lookahead" in model.record:
        layers = lookahead_layers(model.record, folder, backbone.num_blocks)
        model.lookahead = load_lookahead(folder / LOOKAHEAD_FILE, backbone, layers)
        if backbone.device.type == "cuda":
            cuda_lookahead(model.lookahead)  # recorded now, not inside an answer
    calibration = bundle.calibration_path or folder / CALIBRATION_FILE
    if with_thresholds and (bundle.calibration_path or calibration.exists()):
        model.thresholds = read_thresholds(calibration, config["num_heads"])
        beside = calibration_record_path(folder, calibration)
        record = read_form(beside, CalibrationBeside) if beside.exists() else {}
        model.record["calibration"] = calibration_of(record, config["num_heads"], beside)
    return model


def calibration_of(record: dict[str, Any], num_heads: int, path: Path) -> dict[str, Any]:
    """The calibration in a record read from `path`; empty where there is none.

    Raises:
        BundleError: of another number of heads.
    """
    calibration = record.get("calibration", {})
    if calibration.get("heads") and len(calibration["heads"]) != num_heads:
        raise BundleError(
            f"{path}: the calibration is of {len(calibration['heads'])} heads, the bundle has {num_heads}",
            hint="eexit calibrate",
        )
    return calibration


def check_fingerprint(config: dict[str, Any], record: dict[str, Any], backbone: Backbone, folder: Path) -> None:
    """Refuse heads of another backbone, naming the field and both values."""
    found = backbone.fingerprint
    declared = {key: config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers", "quantization")}
    applied = {**found, "quantization": applied_quantization(backbone.quantization)}
    differences = fingerprint_differences(declared, applied) or fingerprint_differences(record["fingerprint"], found)
    if differences:
        named = "; ".join(f"{key}: heads {shown(theirs)}, backbone {ours!r}" for key, theirs, ours in differences)
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
    """Write heads, config.json and eexit.json together; a calibration of other heads is removed.

    A lookahead head of the same backbone that is there stays. A failure leaves the bundle that was there.
    """
    before = read_bundle_record(folder) if (folder / RECORD_FILE).exists() else {}
    if "lookahead" in before and before.get("fingerprint") == readout.fingerprint:
        record = {**record, "lookahead": before["lookahead"]}
    described = {
        "format_version": FORMAT_VERSION,
        "fingerprint": readout.fingerprint,
        "heads": {
            "kind": heads.kind,
            "rank": heads.rank,
            "draft_vocab": 0 if heads.draft_vocab is None else int(heads.draft_vocab.numel()),
        },
        **record,
    }
    with atomic_files(folder, (CALIBRATION_FILE, DSSD_HEADS_FILE, HEADS_FILE, CONFIG_FILE, RECORD_FILE)) as temporary:
        heads.save(temporary / HEADS_FILE, readout.dtype)
        if heads.kind == "linear":
            weights = heads.dssd_state_dict(readout.dtype)
            write_atomic(temporary / DSSD_HEADS_FILE, lambda path: torch.save(weights, path))
        write_json(temporary / CONFIG_FILE, bundle_config(readout, heads.layers, training_config))
        write_json(temporary / RECORD_FILE, described)


def save_lookahead(
    folder: Path, readout: Readout, head: LookaheadHead, training_config: dict[str, Any], record: dict[str, Any]
) -> None:
    """Add a lookahead head to the bundle in `folder`, or begin one without exit heads.

    Raises:
        BundleError: the bundle there was made for another backbone.
    """
    if (folder / RECORD_FILE).exists():
        bundle = read_bundle_record(folder)
        differences = fingerprint_differences(bundle.get("fingerprint", {}), readout.fingerprint)
        if differences:
            key, theirs, ours = differences[0]
            raise BundleError(
                f"the bundle in {folder} was made for another backbone ({key}: {theirs!r} there, {ours!r} here)",
                hint="use another --output-dir",
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, bundle_config(readout, [], training_config))
        bundle = {"format_version": FORMAT_VERSION, "fingerprint": readout.fingerprint}
    head.save(folder / LOOKAHEAD_FILE, readout.dtype)
    bundle["lookahead"] = {
        "exit_layers": head.exit_layers,
        "draft_vocab": 0 if head.draft_vocab is None else int(head.draft_vocab.numel()),
        **record,
    }
    write_json(folder / RECORD_FILE, bundle)


def bundle_config(readout: Readout, layers: list[int], training_config: dict[str, Any]) -> dict[str, Any]:
    """config.json, with the keys that DSSD's loader requires."""
    return {
        "model_name": readout.name,
        "num_heads": len(layers),
        "head_layer_indices": layers,
        "quantization": applied_quantization(readout.quantization),
        "hidden_size": readout.hidden_size,
        "vocab_size": readout.vocab_size,
        "num_hidden_layers": readout.num_blocks,
        "training_config": training_config,
    }


def require_heads(model: Engine) -> ExitHeads:
    """The model's heads.

    Raises:
        BundleError: loaded without a bundle.
    """
    if model.heads is None:
        raise BundleError("this needs trained heads", hint="name a bundle with --bundle")
    return model.heads
