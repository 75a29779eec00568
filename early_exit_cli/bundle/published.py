"""EAGLE-3 heads that others trained, in the two layouts they are published in, made into a bundle.

SafeAILab's: config.json of a Llama with `draft_vocab_size`, weights whose block is called `midlayer`; SpecForge and
AngelSlim write it too. speculators': config.json with `speculators_model_type: eagle3`, the block under
`transformer_layer_config`, its weights `layers.0`. Either may hold the embedding or leave it to the backbone. What a
field asks for is computed or refused by its name, so that no head drafts in another way than it was trained to.

Pickles are read with `weights_only` (`dssd.load_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from early_exit_cli.backbone.output import BackboneView
from early_exit_cli.backbone.rope import scaled_rotary
from early_exit_cli.bundle.dssd import load_tensors
from early_exit_cli.bundle.files import CONFIG_FILE, EAGLE_FILE, RECORD_FILE
from early_exit_cli.bundle.kinds import SPECULATORS, Kind, kind_of_checkpoint
from early_exit_cli.bundle.save import bundle_config
from early_exit_cli.errors import BundleError, said, shown
from early_exit_cli.files.atomic import file_sha256, read_json, write_json
from early_exit_cli.files.forms import Count, Form, Positive
from early_exit_cli.files.schemas import FORMAT_VERSION, Eagle, EagleLayout, require_form
from early_exit_cli.heads.eagle import head_of
from early_exit_cli.heads.exit_heads import DRAFT_VOCAB

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
"""Behind a name of WEIGHT_FILES: which of several files holds which tensor."""
BLOCK_THERE, BLOCK = "midlayer.", "layers.0."
"""What the names of the block's tensors begin with in SafeAILab's layout, and here."""
BLOCK_KEYS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"),
)
"""What the library's configuration of the block is made from."""
KNOWN_KEYS = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings", "model_type"),
    *("speculators_model_type", "speculators_version", "speculators_config", "transformer_layer_config"),
    *("draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "target_hidden_size", "embed_requires_grad"),
    *("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "has_no_defaults_at_init"),
    *("enable_sp_ulysses", "_name_or_path", "num_lookahead_tokens"),
}
"""Of speculators' config.json: any other that is set may ask for anything."""


def _no(value: object) -> object:
    if value is not None and value is not False:
        raise ValueError(f"{shown(value)} is not supported")
    return value


Unsupported = Annotated[object, AfterValidator(_no)]
"""Of a field that asks for something when it is set."""


class Captured(Form):
    """`eagle_config` of SafeAILab's layout: blocks whose output is read, counted from 0 as SGLang counts them."""

    eagle_aux_hidden_state_layer_ids: list[Count] | None = None
    use_aux_hidden_state: bool | None = None


class Verifier(Form):
    """The backbone, as a checkpoint names it."""

    name_or_path: str | None = None


class SpeculatorsForm(Form):
    """`speculators_config`."""

    verifier: Verifier = Verifier()


class IndexForm(Form):
    """Which file holds which tensor."""

    weight_map: dict[str, str]


class PublishedForm(Form):
    """config.json of either layout, as far as it is not the block's. Numbers of layers at the top are blocks run, as vLLM
    counts them."""

    draft_vocab_size: Positive | None = None
    eagle_aux_hidden_state_layer_ids: list[Count] | None = None
    eagle_config: Captured | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool | None = None
    fc_norm: bool | None = None
    norm_output: bool | None = None
    speculators_config: SpeculatorsForm | None = None
    quantization_config: Unsupported = None
    parallel_drafting: Unsupported = None
    logit_scale: Unsupported = None


class BlockForm(Form):
    """What either layout says of the block: at the top, or under `transformer_layer_config`."""

    model_type: str | None = None
    num_hidden_layers: int = 1
    layer_types: list[str] | None = None
    attention_bias: Unsupported = None
    mlp_bias: Unsupported = None
    partial_rotary_factor: float | None = None
    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None
    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    hidden_act: str | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: Positive | None = None


@dataclass(frozen=True)
class Target:
    """The backbone that a head is for, by its configuration: as much of a `BackboneView` as there is without weights."""

    name: str
    model_type: str
    hidden_size: int
    vocab_size: int
    num_blocks: int
    quantization: str

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """What is known of it."""
        return {
            "model_type": self.model_type,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_blocks,
            "quantization": self.quantization,
        }

    @property
    def lm_head_weight(self) -> Tensor:
        """Its shape alone."""
        return torch.empty(self.vocab_size, self.hidden_size, device="meta")

    embedding_weight = lm_head_weight
    lm_head_bias = None


@dataclass(frozen=True)
class Published:
    """A checkpoint whose config.json was read. layers: blocks run before the states that it reads; None for the default.
    backbone: as it names its own, where it does."""

    folder: Path
    kind: Kind
    form: PublishedForm
    block: BlockForm
    layers: list[int] | None
    backbone: str | None


def read_published(folder: Path, name: str) -> Published:
    """config.json of a published EAGLE-3 head.

    Args:
        name: of the checkpoint, as people know it.

    Raises:
        BundleError: something else, which is named, or a field that is not supported.
    """
    settings = read_json(folder / CONFIG_FILE)
    kind = kind_of_checkpoint(settings)
    if kind is None or not kind.is_supported:
        raise BundleError(f"{name} is {kind.words if kind else 'no draft head that is known here'}: it is not imported")
    source = f"{name}, {CONFIG_FILE}"
    if kind is SPECULATORS:
        unknown = sorted(key for key, value in settings.items() if key not in KNOWN_KEYS and value not in (None, False))
        if unknown:
            raise BundleError(f"{source}: {shown(unknown[0])[1:-1]} is not supported")
    form = require_form(settings, PublishedForm, source)
    if form.eagle_config and form.eagle_config.use_aux_hidden_state is False:
        raise BundleError(f"{source}: eagle_config.use_aux_hidden_state is false, which is not supported")
    if form.norm_before_fc and form.fc_norm:
        raise BundleError(f"{source}: norm_before_fc and fc_norm exclude each other")
    layers = form.eagle_aux_hidden_state_layer_ids
    if not layers and form.eagle_config and form.eagle_config.eagle_aux_hidden_state_layer_ids:
        layers = [block + 1 for block in form.eagle_config.eagle_aux_hidden_state_layer_ids]
    backbone = form.speculators_config.verifier.name_or_path if form.speculators_config else None
    asked = settings.get("transformer_layer_config", {}) if kind is SPECULATORS else settings
    block = require_form(asked, BlockForm, source)
    return Published(folder, kind, form, block, layers or None, backbone)


def target_of(name: str, settings: Any, quantization: str) -> Target:
    """A backbone by its configuration, transformers' own."""
    return Target(
        name=name,
        model_type=str(settings.model_type),
        hidden_size=int(settings.hidden_size),
        vocab_size=int(settings.vocab_size),
        num_blocks=int(settings.num_hidden_layers),
        quantization=quantization,
    )


def convert(published: Published, name: str, target: Target, folder: Path) -> Eagle:
    """Write the bundle of a checkpoint into the existing folder `folder`; eexit.json comes last.

    Args:
        name: of the checkpoint, and of which commit.

    Raises:
        BundleError: files missing or damaged, tensors that do not fit, a field or a tensor that is not supported.
    """
    path, tensors = read_weights(published.folder)
    layers = exit_layers_of(published, target)
    rows = published.form.draft_vocab_size or len(tensors.get("lm_head.weight", ()))
    draft_vocab = draft_vocabulary(tensors, rows, target.vocab_size, path)
    layout = layout_of(published, tensors)
    head_of(path, tensors, cast(BackboneView, target), layers, draft_vocab, layout)  # refuses what does not fit
    kept = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if draft_vocab is not None:
        kept[DRAFT_VOCAB] = draft_vocab.to(torch.int32)
    save_file(kept, folder / EAGLE_FILE, metadata={"kind": "eagle"})
    write_json(folder / CONFIG_FILE, bundle_config(cast(BackboneView, target), [], {}))
    eagle = Eagle(exit_layers=layers, layout=layout)
    record = {
        "format_version": FORMAT_VERSION,
        "fingerprint": target.fingerprint,
        "eagle": {
            "exit_layers": layers,
            "draft_vocab": 0 if draft_vocab is None else draft_vocab.numel(),
            "layout": layout.model_dump(),
        },
        "imported": {"from": name, "layout": published.kind.words, "sha256": file_sha256(path)},
    }
    write_json(folder / RECORD_FILE, record)
    return eagle


def read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of a checkpoint under our names, of one file or of several, and the file that named them.

    Raises:
        BundleError: no such file, a damaged one, or a pickle that holds more than tensors.
    """
    names = [name for file in WEIGHT_FILES for name in (file, file + INDEX) if (folder / name).is_file()]
    if not names:
        raise BundleError(f"{folder} has no weights: neither {' nor '.join(WEIGHT_FILES)}")
    path = folder / names[0]
    files = [path]
    if names[0].endswith(INDEX):
        index = require_form(read_json(path), IndexForm, str(path))
        files = [folder / Path(name).name for name in sorted({*index.weight_map.values()})]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_safetensors(file) if file.suffix == ".safetensors" else load_tensors(file)
    return path, {
        name.replace(BLOCK_THERE, BLOCK, 1) if name.startswith(BLOCK_THERE) else name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
    }


def exit_layers_of(published: Published, target: Target) -> list[int]:
    """Blocks run before the states that the head reads; where it does not say, EAGLE-3's three.

    Raises:
        BundleError: the embedding's output, layers that do not rise, or that the backbone has not.
    """
    blocks = target.num_blocks
    layers = published.layers or [2, blocks // 2, blocks - 3]
    if layers != sorted({*layers}) or not 0 < layers[0] <= layers[-1] <= blocks:
        raise BundleError(
            f"eagle_aux_hidden_state_layer_ids: the states after {shown(layers)} blocks are not supported; they must be "
            f"ascending, after 1 to {blocks} of {target.name}'s blocks"
        )
    return layers


def draft_vocabulary(tensors: dict[str, Tensor], rows: int, vocab_size: int, path: Path) -> Tensor | None:
    """Tokens that the head may propose, [rows] int64, of d2t, which holds token minus column; None for all of them. Takes
    both maps out of `tensors`.

    Raises:
        BundleError: missing, no tokens of the backbone, one of them twice, or t2d names others.
    """
    offsets, has_column = (tensors.pop(name, None) for name in ("d2t", "t2d"))
    if rows == vocab_size:
        return None
    if offsets is None or offsets.shape != (rows,) or offsets.is_floating_point():
        found = None if offsets is None else f"{list(offsets.shape)} {offsets.dtype}"
        raise BundleError(
            f"{path}: d2t should be {rows} whole numbers, a token for each column of the LM head, found {found}"
        )
    chosen = offsets.long() + torch.arange(rows)
    if chosen.min() < 0 or chosen.max() >= vocab_size or chosen.unique().numel() < rows:
        raise BundleError(f"{path}: d2t names tokens twice, or outside the backbone's {vocab_size}")
    if has_column is not None and has_column.bool().nonzero()[:, 0].tolist() != chosen.sort().values.tolist():
        raise BundleError(f"{path}: t2d and d2t name different tokens")
    return chosen


def layout_of(published: Published, tensors: Mapping[str, Tensor]) -> EagleLayout:
    """What the head computes.

    Raises:
        BundleError: a field asks for what is not supported.
    """
    form = published.form
    block = block_settings(published)
    layout = require_form(
        {
            "hidden": block.hidden_size,
            "query_heads": block.num_attention_heads,
            "kv_heads": block.num_key_value_heads,
            "head_dim": block.head_dim,
            "inner": block.intermediate_size,
            "activation": block.hidden_act,
            "rope": dict(block.rope_parameters),
            "positions": block.max_position_embeddings,
            "eps": block.rms_norm_eps,
            "fc_norm": bool(form.fc_norm),
            "joint_norm": bool(form.norm_before_fc),
            "qk_norm": f"{BLOCK}self_attn.q_norm.weight" in tensors,
            "norm_before_residual": bool(form.norm_before_residual),
            "norm_output": bool(form.norm_output),
            "own_embedding": "embed_tokens.weight" in tensors,
        },
        EagleLayout,
        str(published.folder / CONFIG_FILE),
    )
    scaled_rotary(layout.rope, layout.head_dim, layout.positions)
    return layout


def block_settings(published: Published) -> Any:
    """The block's configuration, transformers' own: what config.json leaves out is the library's default, as it was when the
    file was written.

    Raises:
        BundleError: a field asks for what is not supported.
    """
    from transformers import AutoConfig
    from transformers.activations import ACT2FN

    block = published.block
    kind = "llama"  # SafeAILab's code is Llama's, whatever the file says
    if published.kind is SPECULATORS:
        kind = block.model_type or "qwen3"
        if kind not in ("llama", "qwen3"):
            raise BundleError(
                f"transformer_layer_config.model_type {shown(kind)} is not supported; llama and qwen3 are"
            )
    if block.num_hidden_layers != 1:
        raise BundleError(f"num_hidden_layers {block.num_hidden_layers} is not supported; EAGLE-3 has one block")
    if "sliding_attention" in (block.layer_types or ()):
        raise BundleError("layer_types: sliding_attention is not supported")
    if block.partial_rotary_factor not in (None, 1.0):
        raise BundleError(f"partial_rotary_factor {block.partial_rotary_factor} is not supported")
    told = {key: value for key in BLOCK_KEYS if (value := getattr(block, key)) is not None}
    try:
        found: Any = AutoConfig.for_model(kind, **told)
    except Exception as error:  # the library raises whatever a wrong value provokes
        raise BundleError(f"the block's settings: {said(error)}") from error
    if found.hidden_act not in ACT2FN:
        raise BundleError(f"hidden_act {shown(found.hidden_act)} is not supported")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        BundleError: missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} is missing or damaged: {said(error)}") from error
