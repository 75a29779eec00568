"""Whether a model's weights alone say what it computes: what somebody wrapped, hooked or replaced is found by comparison
with the model that `transformers` builds of the same configuration.

Code of ours that reads weights (fused, compiled and CUDA passes, the argmax over the LM head) takes plain modules only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from early_exit_cli.backbone.auto_model import auto_model

QUANTIZED = "bitsandbytes.nn.modules"
"""Of bitsandbytes' linear maps, which stand in the places of plain ones and keep their weights in `weight`."""
WATCHING = "transformers.utils."
"""Of the library's own hooks, which hand hidden states out and change nothing."""


def library_modules(model: Any) -> dict[str, type[nn.Module]]:
    """The type of each module, by name, as `transformers` builds a model of this configuration; no memory is taken."""
    config = copy.deepcopy(model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        built = auto_model(config).from_config(config)
    return {name: type(module) for name, module in built.named_modules()}


def changed_modules(model: nn.Module, expected: Mapping[str, type[nn.Module]]) -> dict[str, str]:
    """The modules that do more, or something else, than the library's own would with their weights, by name; what it is.

    Args:
        expected: `library_modules` of the model.
    """
    found = {}
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        found[""] = "has a forward hook, as all modules do"
    for name, module in model.named_modules():
        what = _what_changed(module, expected.get(name))
        if what is not None:
            found[name] = what
    return found


def told(name: str, what: str) -> str:
    """A change in words: `model.norm has a forward hook`."""
    return f"{name or 'the model'} {what}"


def is_within(name: str, parents: tuple[str, ...]) -> bool:
    """Whether a module of this name is one of `parents` or lies in one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _what_changed(module: nn.Module, expected: type[nn.Module] | None) -> str | None:
    kind = type(module)
    is_quantized = kind.__module__ == QUANTIZED and expected is not None
    is_subclass = expected is not None and issubclass(kind, expected) and kind.forward is expected.forward
    if hasattr(module, "parametrizations"):
        return "has parametrized weights"
    if kind is not expected and not is_quantized and not (is_subclass and hasattr(module, "config")):
        return f"is {'an additional' if expected is None else 'replaced by a'} {kind.__name__}"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not str(getattr(hook, "__module__", "")).startswith(WATCHING) for hook in hooks):
        return "has a forward hook"
    forward = vars(module).get("forward")
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # compiled, it computes the same
    if forward is not None and getattr(forward, "__func__", None) is not kind.forward:
        return "has a forward of its own"
    home = next(base for base in kind.__mro__ if "forward" in vars(base))
    if vars(home)["forward"].__module__ != home.__module__:
        return f"has another {home.__name__}.forward than its library's"
    return None
