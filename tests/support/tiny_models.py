"""Tiny models of every family, as `transformers` describes them, and a byte-level tokenizer."""

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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

FIRST_FAMILIES = (
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
    "arcee",
)
"""Decoded on two prompts."""

MORE_FAMILIES = (
    *STATE_FAMILIES,
    "gemma",
    "gemma4",
    "gemma4-experts",
    "gemma4_unified",
    "gemma4-inputs",
    "phi",
    "gptj",
    "bloom",
    "mpt",
    "falcon",
    "falcon-new",
    "falcon-alibi",
    "phi3-longrope",
    "olmo",
    "olmo3",
    "ministral",
    "ministral3",
    "glm",
    "glm4",
    "cohere",
    "cohere2",
    "exaone4",
    "ernie4_5",
    "seed_oss",
    "hunyuan_v1_dense",
    "nemotron",
    "apertus",
    "helium",
    "starcoder2",
    "stablelm",
    "stablelm-parallel",
    "olmoe",
    "gpt_oss",
    "granitemoe",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v2",
    "deepseek_v3",
    "mistral4",
    "llama4",
)
"""Decoded on one prompt, which is longer than their windows."""

OTHER_FAMILIES = (*FIRST_FAMILIES, *MORE_FAMILIES)
"""Which the library's own blocks run."""

NEAR_LLAMA = (
    *(
        "gemma",
        "gemma2",
        "gemma3",
        "phi3",
        "phi3-window",
        "phi3-longrope",
        "smollm3",
        "smollm3-window",
        "olmo2",
        "olmo3",
        "granite",
    ),
    *("exaone4", "ministral", "seed_oss"),
)
"""Of these, those that the fused runner runs too."""

NF4_FAMILIES = (
    "llama",
    "gemma2",
    "gemma3",
    "olmo2",
    "gemma4-inputs",
    "gpt2",
    "gpt_neox",
    "qwen2_moe",
    "lfm2",
    "qwen3_5",
    "granitemoehybrid",
)
"""Decoded in 4 bit too, as tiny models; SmolLM2 is a real one."""

SPECIAL = ("vocab_size", "eos_token_id", "bos_token_id", "pad_token_id", "initializer_range", "tie_word_embeddings")
"""Settings that configurations with names of their own have too."""
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
    few = {name: shared[name] for name in SPECIAL}
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
    longrope = half_rotary | {
        "rope_type": "longrope",
        "original_max_position_embeddings": 256,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
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
    local = dict(num_local_experts=8, num_experts_per_tok=2)
    routed = dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_group=2, topk_group=1)
    latent = dict(
        kv_lora_rank=32,
        q_lora_rank=24,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    multipliers = dict(embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.1, logits_scaling=2.0)
    mixed = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    gemma4 = dict(
        **shared,
        **window,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        layer_types=mixed,
        final_logit_softcapping=8.0,
    )
    return {
        "llama": lambda: transformers.LlamaConfig(**shared),
        "llama3-rope": lambda: transformers.LlamaConfig(**shared, rope_parameters=llama3),
        "linear-rope": lambda: transformers.LlamaConfig(
            **shared, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
        ),
        "mistral-window": lambda: transformers.MistralConfig(**shared, **window),
        "qwen2": lambda: transformers.Qwen2Config(**shared),
        "qwen2-window": lambda: transformers.Qwen2Config(
            **shared, **window, use_sliding_window=True, max_window_layers=3
        ),
        "qwen3": lambda: transformers.Qwen3Config(**shared, head_dim=32),
        "smollm": lambda: transformers.LlamaConfig(**shared),
        "gemma2": lambda: transformers.Gemma2Config(
            **shared, **window, head_dim=16, attn_logit_softcapping=2.0, final_logit_softcapping=8.0
        ),
        "gemma3": lambda: transformers.Gemma3TextConfig(
            **shared,
            **window,
            head_dim=16,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        ),
        "phi3": lambda: transformers.Phi3Config(**shared, rope_parameters=half_rotary),
        "phi3-window": lambda: transformers.Phi3Config(**shared, **window),
        "phi3-longrope": lambda: transformers.Phi3Config(
            **shared, rope_parameters=longrope, original_max_position_embeddings=256
        ),
        "gpt2": lambda: transformers.GPT2Config(**ungrouped),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**ungrouped, rope_parameters=half_rotary),
        "gpt_neox-sequential": lambda: transformers.GPTNeoXConfig(
            **ungrouped, rope_parameters=half_rotary, use_parallel_residual=False
        ),
        "opt": lambda: transformers.OPTConfig(**ungrouped, ffn_dim=128, word_embed_proj_dim=64, init_std=0.3),
        "smollm3": lambda: transformers.SmolLM3Config(**shared),
        "smollm3-window": lambda: transformers.SmolLM3Config(**shared, **window, use_sliding_window=True),
        "olmo2": lambda: transformers.Olmo2Config(**shared),
        "granite": lambda: transformers.GraniteConfig(**shared, **multipliers),
        "mixtral": lambda: transformers.MixtralConfig(**shared, num_local_experts=4),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**shared, **experts, shared_expert_intermediate_size=64),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**shared, **experts, head_dim=16),
        "gemma": lambda: transformers.GemmaConfig(**shared, head_dim=16),
        "gemma4": lambda: transformers.Gemma4TextConfig(**gemma4),
        "gemma4-experts": lambda: transformers.Gemma4TextConfig(
            **gemma4, enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=32
        ),
        "gemma4-inputs": lambda: transformers.Gemma4TextConfig(
            **gemma4 | {"hidden_size_per_layer_input": 64, "layer_types": [*mixed[1:4], *mixed[3:]]},
            vocab_size_per_layer_input=VOCAB,
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
        ),
        "phi": lambda: transformers.PhiConfig(**shared, rope_parameters=half_rotary),
        "gptj": lambda: transformers.GPTJConfig(
            **few, n_embd=64, n_layer=6, n_head=4, n_inner=128, n_positions=500, rotary_dim=8
        ),
        "bloom": lambda: transformers.BloomConfig(
            **few | {"initializer_range": 0.4}, hidden_size=64, n_layer=6, n_head=4
        ),
        "mpt": lambda: transformers.MptConfig(**few, d_model=64, n_layers=6, n_heads=4, max_seq_len=500),
        "falcon-alibi": lambda: transformers.FalconConfig(
            **ungrouped | {"initializer_range": 0.2}, alibi=True, multi_query=False
        ),
        "gemma4_unified": lambda: transformers.Gemma4UnifiedTextConfig(**gemma4),
        "falcon": lambda: transformers.FalconConfig(**ungrouped, multi_query=True),
        "falcon-new": lambda: transformers.FalconConfig(**ungrouped, new_decoder_architecture=True, num_kv_heads=2),
        "olmo": lambda: transformers.OlmoConfig(**shared, clip_qkv=4.0),
        "olmo3": lambda: transformers.Olmo3Config(**shared, **window, layer_types=mixed),
        "ministral": lambda: transformers.MinistralConfig(**shared, **window, layer_types=mixed, head_dim=16),
        "ministral3": lambda: transformers.Ministral3Config(
            **shared, head_dim=16, rope_parameters=yarn | {"llama_4_scaling_beta": 0.1}
        ),
        "glm": lambda: transformers.GlmConfig(**shared, head_dim=16),
        "glm4": lambda: transformers.Glm4Config(**shared, head_dim=16),
        "cohere": lambda: transformers.CohereConfig(**shared, logit_scale=1.5, use_qk_norm=True),
        "cohere2": lambda: transformers.Cohere2Config(**shared, **window, logit_scale=1.5, layer_types=mixed),
        "exaone4": lambda: transformers.Exaone4Config(**shared, **window, layer_types=mixed),
        "ernie4_5": lambda: transformers.Ernie4_5Config(**shared, head_dim=16),
        "seed_oss": lambda: transformers.SeedOssConfig(**shared, head_dim=16),
        "hunyuan_v1_dense": lambda: transformers.HunYuanDenseV1Config(**shared, head_dim=16),
        "nemotron": lambda: transformers.NemotronConfig(**shared),
        "arcee": lambda: transformers.ArceeConfig(**shared),
        "apertus": lambda: transformers.ApertusConfig(**shared, rope_parameters=llama3),
        "helium": lambda: transformers.HeliumConfig(**shared, head_dim=16),
        "starcoder2": lambda: transformers.Starcoder2Config(**shared, **window),
        "stablelm": lambda: transformers.StableLmConfig(**shared, use_qkv_bias=True),
        "stablelm-parallel": lambda: transformers.StableLmConfig(
            **shared, use_parallel_residual=True, use_qkv_bias=True
        ),
        "olmoe": lambda: transformers.OlmoeConfig(**shared, num_experts=8, num_experts_per_tok=2),
        "gpt_oss": lambda: transformers.GptOssConfig(**shared, **window, **local, head_dim=16, rope_parameters=yarn),
        "granitemoe": lambda: transformers.GraniteMoeConfig(
            **shared,
            **local,
            **multipliers,
        ),
        "lfm2": lambda: transformers.Lfm2Config(**shared, **convolutions, block_auto_adjust_ff_dim=False),
        "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
            **shared, **experts | {"num_experts": 16}, **convolutions, num_dense_layers=2
        ),
        "qwen3_next": lambda: transformers.Qwen3NextConfig(
            **shared, **experts, **shared_expert, **delta_net, mlp_only_layers=[0]
        ),
        "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**shared, **delta_net),
        "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(**shared, **experts, **shared_expert, **delta_net),
        "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
            **shared,
            **mamba,
            layer_types=["linear_attention", "full_attention", "linear_attention"] * 2,
            num_local_experts=4,
            shared_intermediate_size=64,
            **multipliers,
        ),
        "falcon_h1": lambda: transformers.FalconH1Config(
            **shared, **mamba, mamba_d_ssm=128, lm_head_multiplier=0.5, embedding_multiplier=2.0, key_multiplier=0.7
        ),
        "nemotron_h": lambda: transformers.NemotronHConfig(
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
        "glm4_moe": lambda: transformers.Glm4MoeConfig(
            **shared, **routed, n_shared_experts=1, first_k_dense_replace=1, head_dim=16
        ),
        "glm4_moe_lite": lambda: transformers.Glm4MoeLiteConfig(**ungrouped, **routed, **latent),
        "deepseek_v2": lambda: transformers.DeepseekV2Config(
            **ungrouped, **routed, **latent, topk_method="group_limited_greedy", n_shared_experts=1
        ),
        "deepseek_v3": lambda: transformers.DeepseekV3Config(
            **ungrouped, **routed, **latent | {"q_lora_rank": None}, n_shared_experts=1
        ),
        "mistral4": lambda: transformers.Mistral4Config(
            **ungrouped, **routed, **latent, rope_parameters=yarn | {"llama_4_scaling_beta": 0.1}
        ),
        "llama4": lambda: transformers.Llama4TextConfig(
            **shared,
            head_dim=16,
            num_local_experts=4,
            intermediate_size_mlp=128,
            interleave_moe_layer_step=2,
            attention_chunk_size=24,
            floor_scale=16,
        ),
    }[family]()
