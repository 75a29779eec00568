"""The language part of a multimodal checkpoint: its configuration, and what its weights are called in the files.

It is loaded as the plain decoder that it is. Tensors of the towers are never read: the library maps a file into memory and
reads those that the model asks for.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from early_exit_cli.backbone.contents import SETTINGS
from early_exit_cli.backbone.families import WRAPPERS
from early_exit_cli.errors import BundleError
from early_exit_cli.files.atomic import read_json

PLAIN = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Language parts that the library has no class for: with text alone, their three positions a token are one, and they are
the decoder named here."""
OWN_ROTARY = ("mrope_section", "mrope_interleaved")
"""How those spread a token's three positions over its rotary dimensions."""
NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
    r"^model\.text_model\.": "model.",
}
"""What stands before the names of a language part's tensors in the files, and before those of the decoder."""
OF_THE_WHOLE = ("eos_token_id", "quantization_config", "quantization", "_commit_hash")
"""What a checkpoint's configuration may say outside of `text_config`."""
LEFT_PLAIN = "llm_int8_skip_modules"
"""Modules that bitsandbytes did not quantize, by their names in the whole."""
TEMPLATE = "chat_template.json"
"""Where processors of images kept the chat template before tokenizers had it."""


def language_part(config: Any) -> Any:
    """The configuration of a multimodal checkpoint's language part (transformers' own, both); the same where it is plain.

    Args:
        config: left as it is.
    """
    if config.model_type not in WRAPPERS:
        return config
    part = copy.deepcopy(config.text_config)
    if part.model_type in PLAIN:
        part = _as_plain(part)
    for name in OF_THE_WHOLE:
        found = vars(config).get(name)
        if found is not None:
            setattr(part, name, copy.deepcopy(found))
    quantization = getattr(part, "quantization_config", None)
    if isinstance(quantization, dict) and quantization.get(LEFT_PLAIN):
        quantization[LEFT_PLAIN] = [_name_in_part(name) for name in quantization[LEFT_PLAIN]]
    # said twice, and not always alike; where a head is in the files and differs from the embedding, the library keeps both
    part.tie_word_embeddings = bool(config.tie_word_embeddings or part.tie_word_embeddings)
    part.name_or_path = config.name_or_path
    return part


def _as_plain(part: Any) -> Any:
    """A language part's configuration as that of the decoder in `PLAIN`."""
    from transformers import CONFIG_MAPPING

    settings = part.to_dict()
    settings["model_type"] = PLAIN[part.model_type]
    rotary = settings.get("rope_parameters") or {}
    settings["rope_parameters"] = {key: value for key, value in rotary.items() if key not in OWN_ROTARY}
    return CONFIG_MAPPING[PLAIN[part.model_type]](**settings)


def _name_in_part(module: str) -> str:
    """What a module of the whole is called in the language part."""
    name = f"{module}."
    for pattern, target in NAMES.items():
        name = re.sub(pattern, target, name)
    return name.removesuffix(".")


def processor_template(source: str, revision: str | None) -> str | None:
    """The chat template that a multimodal checkpoint keeps beside a tokenizer which has none; None where there is none.

    Args:
        source: a folder or Hub id.
    """
    settings = _settings_beside(source, revision, SETTINGS[0], is_here=True)
    if settings.get("model_type") not in WRAPPERS:
        return None
    template = _settings_beside(source, revision, TEMPLATE).get("chat_template")
    return template if isinstance(template, str) else None


def _settings_beside(source: str, revision: str | None, name: str, *, is_here: bool = False) -> dict[str, Any]:
    """A file of settings of a checkpoint; nothing where it cannot be had. is_here: one that was downloaded before."""
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(source, name, revision=revision, local_files_only=is_here)
        return {} if found is None else read_json(Path(found))
    except (OSError, BundleError):
        return {}
