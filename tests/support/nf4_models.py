"""Tiny models in NF4 as bitsandbytes holds it on a GPU, and our kernels' passes over them in double precision."""

import bitsandbytes
import pytest
import torch
from tiny_models import END, VOCAB, byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.heads.cuda_eagle import CudaEagle
from early_exit_cli.runtime.cuda_blocks import CudaBlocks
from early_exit_cli.runtime.reference_kernels import ReferenceKernels

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    initializer_range=0.1,
    eos_token_id=END,
    bos_token_id=END,
    pad_token_id=END,
)
KINDS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=24),
    "qwen2-bias": lambda: Qwen2Config(**SIZES),
    "qwen3-norms": lambda: Qwen3Config(**SIZES),
}


def in_nf4(model):
    """Its linear maps as bitsandbytes holds them on a GPU, which no CPU kernel has repacked."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if type(linear) is torch.nn.Linear:
                    quantized = bitsandbytes.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        linear.bias is not None,
                        torch.bfloat16,
                        quant_type="nf4",
                    )
                    quantized.weight = bitsandbytes.nn.Params4bit(linear.weight.data, False, quant_type="nf4").to("cpu")
                    if linear.bias is not None:
                        quantized.bias = torch.nn.Parameter(linear.bias.data, requires_grad=False)
                    setattr(parent, name, quantized)
    return model


@pytest.fixture(scope="module", name="backbone")
def nf4_backbone():
    """kind -> a tiny backbone in NF4, made once."""
    made = {}

    def make(kind="llama"):
        if kind not in made:
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(KINDS[kind]()).eval().requires_grad_(False)
            for name, parameter in model.named_parameters():
                if name.endswith("bias") or parameter.ndim == 1:
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
            made[kind] = Backbone(in_nf4(model.to(torch.bfloat16)), byte_tokenizer(), kind, "4bit", None)
        return made[kind]

    return make


def on_reference(backbone, recorded=None):
    def record(step):
        if recorded is not None:
            recorded.append(step)
        return step

    blocks = CudaBlocks(backbone, ReferenceKernels(), record)
    blocks.widths, blocks.is_invariant = CudaBlocks.candidate_widths, True
    return blocks


def plain_weight(module):
    """[out, in] float32: an NF4 weight unpacked, a packed one code by code; others as they are."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return module.weight.float()
    if not getattr(state, "packing_format_for_cpu", False):
        return bitsandbytes.functional.dequantize_4bit(module.weight.data, state).float()
    rows, inner = state.shape
    packed = module.weight.data.view(torch.uint8).reshape(rows // 32, inner // 2, 32)
    codes = torch.stack((packed & 15, packed >> 4), 2).reshape(rows // 32, inner // 2, 32, 2)
    values = state.code.to(torch.bfloat16).float()[codes.long()].permute(0, 2, 1, 3).reshape(rows, inner)
    return values * state.absmax.float().T.repeat_interleave(64, 1)


def hold_in_nf4(head):
    """Give an EAGLE head the weights that a GPU's chain makes of its own in NF4, so that other runners multiply by the same."""
    attention, mlp = head.block.self_attn, head.block.mlp
    parts = (
        [head.fc],
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [attention.o_proj],
        [mlp.gate_proj, mlp.up_proj],
        [mlp.down_proj],
    )
    for weight, modules in zip(CudaEagle(head, ReferenceKernels(), lambda step: step).nf4, parts, strict=True):
        dense = weight.dense().to(torch.bfloat16).split([module.out_features for module in modules])
        for module, rows in zip(modules, dense, strict=True):
            module.weight.copy_(rows)
