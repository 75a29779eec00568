"""Checkpoints of tiny models that bring a layer for multi-token prediction, in the layouts of Qwen's and of GLM's."""

import copy
import shutil

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from early_exit_cli.backbone.families import FAMILIES

ATTENDED = 0.2
"""How much attention says in `right_backbone`."""


def one_block(config):
    """The library's model of a family with one block that attends, as an MTP layer has it."""
    config = copy.deepcopy(config)
    for name, value in {
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "mlp_layer_types": ["sparse"],
        "mlp_only_layers": [],
        "first_k_dense_replace": 0,
    }.items():
        if getattr(config, name, None) is not None:
            setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def random_layer(config):
    """(block and norm, the three tensors in front of them), wide in its weights."""
    torch.manual_seed(5)
    block, hidden = one_block(config), config.hidden_size
    for parameter in block.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    front = {
        "join": torch.randn(hidden, 2 * hidden) * 0.2,
        "embedding": torch.rand(hidden),
        "state": torch.rand(hidden),
    }
    return block, front


def write_layer(source, target, block, front, scratch):
    """A copy of the checkpoint in `source` with the layer in it, by the names that the family's own checkpoints have."""
    shutil.copytree(source, target)
    block.save_pretrained(scratch)  # experts one by one, as checkpoints hold them
    saved, weights = load_file(scratch / "model.safetensors"), load_file(target / "model.safetensors")
    count = block.config.num_hidden_layers
    assert count == 1
    if FAMILIES[block.config.model_type].mtp == "beside":
        names = {"model.layers.0.": "mtp.layers.0.", "model.norm.": "mtp.norm."}
        around = ("mtp.fc.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
    else:
        behind = f"model.layers.{1 + max(int(name.split('.')[2]) for name in weights if '.layers.' in name)}."
        names = {"model.layers.0.": behind, "model.norm.": f"{behind}shared_head.norm."}
        around = tuple(f"{behind}{name}.weight" for name in ("eh_proj", "enorm", "hnorm"))
        weights[f"{behind}shared_head.head.weight"] = weights["lm_head.weight"].clone()
        weights[f"{behind}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    for start, instead in names.items():
        weights |= {instead + name[len(start) :]: value for name, value in saved.items() if name.startswith(start)}
    weights |= dict(zip(around, (front[name].clone() for name in ("join", "embedding", "state")), strict=True))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def rolled(model, block, front, ids, drafted):
    """Logits of the layer by its formula: states of the library's model over `ids`, then its own outputs in their place.

    Args:
        drafted: tokens that are rolled out over, after the one that follows the last state.

    Returns:
        [1 + len(drafted), vocab]
    """
    plus = float(FAMILIES[model.config.model_type].adds_one)
    eps = model.config.rms_norm_eps

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (plus + weight)

    with torch.no_grad():
        states = model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states[-1][0]
        said = []
        for number in range(len(drafted) + 1):
            tokens = torch.tensor([*ids[1:], *drafted][: len(states)])
            embedded = model.get_input_embeddings()(tokens)
            read = torch.cat((norm(embedded, front["embedding"]), norm(states, front["state"])), -1)
            out = block.model(inputs_embeds=(read @ front["join"].T)[None], use_cache=False).last_hidden_state[0]
            said.append(model.get_output_embeddings()(out[-1]))
            states = torch.cat((states, out[-1:])) if number < len(drafted) else states
    return torch.stack(said)


def right_backbone(config):
    """A model of two blocks, of which the first, with a state, adds little, and an MTP layer that is its second block: what the
    layer says of the following token is what the model says there, but for the first token's key, which it lacks.

    A token is followed by another one of its own, unless what is attended to says otherwise.
    """
    torch.manual_seed(7)
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[1:3]
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    rows = model.get_input_embeddings().weight
    rows.div_(rows.square().mean(-1, keepdim=True).sqrt() + 1e-9)  # but that of padding, which holds zeros
    model.get_output_embeddings().weight.copy_(rows[torch.randperm(len(rows))])
    first, second = model.model.layers
    first.linear_attn.A_log.sub_(3.0)  # a state that is not forgotten within a few tokens
    for weight in (first.linear_attn.out_proj.weight, first.mlp.down_proj.weight):
        weight.mul_(0.001)
    for norm in (second.self_attn.q_norm, second.self_attn.k_norm):
        norm.weight.add_(0.5)  # some keys are looked at, not their mean
    second.self_attn.o_proj.weight.mul_(ATTENDED)
    second.mlp.down_proj.weight.mul_(0.05)
    block = one_block(config)
    block.model.layers[0].load_state_dict(second.state_dict())
    block.model.norm.load_state_dict(model.model.norm.state_dict())
    hidden = config.hidden_size
    front = {
        "join": torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), 1),
        "embedding": torch.zeros(hidden),
        "state": torch.zeros(hidden),
    }
    return model, block, front
