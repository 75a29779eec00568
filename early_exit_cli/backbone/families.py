"""The families of models that run here: how `transformers` lays each out around its blocks, and what is refused of it.

The one table: loading, the runners and docs/families.md follow it. A family is what a checkpoint calls `model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

LENGTH_INDEPENDENT_ROTARY = ("default", "linear", "llama3", "yarn")
LAYERS_WITH_STATE = ("conv", "linear_attention", "hybrid")
"""What a configuration's `layer_types` call blocks that fold all tokens so far into a state."""
LAYERS_WITHOUT_KEYS = ("conv", "linear_attention", "mlp", "moe")
"""And those without attention, which keep no keys and values."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps what stands around its blocks.

    models: what people know of it. runner: fused where its blocks have the Llama shape, else hf. trunk: the module that
    holds the blocks, from the model on; blocks, norm: their names there. positions: the embedding of learned positions,
    whose row `first_position` is the first token's. plain: modules that stay unquantized, too small for 4-bit kernels.
    adds_one: the final norm multiplies by one more than its weight. rotary: the module that makes rotary tables.
    """

    models: str
    runner: Literal["fused", "hf"] = "hf"
    trunk: str = "model"
    blocks: str = "layers"
    norm: str = "norm"
    positions: str | None = None
    first_position: int = 0
    plain: tuple[str, ...] = ()
    adds_one: bool = False
    rotary: str = "rotary_emb"


FAMILIES = {
    "llama": Family("Llama 2 and 3, SmolLM2", "fused"),
    "mistral": Family("Mistral", "fused"),
    "qwen2": Family("Qwen2, Qwen2.5", "fused"),
    "qwen3": Family("Qwen3", "fused"),
    "gemma2": Family("Gemma 2"),
    "gemma3_text": Family("Gemma 3, text"),
    "phi3": Family("Phi-3, Phi-4"),
    "gpt2": Family("GPT-2", trunk="transformer", blocks="h", norm="ln_f", positions="wpe"),
    "gpt_neox": Family("GPT-NeoX, Pythia", trunk="gpt_neox", norm="final_layer_norm"),
    "opt": Family("OPT", trunk="model.decoder", norm="final_layer_norm", positions="embed_positions", first_position=2),
    "smollm3": Family("SmolLM3"),
    "olmo2": Family("OLMo 2"),
    "granite": Family("Granite 3"),
    "mixtral": Family("Mixtral"),
    "qwen2_moe": Family("Qwen1.5-MoE, Qwen2-MoE", plain=("shared_expert_gate",)),
    "qwen3_moe": Family("Qwen3-MoE"),
    "lfm2": Family("LFM2", norm="embedding_norm"),
    "lfm2_moe": Family("LFM2-MoE", norm="embedding_norm", rotary="pos_emb"),
    "qwen3_next": Family("Qwen3-Next", plain=("shared_expert_gate",), adds_one=True),
    "qwen3_5_text": Family("Qwen3.5, text", adds_one=True),
    "qwen3_5_moe_text": Family("Qwen3.5-MoE, text", plain=("shared_expert_gate",), adds_one=True),
    "granitemoehybrid": Family("Granite 4"),
    "falcon_h1": Family("Falcon-H1", norm="final_layernorm"),
    "nemotron_h": Family("Nemotron-H, Nemotron 3 Nano", norm="norm_f"),
}


def refusal(config: Any) -> str | None:
    """Why a checkpoint of this configuration (transformers' own) does not run here; none where it does."""
    family = config.model_type
    if family not in FAMILIES:
        hint = "; its text model alone is gemma3_text" if family == "gemma3" else ""
        return f"is of family {family!r}, which has no block runner; supported: {', '.join(FAMILIES)}{hint}"
    for kind in _rotary_kinds(config):
        if kind not in LENGTH_INDEPENDENT_ROTARY:
            return f"has rotary scaling {kind!r}, which depends on the length of the text"
    if family == "opt" and (
        config.word_embed_proj_dim != config.hidden_size
        or not config.do_layer_norm_before
        or not config.layer_norm_elementwise_affine
        or config._remove_final_layer_norm
    ):
        return "is an OPT with projected embeddings or without a final norm, as opt-350m; the other sizes run"
    kinds = getattr(config, "layer_types", None)
    if kinds and all(kind in LAYERS_WITHOUT_KEYS for kind in kinds):
        return "has no block with attention, and no runner here does without"
    if getattr(config, "add_cross_attention", False):
        return "attends to an encoder, which nothing here feeds"
    if getattr(config, "use_bidirectional_attention", False):
        return "attends to later tokens, so it cannot be decoded token by token"
    return None


def _rotary_kinds(config: Any) -> list[str]:
    """The kinds of rotary scaling, one for each kind of block where these differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    tables = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return [table.get("rope_type", "default") for table in tables]
