"""Tiny models of every family, as `transformers` describes them, and a byte-level tokenizer."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
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

STATE_FAMILIES = (
    "lfm2",
    "lfm2_moe",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
    "granitemoehybrid",
    "falcon_h1",
    "nemotron_h",
)
"""Some of whose blocks have a state; the library's own blocks run them."""

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
    *STATE_FAMILIES,
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
    shared_expert = dict(shared_expert_intermediate_size=64)
    delta_net = dict(
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=4,
        linear_num_value_heads=16,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
    )
    convolutions = dict(layer_types=["conv", "full_attention", "conv"] * 2)
    mamba = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=2)
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
        "lfm2": lambda: Lfm2Config(**shared, **convolutions, block_auto_adjust_ff_dim=False),
        "lfm2_moe": lambda: Lfm2MoeConfig(
            **shared, **experts | {"num_experts": 16}, **convolutions, num_dense_layers=2
        ),
        "qwen3_next": lambda: Qwen3NextConfig(**shared, **experts, **shared_expert, **delta_net, mlp_only_layers=[0]),
        "qwen3_5": lambda: Qwen3_5TextConfig(**shared, **delta_net),
        "qwen3_5_moe": lambda: Qwen3_5MoeTextConfig(**shared, **experts, **shared_expert, **delta_net),
        "granitemoehybrid": lambda: GraniteMoeHybridConfig(
            **shared,
            **mamba,
            layer_types=["linear_attention", "full_attention", "linear_attention"] * 2,
            num_local_experts=4,
            shared_intermediate_size=64,
            embedding_multiplier=3.0,
            residual_multiplier=0.7,
            attention_multiplier=0.1,
            logits_scaling=2.0,
        ),
        "falcon_h1": lambda: FalconH1Config(
            **shared, **mamba, mamba_d_ssm=128, lm_head_multiplier=0.5, embedding_multiplier=2.0, key_multiplier=0.7
        ),
        "nemotron_h": lambda: NemotronHConfig(
            **{name: value for name, value in shared.items() if name != "num_hidden_layers"},
            layers_block_type=[
                "linear_attention",
                "full_attention",
                "mlp",
                "linear_attention",
                "moe",
                "full_attention",
            ],
            head_dim=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            ssm_state_size=16,
            n_groups=2,
            n_routed_experts=16,
            moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=64,
        ),
    }[family]()
