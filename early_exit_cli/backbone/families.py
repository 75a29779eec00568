"""The families of models that run here: how `transformers` lays each out around its blocks, and what is refused of it.

The one table: loading, the runners and docs/families.md follow it. A family is what a checkpoint calls `model_type`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

LENGTH_INDEPENDENT_ROTARY = ("default", "linear", "llama3", "yarn", "proportional")
LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")
"""Rotary scaling of another kind for texts beyond a length: those run up to it (`longest_alike`)."""
LENGTH_STEP = 64
"""What the positions of a rotary table are a whole number of."""
LAYERS_WITH_STATE = ("conv", "linear_attention", "hybrid")
"""What a configuration's `layer_types` call blocks that fold all tokens so far into a state."""
LAYERS_WITHOUT_KEYS = ("conv", "linear_attention", "mlp", "moe")
"""And those without attention, which keep no keys and values."""


@dataclass(frozen=True)
class Family:
    """Where a family keeps what stands around its blocks.

    models: what people know of it. runner: fused where `block_layout` describes its blocks, else hf. trunk: the module that
    holds the blocks, from the model on; blocks, norm: their names there. embedding_norm: a norm behind the embedding.
    positions: the embedding of learned positions, whose row `first_position` is the first token's. plain: modules that stay
    unquantized, too small for 4-bit kernels. adds_one: the final norm multiplies by one more than its weight.
    subtracts_mean: it is a LayerNorm that is not PyTorch's. rotary: the module that makes rotary tables; complex_rotary: of
    complex numbers instead of cosines and sines. rounds_once, caps_scores: of its blocks, see `BlockLayout`. mtp: where its
    checkpoints keep a layer for multi-token prediction, if they bring one: beside the model, as `mtp.*`, or behind its
    blocks, as one more.
    """

    models: str
    runner: Literal["fused", "hf"] = "hf"
    trunk: str = "model"
    blocks: str = "layers"
    norm: str = "norm"
    embedding_norm: str | None = None
    positions: str | None = None
    first_position: int = 0
    plain: tuple[str, ...] = ()
    adds_one: bool = False
    rotary: str = "rotary_emb"
    complex_rotary: bool = False
    subtracts_mean: bool = False
    rounds_once: bool = False
    caps_scores: bool = False
    mtp: Literal["beside", "behind"] | None = None


FAMILIES = {
    "llama": Family("Llama 2 and 3, SmolLM2", "fused"),
    "mistral": Family("Mistral", "fused"),
    "qwen2": Family("Qwen2, Qwen2.5", "fused"),
    "qwen3": Family("Qwen3", "fused"),
    "gemma": Family("Gemma", "fused", adds_one=True, rounds_once=True),
    "gemma2": Family("Gemma 2", "fused", adds_one=True, rounds_once=True, caps_scores=True),
    "gemma3_text": Family("Gemma 3, text", "fused", adds_one=True, rounds_once=True),
    "gemma4_text": Family("Gemma 4, text"),
    "gemma4_unified_text": Family("Gemma 4 unified, text"),
    "phi3": Family("Phi-3, Phi-4", "fused"),
    "gpt2": Family("GPT-2", trunk="transformer", blocks="h", norm="ln_f", positions="wpe"),
    "gpt_neox": Family("GPT-NeoX, Pythia", trunk="gpt_neox", norm="final_layer_norm"),
    "opt": Family("OPT", trunk="model.decoder", norm="final_layer_norm", positions="embed_positions", first_position=2),
    "phi": Family("Phi-1, 1.5 and 2", norm="final_layernorm"),
    "gptj": Family("GPT-J", trunk="transformer", blocks="h", norm="ln_f"),
    "falcon": Family("Falcon", trunk="transformer", blocks="h", norm="ln_f"),
    "bloom": Family("BLOOM", trunk="transformer", blocks="h", norm="ln_f", embedding_norm="word_embeddings_layernorm"),
    "mpt": Family("MPT", trunk="transformer", blocks="blocks", norm="norm_f"),
    "smollm3": Family("SmolLM3", "fused"),
    "olmo": Family("OLMo", subtracts_mean=True),
    "olmo2": Family("OLMo 2", "fused", rounds_once=True),
    "olmo3": Family("OLMo 3", "fused", rounds_once=True),
    "granite": Family("Granite 3", "fused"),
    "ministral": Family("Ministral", "fused"),
    "ministral3": Family("Ministral 3, Devstral 2"),
    "glm": Family("GLM-4, GLM-Edge"),
    "glm4": Family("GLM-4-0414"),
    "cohere": Family("Command R, Aya 23", subtracts_mean=True),
    "cohere2": Family("Command R7B, Command A", subtracts_mean=True),
    "exaone4": Family("EXAONE 4", "fused"),
    "ernie4_5": Family("ERNIE 4.5"),
    "seed_oss": Family("Seed-OSS", "fused"),
    "hunyuan_v1_dense": Family("Hunyuan, dense"),
    "nemotron": Family("Nemotron 3 and 4, Minitron", adds_one=True),
    "arcee": Family("Arcee AFM"),
    "apertus": Family("Apertus"),
    "helium": Family("Helium"),
    "starcoder2": Family("StarCoder2"),
    "stablelm": Family("StableLM"),
    "mistral4": Family("Mistral Small 4"),
    "llama4_text": Family("Llama 4, text", complex_rotary=True),
    "mixtral": Family("Mixtral"),
    "qwen2_moe": Family("Qwen1.5-MoE, Qwen2-MoE", plain=("shared_expert_gate",)),
    "qwen3_moe": Family("Qwen3-MoE"),
    "lfm2": Family("LFM2", norm="embedding_norm"),
    "lfm2_moe": Family("LFM2-MoE", norm="embedding_norm", rotary="pos_emb"),
    "qwen3_next": Family("Qwen3-Next", plain=("shared_expert_gate",), adds_one=True, mtp="beside"),
    "qwen3_5_text": Family("Qwen3.5, text", adds_one=True, mtp="beside"),
    "qwen3_5_moe_text": Family("Qwen3.5-MoE, text", plain=("shared_expert_gate",), adds_one=True, mtp="beside"),
    "granitemoehybrid": Family("Granite 4"),
    "falcon_h1": Family("Falcon-H1", norm="final_layernorm"),
    "nemotron_h": Family("Nemotron-H, Nemotron 3 Nano", norm="norm_f"),
    "olmoe": Family("OLMoE"),
    "gpt_oss": Family("gpt-oss"),
    "granitemoe": Family("Granite 3 MoE"),
    "glm4_moe": Family("GLM-4.5, GLM-4.6", mtp="behind"),
    "glm4_moe_lite": Family("GLM-4.7-Flash", mtp="behind"),
    "deepseek_v2": Family("DeepSeek-V2", complex_rotary=True),
    "deepseek_v3": Family("DeepSeek-V3, R1", mtp="behind"),
}

WRAPPERS = {
    "gemma3": "Gemma 3 from 4B on",
    "gemma4": "Gemma 4",
    "gemma4_unified": "Gemma 4, unified",
    "llama4": "Llama 4",
    "mistral3": "Mistral Small 3.1 and later, Ministral 3",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_5": "Qwen3.5, Qwen3.6",
    "qwen3_5_moe": "Qwen3.5-MoE",
    "internvl": "InternVL 3",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics 3",
    "llava": "LLaVA, Pixtral",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "aya_vision": "Aya Vision",
    "cohere2_vision": "Command A Vision",
}
"""Checkpoints whose language part computes what the decoder named in `text_config` computes; what people know of each."""


ASSISTANTS = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
"""Checkpoints of drafters that read a backbone's own keys and values, and the family of that backbone."""
OTHER_USES = ("Classification", "QuestionAnswering", "MaskedLM", "RewardModel")
"""How the names of classes end that write no text; where the embedding serves as LM head, their files would load as one."""
SHOWN = 6


def refusal(config: Any) -> str | None:
    """Why a checkpoint of this configuration (transformers' own) does not run here; none where it does."""
    family = config.model_type
    if family not in FAMILIES:
        if family in WRAPPERS:
            return f"is multimodal ({family}); named by its folder or Hub id, its language part is loaded alone"
        if family in ASSISTANTS:
            return f"is a drafter of Gemma 4 ({family}): --model-name takes the model that it drafts for, --assistant this one"
        part = getattr(getattr(config, "text_config", None), "model_type", None)
        inner = "" if part is None else f" (its language part is {part!r})"
        kinds = _other_kinds(getattr(config, "text_config", config))
        why = f": its blocks are {', '.join(kinds)}" if kinds else ""
        known = f"{len(FAMILIES)} families run (docs/families.md): {', '.join([*FAMILIES][:SHOWN])}, ..."
        if getattr(config, "is_encoder_decoder", False):
            why = f": it reads with an encoder and writes with a decoder, and only decoders run here{why}"
        return f"is of family {family!r}{inner}, which has no block runner{why}; {known}"
    other = next((name for name in getattr(config, "architectures", None) or () if name.endswith(OTHER_USES)), None)
    if other is not None:
        return f"is no causal language model: its config.json names {other}"
    kinds = _other_kinds(config)
    if kinds:
        return f"has blocks of the kinds {', '.join(kinds)}, which no runner here knows"
    for kind in (table.get("rope_type", "default") for table in rotary_settings(config)):
        if kind not in (*LENGTH_INDEPENDENT_ROTARY, *LENGTH_DEPENDENT_ROTARY):
            return f"has rotary scaling {kind!r}, which nothing here knows"
    if family == "opt" and (
        config.word_embed_proj_dim != config.hidden_size
        or not config.do_layer_norm_before
        or not config.layer_norm_elementwise_affine
        or config._remove_final_layer_norm
    ):
        return "is an OPT with projected embeddings or without a final norm, as opt-350m; the other sizes run"
    kinds = getattr(config, "layer_types", None) or []
    if kinds and all(kind in LAYERS_WITHOUT_KEYS for kind in kinds):
        return "has no block with attention, and no runner here does without"
    if getattr(config, "add_cross_attention", False):
        return "attends to an encoder, which nothing here feeds"
    if family == "mpt" and (not config.attn_config.alibi or config.attn_config.qk_ln or config.logit_scale):
        return "is an MPT with learned positions, normed queries or scaled logits, which transformers' MPT leaves out"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "attends to later tokens, so it cannot be decoded token by token"
    return None


def longest_alike(config: Any) -> int | None:
    """Positions up to which a text's rotary table does not depend on its length; None where it never does.

    A longer text would have other keys from its first token on, so that nothing could be taken back or over.
    """
    lengths = [
        table.get("original_max_position_embeddings") or config.max_position_embeddings
        for table in rotary_settings(config)
        if table.get("rope_type") in LENGTH_DEPENDENT_ROTARY
    ]
    return min(lengths) // LENGTH_STEP * LENGTH_STEP if lengths else None


def rotary_settings(config: Any) -> list[dict[str, Any]]:
    """What a configuration says of rotary positions, once for each kind of block where these differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _other_kinds(config: Any) -> list[str]:
    """The kinds of blocks that nothing here runs: whatever comes."""
    known = {"full_attention", "sliding_attention", "chunked_attention", *LAYERS_WITH_STATE, *LAYERS_WITHOUT_KEYS}
    return sorted({*(getattr(config, "layer_types", None) or ())} - known)
