"""Loading a backbone: from the Hub, a folder, a GGUF file, or a model that somebody has loaded; every fault in one line."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from early_exit_cli.backbone.auto_model import read_model
from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.chat import Prompt, encode_prompt
from early_exit_cli.backbone.contents import SETTINGS, content_of, files_of
from early_exit_cli.backbone.families import refusal
from early_exit_cli.backbone.gguf import converted_gguf, embedded_gguf
from early_exit_cli.backbone.load_errors import load_error, refuse_adapter, require_all_weights, require_tokenizer
from early_exit_cli.backbone.multimodal import NAMES, language_part, processor_template
from early_exit_cli.backbone.quantization import plain_dtype, plain_modules, quantization_of, saved_in, settings_for
from early_exit_cli.backbone.repacking import repack
from early_exit_cli.backbone.weight_cache import WeightCopy
from early_exit_cli.config import EMBEDDED_MODEL, BackboneConfig
from early_exit_cli.errors import BackboneError, BundleError, ConfigError, NumericsError, UnsupportedBackboneError
from early_exit_cli.files.instruction_sets import instruction_set
from early_exit_cli.numerics import one_thread
from early_exit_cli.steps import step

COMPILED_PRODUCTS = "16"


def load_tokenizer(config: BackboneConfig) -> Callable[[Prompt], list[int]]:
    """A backbone's way of turning a prompt into token ids, without its weights."""
    quiet_libraries()
    return partial(encode_prompt, _tokenizer(config.model_name, *_locate(config)))


def _tokenizer(name: str, source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library raises whatever a damaged file provokes
        raise load_error(name, source, revision, "tokenizer", error) from error
    require_tokenizer(name, tokenizer)
    if not tokenizer.chat_template:
        tokenizer.chat_template = processor_template(source, revision)
    return tokenizer


def load_settings(config: BackboneConfig) -> Any:
    """A backbone's configuration, transformers' own, without its weights.

    Raises:
        UnsupportedBackboneError: nothing here runs such a model.
        BackboneError: not found, gated, offline, or damaged.
    """
    quiet_libraries()
    return _supported_config(config.model_name, *_locate(config))


def load_backbone(config: BackboneConfig, check: Callable[[Any], None] | None = None) -> Backbone:
    """Load the backbone frozen, in the asked precision, or in the one its checkpoint was saved in.

    Args:
        check: called with transformers' configuration before a weight is read or downloaded; may refuse it.

    Raises:
        ConfigError: CUDA graphs demanded on another device, or an instruction set that this processor has not.
        UnsupportedBackboneError: nothing here runs such a model; told before any weight is read.
        BackboneError: not found, gated, offline, an adapter, damaged, or not whole.
        NumericsError: the loaded model does not compute finite numbers.
    """
    quiet_libraries()
    _limit_compiled_products()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    to_download = is_remote(config)
    doing = f"downloading {config.model_name} from the Hub" if to_download else f"loading {config.model_name}"
    with step(doing, has_bars=to_download):
        return _load(config, check)


def _load(config: BackboneConfig, check: Callable[[Any], None] | None) -> Backbone:
    """`load_backbone`, quietly."""
    device = pick_device(config.device)
    if device.type == "cpu":
        instruction_set()  # refused before any weight is read
    if config.cuda_graphs == "on" and device.type != "cuda":
        raise ConfigError(f"cuda_graphs is on, but the device is {device}", hint="--cuda-graphs auto")
    source, revision = _locate(config)
    refuse_adapter(config.model_name, source, revision)
    settings = _supported_config(config.model_name, source, revision)
    if check is not None:
        check(settings)
    dtype = _compute_dtype(device)
    saved = saved_in(config.model_name, settings, device, dtype)
    if saved is None and config.quantization == "none" and device.type == "cpu":
        dtype = plain_dtype(settings, config.runner)
    quantization = settings_for(config.quantization, dtype, plain_modules(settings)) if saved is None else None
    tokenizer = _tokenizer(config.model_name, source, revision)

    threads, precision = torch.get_num_threads(), saved or config.quantization

    def ready(model: Any) -> Backbone:
        model.eval().requires_grad_(False)
        if precision == "4bit":
            repack(model, threads)
        backbone = Backbone(
            model=model,
            tokenizer=tokenizer,
            name=config.model_name,
            quantization=precision,
            revision=getattr(model.config, "_commit_hash", None) or config.revision,
            files=files_behind(source, revision),
        )
        _preflight(backbone)
        _return_freed_memory()
        return backbone

    kept = None
    if config.weight_cache and config.quantization == "4bit" and saved is None:
        kept = WeightCopy(source, revision, settings, quantization, dtype, device)
        with one_thread():  # nothing is summed up: the copy has been quantized
            model = kept.read()
            if model is not None:
                # damaged, perhaps: the original has the last word
                with contextlib.suppress(BackboneError, NumericsError):
                    return ready(model)
                del model
    try:
        model, report = read_model(
            source,
            settings,
            dtype,
            device,
            revision=revision,
            quantization_config=quantization,
            key_mapping=NAMES,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # the library raises whatever a damaged file provokes
        raise load_error(config.model_name, source, revision, "weights", error) from error
    require_all_weights(config.model_name, report)
    with kept.keeping(model) if kept is not None else contextlib.nullcontext():
        return ready(model)


def adopt_backbone(model: Any, tokenizer: Any = None) -> Backbone:
    """A backbone that was loaded with `transformers` before: the same weights, frozen and in evaluation mode from now on.

    Args:
        tokenizer: by default the one that lies where the model was loaded from.

    Raises:
        UnsupportedBackboneError: nothing here runs such a model.
        BackboneError: not a causal language model of `transformers` on one device, or no tokenizer.
        NumericsError: it does not compute finite numbers.
    """
    from transformers import AutoTokenizer, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise BackboneError(
            f"{type(model).__name__} is not a causal language model of transformers",
            hint="AutoModelForCausalLM loads one; merge_and_unload() makes one of a peft model",
        )
    name = model.name_or_path or model.config.model_type
    refused = refusal(model.config)
    if refused is not None:
        raise UnsupportedBackboneError(f"{name} {refused}")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise BackboneError(f"{name} lies on {', '.join(sorted(devices))}; it must lie on one device")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise BackboneError(f"no tokenizer at {name!r}", hint="give it: tokenizer=...") from error
    model.eval().requires_grad_(False)
    backbone = Backbone(
        model=model,
        tokenizer=tokenizer,
        name=name,
        quantization=quantization_of(model.config) or "none",
        revision=getattr(model.config, "_commit_hash", None),
    )
    backbone.refuse_lost_changes()
    if backbone.quantization == "4bit" and backbone.device.type == "cpu" and backbone.dtype != torch.bfloat16:
        raise UnsupportedBackboneError(
            f"{name} is in 4bit with states in {backbone.dtype}; on a CPU they are in torch.bfloat16",
            hint="load it with dtype=torch.bfloat16",
        )
    _preflight(backbone)
    return backbone


def _return_freed_memory() -> None:
    """Give what loading used and freed back to the system: otherwise it adds to the peak of all that follows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _limit_compiled_products() -> None:
    """oneDNN, and what torch puts around it, each keep the last 1,024 products that they compiled for a shape: 300 MB in a
    process that answers long, since every length of a text is another shape. A few hold all that one text needs again and
    again. Read when the first is compiled (docs/measurements/exactness.md).
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, COMPILED_PRODUCTS)


def quiet_libraries() -> None:
    """Keep the libraries' progress bars and advice out of our streams; errors still show."""
    if os.environ.get("EEXIT_DEBUG"):
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if sys.stderr.isatty():  # the Hub's own bars went with them
        enable_progress_bars()
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


def _locate(config: BackboneConfig) -> tuple[str, str | None]:
    """A folder or Hub id that `from_pretrained` loads, and its revision."""
    path = Path(config.model_name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BackboneError(f"no GGUF file at {path}")
        return str(converted_gguf(path)), None
    if path.is_file():
        raise BackboneError(f"{path} is a file of another kind", hint=f"name the folder of the model: {path.parent}")
    if path.is_dir():
        return str(path), None
    if config.model_name == EMBEDDED_MODEL and config.revision is None:
        embedded = embedded_gguf()
        if embedded is not None:
            return str(converted_gguf(embedded)), None
    return config.model_name, config.revision


def is_remote(config: BackboneConfig) -> bool:
    """Whether a backbone is to come from the Hub and nothing of it is here yet."""
    name = config.model_name
    if Path(name).expanduser().exists() or (name == EMBEDDED_MODEL and config.revision is None and embedded_gguf()):
        return False
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        return not constants.HF_HUB_OFFLINE and not isinstance(
            try_to_load_from_cache(name, SETTINGS[0], revision=config.revision), str
        )
    except ValueError:  # no id of the Hub: loading says so
        return False


def local_content(config: BackboneConfig) -> str | None:
    """`Backbone.content` of a backbone whose files are on this machine, without loading it; None where they are not.

    Raises:
        BackboneError: a GGUF file that is no whole model, or files that change right now.
    """
    path = Path(config.model_name).expanduser()
    if path.suffix == ".gguf" and not path.is_file():
        return None
    files = files_behind(*_locate(config))
    if files is None:
        return None
    try:
        found = content_of(files)
    except OSError:  # one is missing: loading names it
        return None
    if found is None:
        raise BackboneError(
            f"the files of {config.model_name} changed while they were read", hint="wait until they are written"
        )
    return found


def files_behind(source: str, revision: str | None) -> list[Path] | None:
    """The files on this machine that decide what a backbone computes; None where they cannot be told."""
    folder = Path(source)
    try:
        if not folder.is_dir():
            from transformers.utils.hub import cached_file

            folder = Path(str(cached_file(source, SETTINGS[0], revision=revision, local_files_only=True))).parent
        # what is no plain checkpoint is decided by all that lies there
        return files_of(folder) or sorted(path for path in folder.iterdir() if path.is_file())
    except (OSError, BundleError):
        return None


def _supported_config(name: str, source: str, revision: str | None) -> Any:
    """The checkpoint's own configuration; of a multimodal one, that of its language part.

    Raises:
        UnsupportedBackboneError: nothing here runs it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # the library raises whatever a damaged config.json provokes
        raise load_error(name, source, revision, "configuration", error) from error
    part = language_part(config)
    refused = refusal(part)
    if refused is not None:
        of_what = "" if part is config else f"is multimodal ({config.model_type}), and its language part "
        raise UnsupportedBackboneError(f"{name} {of_what}{refused}")
    return part


def _preflight(backbone: Backbone) -> None:
    """One pass over a few tokens: a wrong compute dtype or a damaged file shows as NaN (bitsandbytes#1971)."""
    ids = torch.arange(1, 9, device=backbone.device).remainder(backbone.vocab_size)[None]
    try:
        with torch.no_grad():
            logits = backbone.model(input_ids=ids, use_cache=False).logits
    except (RuntimeError, AssertionError) as error:  # kernels refuse shapes in both ways
        raise BackboneError(
            f"{backbone.name} does not run in {backbone.quantization} on {backbone.device}: {' '.join(str(error).split())[:200]}",
            hint="try --quantization none",
        ) from error
    if not torch.isfinite(logits).all():
        raise NumericsError(
            f"{backbone.name} in {backbone.quantization} gives NaN or infinite logits",
            hint="try --quantization none, or another file of the model",
        )
