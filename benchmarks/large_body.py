"""A small model carried, function-preserving, into the shape of a large one: real text and drafts at a large model's cost.

Everything new is zero. A norm over `large` dimensions of which `small` are not zero is the small one with its weight times
sqrt(small / large) and eps times small / large. Rotary pairs of a head become the pairs of a wider head that turn as fast; queries
are scaled so that the wider head's softmax sees the same numbers. Added blocks add nothing; the LM head's added rows are zero.

It is a benchmark of cost, not of quality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from early_exit_cli.backbone.backbone import Backbone, dense_weight
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import ExitHeads


@dataclass(frozen=True)
class Shape:
    """Of the model to be: as in its configuration."""

    hidden: int = 4096
    inner: int = 14336
    blocks: int = 32
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256


LLAMA_3_8B = Shape()


class Carrier:
    """From the tensors of a backbone of the Llama shape to those of a larger one."""

    def __init__(self, backbone: Backbone, shape: Shape) -> None:
        config = backbone.config
        self.small, self.shape = backbone, shape
        self.query_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = int(getattr(config, "head_dim", None) or backbone.hidden_size // self.query_heads)
        self.share = backbone.hidden_size / shape.hidden
        half, wide_half, step = self.head_dim // 2, shape.head_dim // 2, shape.head_dim // self.head_dim
        pairs = torch.arange(half) * step
        self.dimensions = torch.cat((pairs, pairs + wide_half))
        group, wide_group = self.query_heads // self.kv_heads, shape.query_heads // shape.kv_heads
        self.query_places = [wide_group * (head // group) + head % group for head in range(self.query_heads)]

    def norm(self, weight: Tensor) -> Tensor:
        """[small] -> [large]."""
        return self.padded(weight * math.sqrt(self.share), self.shape.hidden)

    def padded(self, weight: Tensor, *sizes: int) -> Tensor:
        """Zeros behind, to `sizes`."""
        found = weight.new_zeros(sizes)
        found[tuple(slice(size) for size in weight.shape)] = weight
        return found

    def columns(self, weight: Tensor, parts: int = 1) -> Tensor:
        """Inputs that are `parts` states side by side, [out, parts * small] -> [out, parts * large]."""
        split = weight.view(len(weight), parts, -1)
        return self.padded(split, len(weight), parts, self.shape.hidden).flatten(1)

    def heads(self, weight: Tensor, places: list[int], count: int, factor: float = 1.0) -> Tensor:
        """Rows that are heads, [heads * head_dim, in] -> [count * wide head_dim, in], each at its place."""
        found = weight.new_zeros(count, self.shape.head_dim, weight.shape[1])
        for head, place in zip(weight.view(len(places), self.head_dim, -1), places, strict=True):
            found[place, self.dimensions.to(weight.device)] = head * factor
        return found.flatten(0, 1)

    def attention(self, name: str, weight: Tensor, parts: int = 1) -> Tensor:
        """A projection of an attention that reads `parts` states."""
        shape = self.shape
        if name == "o_proj":
            rows = self.heads(weight.t().contiguous(), self.query_places, shape.query_heads).t()
            return self.padded(rows, shape.hidden, rows.shape[1])
        if name == "q_proj":
            factor = math.sqrt(shape.head_dim / self.head_dim)
            return self.columns(self.heads(weight, self.query_places, shape.query_heads, factor), parts)
        return self.columns(self.heads(weight, list(range(self.kv_heads)), shape.kv_heads), parts)

    def mlp(self, name: str, weight: Tensor) -> Tensor:
        """A projection of a gated MLP."""
        shape = self.shape
        sizes = (shape.hidden, shape.inner) if name == "down_proj" else (shape.inner, shape.hidden)
        return self.padded(weight, *sizes)


def _in_nf4(weight: Tensor) -> nn.Module:
    linear = bitsandbytes.nn.Linear4bit(
        *(weight.shape[1], weight.shape[0]), bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    linear.weight = bitsandbytes.nn.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4").to(
        weight.device
    )
    return linear


def large_backbone(backbone: Backbone, shape: Shape = LLAMA_3_8B) -> Backbone:
    """The backbone carried into a shape, in NF4 on the same device."""
    carrier, small = Carrier(backbone, shape), backbone.config
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=small.max_position_embeddings,
        rms_norm_eps=small.rms_norm_eps * carrier.share,
        rope_parameters=dict(small.rope_parameters),
        tie_word_embeddings=False,
        bos_token_id=small.bos_token_id,
        eos_token_id=small.eos_token_id,
        pad_token_id=small.pad_token_id,
    )
    device, dtype = backbone.device, backbone.dtype
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = sorted(backbone.eos_token_ids)

    def parameter(tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.detach().to(device, dtype), requires_grad=False)

    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            source: Any = backbone.blocks[index % backbone.num_blocks]
            is_added = index >= backbone.num_blocks
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                weight = carrier.attention(name, dense_weight(getattr(source.self_attn, name)))
                weight = weight * 0 if is_added and name == "o_proj" else weight
                setattr(block.self_attn, name, _in_nf4(weight.to(device, dtype)))
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = carrier.mlp(name, dense_weight(getattr(source.mlp, name)))
                weight = weight * 0 if is_added and name == "down_proj" else weight
                setattr(block.mlp, name, _in_nf4(weight.to(device, dtype)))
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(block, name).weight = parameter(carrier.norm(getattr(source, name).weight.float()))
        model.model.norm.weight = parameter(carrier.norm(backbone.final_norm.weight.float()))
        model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
        sizes = (shape.vocab, shape.hidden)
        model.model.embed_tokens.weight = parameter(carrier.padded(backbone.embedding_weight, *sizes))
        model.lm_head.weight = parameter(carrier.padded(backbone.lm_head_weight, *sizes))
    name = f"{backbone.name} in the shape of {shape.hidden} x {shape.blocks}"
    return Backbone(model.eval(), backbone.tokenizer, name, "4bit", None)


def large_eagle(head: EagleHead, small: Backbone, large: Backbone, shape: Shape = LLAMA_3_8B) -> EagleHead:
    """The EAGLE head carried along."""
    carrier = Carrier(small, shape)
    found = EagleHead(large, head.exit_layers, head.draft_vocab)
    weights = {}
    for name, weight in head.state_dict().items():
        part = name.split(".")[-2] if "." in name else ""
        if weight.dtype == torch.int64:
            weights[name] = weight
        elif weight.ndim == 1:
            weights[name] = carrier.norm(weight.float())
        elif part == "fc":
            wide = carrier.columns(weight, weight.shape[1] // small.hidden_size)
            weights[name] = carrier.padded(wide, shape.hidden, wide.shape[1])
        elif part in ("gate_proj", "up_proj", "down_proj"):
            weights[name] = carrier.mlp(part, weight)
        else:
            weights[name] = carrier.attention(part, weight, 1 if part == "o_proj" else 2)
    found.load_state_dict(weights)
    return found.to(large.device, large.dtype).requires_grad_(False)


def large_exits(heads: ExitHeads, small: Backbone, large: Backbone, shape: Shape = LLAMA_3_8B) -> ExitHeads:
    """Exit heads of the kind adapter carried along."""
    carrier = Carrier(small, shape)
    found = ExitHeads(large, heads.kind, heads.exit_layers, heads.rank, heads.draft_vocab)
    weights = {}
    for name, weight in heads.state_dict().items():
        if weight.dtype == torch.int64:
            weights[name] = weight
        elif weight.ndim == 1:
            weights[name] = carrier.norm(weight.float())
        elif name.endswith("down.weight"):
            weights[name] = carrier.columns(weight)
        else:
            weights[name] = carrier.padded(weight, shape.hidden, weight.shape[1])
    found.load_state_dict(weights)
    return found.to(large.device, large.dtype).requires_grad_(False)
