"""The layer for multi-token prediction (MTP) that a checkpoint brings, which the library leaves out while loading.

At a verified position t it reads the embedding of token t + 1 and the backbone's final normed state, each through a norm of its
own, joined in this order; then comes a block of the family's own kind, with a norm behind it, and the backbone's LM head says
token t + 2. DeepSeek-V3 has it so (section 2.2), and Qwen and GLM took it over; they only name the tensors differently.

The block is loaded by the library as a model of one block: its quantization, its experts and its attention are those of
the backbone's blocks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.load_errors import require_all_weights
from early_exit_cli.backbone.quantization import plain_modules, settings_for
from early_exit_cli.config import Quantization
from early_exit_cli.errors import BackboneError, said
from early_exit_cli.steps import step

BLOCK, NORM = "model.layers.0.", "model.norm."
JOIN, EMBEDDING_NORM, STATE_NORM = "join.", "embedding_norm.", "state_norm."
BESIDE = {
    "fc.": JOIN,
    "pre_fc_norm_embedding.": EMBEDDING_NORM,
    "pre_fc_norm_hidden.": STATE_NORM,
    "norm.": NORM,
    "layers.0.": BLOCK,
}
BEHIND = {
    "eh_proj.": JOIN,
    "enorm.": EMBEDDING_NORM,
    "hnorm.": STATE_NORM,
    "shared_head.norm.": NORM,
    "shared_head.head.": None,  # copies of the backbone's
    "embed_tokens.": None,
    "": BLOCK,
}
"""How names of a layer's tensors begin in the files, and here."""
PLACEHOLDER = 32
"""Tokens of the vocabulary that the library makes room for, until the backbone's embedding and LM head take its place."""


@dataclass(frozen=True)
class MtpLayer:
    """The layer's modules, on the backbone's device.

    block: one block and the norm behind it; its embedding and LM head are the backbone's. embedding_norm, state_norm: of
    what it reads. join: [*, 2 * hidden] -> [*, hidden].
    """

    block: Backbone
    embedding_norm: nn.Module
    state_norm: nn.Module
    join: nn.Module


def load_mtp(backbone: Backbone) -> MtpLayer | None:
    """The layer that lies in the files that a backbone was loaded from; None where there is none.

    Of several, each for one more token, the first is read: it is rolled out on its own states.

    Raises:
        BackboneError: there is one, and it is not whole, or not in a form that is read here.
    """
    if backbone.family.mtp is None or backbone.files is None:
        return None
    name = f"the MTP layer of {backbone.name}"
    try:
        tensors = _tensors_of(backbone.files, backbone.family.mtp, backbone.num_blocks)
        if not tensors:
            return None
        with step("loading the MTP layer"):
            return _made(name, backbone, tensors)
    except BackboneError:
        raise
    except Exception as error:  # the library raises whatever a damaged file provokes
        raise BackboneError(f"{name} cannot be read: {said(error)}") from error


def _made(name: str, backbone: Backbone, tensors: dict[str, Tensor]) -> MtpLayer:
    """The layer of some tensors.

    Raises:
        BackboneError: some are missing, of other shapes, or quantized.
    """
    odd = [key for key, tensor in tensors.items() if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32)]
    if odd:
        raise BackboneError(f"{name} is quantized in a form that is not read here ({tensors[odd[0]].dtype})")
    if getattr(backbone.config, "mtp_use_dedicated_embeddings", False):
        raise BackboneError(f"{name} has an embedding of its own, which is not read here")
    hidden, dtype, device = backbone.hidden_size, backbone.dtype, backbone.device
    shapes = {JOIN: [hidden, 2 * hidden], EMBEDDING_NORM: [hidden], STATE_NORM: [hidden]}
    around = {}
    for part, shape in shapes.items():
        tensor = tensors.pop(f"{part}weight", None)
        if tensor is None or list(tensor.shape) != shape:
            found = "none" if tensor is None else f"one of {list(tensor.shape)}"
            raise BackboneError(f"{name} has no tensor {part}weight of {shape}, but {found}")
        around[part] = tensor.to(device, dtype)
    quantization = backbone.quantization if backbone.quantization in get_args(Quantization) else "4bit"
    model = _one_block(name, backbone, tensors, quantization)
    block = Backbone(model, backbone.tokenizer, name, quantization)

    def norm(weight: Tensor) -> nn.Module:
        made = copy.deepcopy(block.norm)
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made

    return MtpLayer(block, norm(around[EMBEDDING_NORM]), norm(around[STATE_NORM]), _linear(around[JOIN], quantization))


def _tensors_of(files: Sequence[Path], place: str, num_blocks: int) -> dict[str, Tensor]:
    """The layer's tensors by the names that they have here; the files' other tensors are not read."""
    prefix = re.compile(
        r"(?:model\.|language_model\.)*mtp\." if place == "beside" else rf"model\.layers\.{num_blocks}\."
    )
    names = BESIDE if place == "beside" else BEHIND
    found = {}
    for path in files:
        if path.suffix != ".safetensors":
            continue
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                head = prefix.match(key)
                rest = key[head.end() :] if head else None
                start = None if rest is None else next((start for start in names if rest.startswith(start)), None)
                if rest is not None and start is not None and names[start] is not None:
                    found[f"{names[start]}{rest[len(start) :]}"] = file.get_tensor(key)
    return found


def _one_block(name: str, backbone: Backbone, tensors: dict[str, Tensor], quantization: Any) -> Any:
    """transformers' model of the family with one block, between the backbone's embedding and LM head."""
    settings = _settings(backbone.config)
    empty = torch.zeros(PLACEHOLDER, backbone.hidden_size, dtype=backbone.dtype)
    whole = {**tensors, "model.embed_tokens.weight": empty, "lm_head.weight": empty.clone()}
    loaded: Any = type(backbone.model).from_pretrained(
        None,
        config=settings,
        state_dict=whole,
        dtype=backbone.dtype,
        device_map={"": backbone.device},
        quantization_config=settings_for(quantization, backbone.dtype, plain_modules(settings)),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    require_all_weights(name, report)
    model.set_input_embeddings(backbone.embedding)
    model.set_output_embeddings(backbone.lm_head)
    return model.eval().requires_grad_(False)


def _settings(config: Any) -> Any:
    """A backbone's configuration (transformers' own) with one block: full attention, and experts where the family has them."""
    settings = copy.deepcopy(config)
    if getattr(settings, "quantization_config", None) is not None:
        del settings.quantization_config
    of_one = {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "mlp_layer_types": ["sparse"],
        "mlp_only_layers": [],
        "first_k_dense_replace": 0,
    }
    outside = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    for key, value in {**of_one, **outside, "vocab_size": PLACEHOLDER, "tie_word_embeddings": False}.items():
        if getattr(settings, key, None) is not None:
            setattr(settings, key, value)
    return settings


def _linear(weight: Tensor, quantization: str) -> nn.Module:
    """A linear map without bias; in 4 bit as bitsandbytes holds the backbone's."""
    outputs, inputs = weight.shape
    if quantization != "4bit":
        made = nn.Linear(inputs, outputs, bias=False, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        return made
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantized: Any = Linear4bit(inputs, outputs, False, weight.dtype, quant_type="nf4", device="meta")
    values: Any = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    quantized.weight = values.to(weight.device)  # which quantizes
    return quantized.eval()
