"""EAGLE-3 checkpoints with random weights in SafeAILab's layout, and their formula written anew, one position at a time.

The formula is that of SafeAILab's `eagle/model/cnets.py`: the fused states and the embedding of the next token go through
one block; what comes out, before the norm, is the state of the next position; the norm stands in front of the LM head.
speculators' options are switches of the same formula. Nothing here is shared with the program.
"""

import json
import math
from dataclasses import dataclass, field

import torch
from safetensors.torch import save_file

VOCAB, DRAFT, HIDDEN = 320, 96, 64
LAYERS = [1, 3, 5]


@dataclass
class Head:
    """Shapes and switches. target: width of the backbone's states. theta, turns: of rotary positions, or the turns themselves."""

    hidden: int = HIDDEN
    target: int = HIDDEN
    heads: int = 4
    kv_heads: int = 1
    size: int = 32
    inner: int = 80
    theta: float = 10000.0
    eps: float = 1e-5
    norm_before_residual: bool = False
    norm_output: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    qk_norm: bool = False
    weights: dict = field(default_factory=dict)


def random_weights(head, embedding, seed=0):
    """The tensors of a checkpoint, the block's under `midlayer`."""
    generator = torch.Generator().manual_seed(seed)

    def linear(rows, columns):
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(width):
        return 1 + 0.3 * torch.randn(width, generator=generator)

    q, kv = head.heads * head.size, head.kv_heads * head.size
    chosen = torch.randperm(VOCAB, generator=generator)[:DRAFT].sort().values
    has_column = torch.zeros(VOCAB, dtype=torch.bool)
    has_column[chosen] = True
    block = {
        "hidden_norm.weight": norm(head.hidden),
        "input_layernorm.weight": norm(head.hidden),
        "post_attention_layernorm.weight": norm(head.hidden),
        "self_attn.q_proj.weight": linear(q, 2 * head.hidden),
        "self_attn.k_proj.weight": linear(kv, 2 * head.hidden),
        "self_attn.v_proj.weight": linear(kv, 2 * head.hidden),
        "self_attn.o_proj.weight": linear(head.hidden, q),
        "mlp.gate_proj.weight": linear(head.inner, head.hidden),
        "mlp.up_proj.weight": linear(head.inner, head.hidden),
        "mlp.down_proj.weight": linear(head.hidden, head.inner),
    }
    found = {f"midlayer.{name}": tensor for name, tensor in block.items()} | {
        "fc.weight": linear(head.hidden, 3 * head.target),
        "norm.weight": norm(head.hidden),
        "lm_head.weight": 3 * linear(DRAFT, head.hidden),
        "d2t": chosen - torch.arange(DRAFT),
        "t2d": has_column,
    }
    return found | ({"embed_tokens.weight": torch.randn(VOCAB, head.hidden, generator=generator)} if embedding else {})


def settings_of(head, **more):
    """config.json as SafeAILab publishes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": head.hidden,
        "intermediate_size": head.inner,
        "num_attention_heads": head.heads,
        "num_key_value_heads": head.kv_heads,
        "head_dim": head.size,
        "num_hidden_layers": 1,
        "rms_norm_eps": head.eps,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in LAYERS]},
        **more,
    }


def write_checkpoint(folder, settings, weights, pickled=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


def roll_out(head, weights, embedding, states, ids, position, steps):
    """Logits [steps, DRAFT] from `position` on, the text's own tokens in between, everything computed anew at each step.

    Args:
        embedding: [vocab, hidden]. states: [seq, target] after each layer. ids: the text's tokens.
    """
    weight = {name.removeprefix("midlayer."): tensor.double() for name, tensor in weights.items()}

    def rms(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + head.eps).sqrt() * weight[f"{name}.weight"]

    def turned(x, places):  # [places, heads, size]
        turns = head.theta ** (-torch.arange(0, head.size, 2).double() / head.size)
        angles = (places[:, None].double() * turns)[:, None]
        first, second = x.split(head.size // 2, -1)
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
        )

    parts = [state[: position + 1].double() for state in states]
    if head.fc_norm:
        parts = [rms(part, f"fc_norm.{number}") for number, part in enumerate(parts)]
    joined = torch.cat(parts, -1)
    if head.norm_before_fc:
        joined = rms(joined, "input_norm")
    hidden = joined @ weight["fc.weight"].T
    said = []
    for step in range(steps):
        seen = position + 1 + step
        embedded = rms(embedding[ids[1 : seen + 1]].double(), "input_layernorm")
        normed = rms(hidden, "hidden_norm")
        both = torch.cat((embedded, normed), -1)
        query, key, value = (
            (both @ weight[f"self_attn.{name}_proj.weight"].T).view(seen, -1, head.size) for name in "qkv"
        )
        if head.qk_norm:
            query, key = rms(query, "self_attn.q_norm"), rms(key, "self_attn.k_norm")
        places = torch.arange(seen)
        query, key = turned(query, places)[-1], turned(key, places)
        attended = []
        for number in range(head.heads):
            shared = number // (head.heads // head.kv_heads)
            scores = (key[:, shared] @ query[number] / math.sqrt(head.size)).softmax(-1)
            attended.append(scores @ value[:, shared])
        residual = (normed if head.norm_before_residual else hidden)[-1]
        middle = residual + weight["self_attn.o_proj.weight"] @ torch.cat(attended)
        inside = rms(middle, "post_attention_layernorm")
        gate = weight["mlp.gate_proj.weight"] @ inside
        out = middle + weight["mlp.down_proj.weight"] @ (
            gate * torch.sigmoid(gate) * (weight["mlp.up_proj.weight"] @ inside)
        )
        last = rms(out, "norm")
        said.append(weight["lm_head.weight"] @ last)
        hidden = torch.cat((hidden, (last if head.norm_output else out)[None]))
    return torch.stack(said).float()
