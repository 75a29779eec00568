"""The library's class for a configuration."""

from __future__ import annotations

from typing import Any


def auto_model(config: Any) -> Any:
    """transformers' `AutoModelForCausalLM`, which knows the class for this configuration: of one family it lists only the whole."""
    from transformers import AutoModelForCausalLM

    if config.model_type == "mistral4":
        from transformers import Mistral4Config, Mistral4ForCausalLM

        AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)
    return AutoModelForCausalLM
