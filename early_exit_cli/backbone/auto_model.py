"""The library's class for a configuration, also where the library does not list it, and its model of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def auto_model(config: Any) -> Any:
    """transformers' `AutoModelForCausalLM`, which knows the class for this configuration: of one family it lists only the whole."""
    from transformers import AutoModelForCausalLM

    if config.model_type == "mistral4":
        from transformers import Mistral4Config, Mistral4ForCausalLM

        AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)
    return AutoModelForCausalLM


def read_model(
    source: str | Path, config: Any, dtype: torch.dtype, device: torch.device, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a folder or Hub id, which brings no code of its own, and what the library says of its tensors.

    Args:
        more: further arguments of `from_pretrained`.

    Raises:
        Exception: whatever the library raises over a damaged file.
    """
    return auto_model(config).from_pretrained(
        source,
        config=config,
        trust_remote_code=False,
        dtype=dtype,
        device_map={"": device},
        output_loading_info=True,
        **more,
    )
