"""In what precision a backbone's weights are: what we ask bitsandbytes for, or what a checkpoint was saved in."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import nn

from early_exit_cli.backbone.auto_model import auto_model
from early_exit_cli.backbone.families import FAMILIES, LAYERS_WITH_STATE
from early_exit_cli.config import Quantization
from early_exit_cli.errors import BackboneError
from early_exit_cli.files.instruction_sets import find_compiler, lacks

KERNEL_ROWS = 32
"""What the 4-bit kernels of bitsandbytes for CPUs want a whole number of in a product's outputs."""
HEAD_STEP = 64
"""What compiled passes want a whole number of in a head's dimensions."""


def import_bitsandbytes() -> None:
    """Import bitsandbytes without PyTorch's compiler, whose import takes a second.

    It has four functions compiled as it is imported; now each is when it is first called.
    """
    compile_now = torch.compile

    def compile_later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        compiled = functools.cache(functools.partial(compile_now, function, **options))
        return functools.wraps(function)(lambda *args, **named: compiled()(*args, **named))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compile_now


def settings_for(quantization: Quantization, dtype: torch.dtype, plain: tuple[str, ...] = ()) -> Any:
    """transformers' settings to quantize plain weights while they load; none where they stay as they are.

    Args:
        plain: modules that stay unquantized, besides the LM head.
    """
    if quantization == "none":
        return None
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    skipped = ["lm_head", *plain] if plain else None
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)


def plain_dtype(config: Any, runner: str) -> torch.dtype:
    """In what a checkpoint of this configuration computes on a CPU where nothing is quantized.

    bfloat16 where it was saved so and compiled passes read it as it is (`runner` allowing); else float32, which PyTorch
    computes everywhere.
    """
    if config.dtype != torch.bfloat16 or runner not in ("auto", "native"):
        return torch.float32
    if FAMILIES[config.model_type].runner != "fused" or lacks() is not None or find_compiler() is None:
        return torch.float32
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.float32 if head_dim % HEAD_STEP else torch.bfloat16


def plain_modules(config: Any) -> tuple[str, ...]:
    """Modules of a checkpoint of this configuration (transformers' own) that stay unquantized, on every device.

    Those of its family, and in blocks with a state the products that no whole number of rows of a 4-bit kernel makes: they
    put several things side by side, and the smallest has one output a head.
    """
    named = FAMILIES[config.model_type].plain
    if not {*LAYERS_WITH_STATE} & {*(getattr(config, "layer_types", None) or ())}:
        return named
    with torch.device("meta"):
        model = auto_model(config).from_config(config)
    odd = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features % KERNEL_ROWS
    }
    return (*named, *sorted(odd - {*named, "lm_head"}))


def saved_in(name: str, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What the weights of a checkpoint are quantized with already: 4bit or 8bit (bitsandbytes), gptq, awq, ...

    The compute dtype of bitsandbytes is set to ours in `config` (transformers' own): saved ones are often float32.

    Returns:
        None for a plain checkpoint.

    Raises:
        BackboneError: what reads such weights is not installed, or does not run on this device.
    """
    if _is_mlx(config):
        raise BackboneError(
            f"{name} is quantized for MLX, which is not read here",
            hint="take the model that it was made of: it loads in 4 bit",
        )
    method = quantization_of(config)
    if method is None:
        return None
    if method in get_args(Quantization):
        import_bitsandbytes()
    from transformers.quantizers import AutoHfQuantizer

    settings = _settings_in(config)
    if method == "mxfp4":  # read into plain numbers on any device: the library's kernels choose their way by the rows
        config.quantization_config = settings = {**settings, "dequantize": True}
    try:
        AutoHfQuantizer.from_config(dict(settings), pre_quantized=True).validate_environment(device_map={"": device})
    except (ImportError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()).partition(" - supported types")[0][:300]
        raise BackboneError(
            f"{name} is quantized with {settings.get('quant_method', method)}, which does not run here: {reason}",
            hint="install what it names, or take the model's plain weights: they load in 4 bit",
        ) from error
    if method in get_args(Quantization):
        config.quantization_config = settings | {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    return method


def quantization_of(config: Any) -> str | None:
    """What the weights of a configuration (transformers' own) are quantized with: 4bit or 8bit (bitsandbytes), gptq, ..."""
    settings = _settings_in(config)
    if not settings:
        return None
    method = str(getattr(found := settings.get("quant_method", "bitsandbytes"), "value", found))
    if method != "bitsandbytes":
        return method
    return "4bit" if settings.get("load_in_4bit", settings.get("_load_in_4bit")) else "8bit"


def _is_mlx(config: Any) -> bool:
    """Whether a configuration is one of MLX's 4-bit files, which name no method."""
    settings = getattr(config, "quantization", None) or _settings_in(config)
    return isinstance(settings, dict) and {"group_size", "bits"} <= {*settings} and "quant_method" not in settings


def _settings_in(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()
