"""Tiny models of every family, as `transformers` describes them, and a byte-level tokenizer."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

FAMILIES = (
    "llama",
    "llama3-rope",
    "linear-rope",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "smollm",
)
"""Of the Llama shape, which both runners run."""

OTHER_FAMILIES = (
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-window",
    "gpt2",
    "gpt_neox",
    "gpt_neox-sequential",
    "opt",
    "smollm3",
    "smollm3-window",
    "olmo2",
    "granite",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
"""Which the library's own blocks run."""

VOCAB = 320
END = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 byte tokens and an end token: every text has ids, every id has bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def family_config(family: str):
    """transformers' configuration of a tiny model, wide in its weights: random logits that are far from flat."""
    shared = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=END,
        bos_token_id=END,
        pad_token_id=END,
        initializer_range=0.3,
        tie_word_embeddings=family == "smollm",
    )
    ungrouped = {name: value for name, value in shared.items() if name != "num_key_value_heads"}
    window = dict(sliding_window=24)
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    half_rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    experts = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    return {
        "llama": lambda: LlamaConfig(**shared),
        "llama3-rope": lambda: LlamaConfig(**shared, rope_parameters=llama3),
        "linear-rope": lambda: LlamaConfig(
            **shared, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        ),
        "mistral-window": lambda: MistralConfig(**shared, **window),
        "qwen2": lambda: Qwen2Config(**shared),
        "qwen2-window": lambda: Qwen2Config(**shared, **window, use_sliding_window=True, max_window_layers=3),
        "qwen3": lambda: Qwen3Config(**shared, head_dim=32),
        "smollm": lambda: LlamaConfig(**shared),
        "gemma2": lambda: Gemma2Config(
            **shared, **window, head_dim=16, attn_logit_softcapping=2.0, final_logit_softcapping=8.0
        ),
        "gemma3": lambda: Gemma3TextConfig(
            **shared,
            **window,
            head_dim=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        ),
        "phi3": lambda: Phi3Config(**shared, rope_parameters=half_rotary),
        "phi3-window": lambda: Phi3Config(**shared, **window),
        "gpt2": lambda: GPT2Config(**ungrouped),
        "gpt_neox": lambda: GPTNeoXConfig(**ungrouped, rope_parameters=half_rotary),
        "gpt_neox-sequential": lambda: GPTNeoXConfig(
            **ungrouped, rope_parameters=half_rotary, use_parallel_residual=False
        ),
        "opt": lambda: OPTConfig(**ungrouped, ffn_dim=128, word_embed_proj_dim=64, init_std=0.3),
        "smollm3": lambda: SmolLM3Config(**shared),
        "smollm3-window": lambda: SmolLM3Config(**shared, **window, use_sliding_window=True),
        "olmo2": lambda: Olmo2Config(**shared),
        "granite": lambda: GraniteConfig(
            **shared, embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.1, logits_scaling=2.0
        ),
        "mixtral": lambda: MixtralConfig(**shared, num_local_experts=4),
        "qwen2_moe": lambda: Qwen2MoeConfig(**shared, **experts, shared_expert_intermediate_size=64),
        "qwen3_moe": lambda: Qwen3MoeConfig(**shared, **experts, head_dim=16),
    }[family]()
