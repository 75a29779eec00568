"""Tiny Gemma 4 models with assistants: random ones, what transformers' own class says of them, and one that is nearly right."""

import torch
import transformers
from tiny_models import byte_tokenizer

from early_exit_cli.backbone.families import ASSISTANTS

CLASSES = {
    "gemma4_assistant": (transformers.Gemma4AssistantConfig, transformers.Gemma4TextConfig),
    "gemma4_unified_assistant": (transformers.Gemma4UnifiedAssistantConfig, transformers.Gemma4UnifiedTextConfig),
}


def assistant_config(backbone, hidden=32, ordered=False, text=(), **changes):
    """Of an assistant of three blocks that fits the configuration of a backbone, but for `changes`."""
    kind = next(kind for kind, family in ASSISTANTS.items() if family == backbone.model_type)
    of_whole, of_text = CLASSES[kind]
    shapes = dict(zip(backbone.layer_types, backbone.per_layer_config, strict=True))
    settings = {
        "vocab_size": backbone.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": shapes["sliding_attention"].num_key_value_heads,
        "head_dim": shapes["sliding_attention"].head_dim,
        "global_head_dim": shapes["full_attention"].head_dim,
        "num_global_key_value_heads": shapes["full_attention"].num_key_value_heads,
        "attention_k_eq_v": backbone.attention_k_eq_v,
        "sliding_window": backbone.sliding_window,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": backbone.rope_parameters,
        "num_kv_shared_layers": 3,
        "initializer_range": 0.3,
        **{name: getattr(backbone, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        **({} if "unified" in kind else {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}),
        **dict(text),
    }
    own = {
        "backbone_hidden_size": backbone.hidden_size,
        "use_ordered_embeddings": ordered,
        "num_centroids": 32,
        "centroid_intermediate_top_k": 6,
    }
    return of_whole(text_config=of_text(**settings), **own | changes)


def random_assistant(config):
    """transformers' model of an assistant, wide in its weights."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    if config.use_ordered_embeddings:
        model.masked_embedding.token_ordering.copy_(torch.randperm(config.text_config.vocab_size))
    return model


def rolled(backbone, assistant, ids, drafted):
    """Logits [1 + len(drafted), vocab] of transformers' assistant behind a text, then behind drafted tokens, one after another."""
    with torch.no_grad():
        read = backbone(
            torch.tensor([ids[:-1]]), output_hidden_states=True, return_shared_kv_states=True, use_cache=False
        )
        state, said = read.hidden_states[-1][:, -1:], []
        for token in (ids[-1], *drafted):
            embedded = backbone.get_input_embeddings()(torch.tensor([[token]]))
            found = assistant(
                inputs_embeds=torch.cat((embedded, state), -1),
                position_ids=torch.tensor([[len(ids) - 1]]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                shared_kv_states=dict(read.shared_kv_states.items()),
            )
            state = found.last_hidden_state
            said.append(found.logits[0, 0])
    return torch.stack(said)


def nearly_right(config, folder, noise):
    """Folders of a model and its assistant.

    In both a token is followed by another one of its own, unless what is attended to says otherwise, which the assistant
    knows little of.
    """
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    rows = model.get_input_embeddings().weight
    rows.div_(rows.square().mean(-1, keepdim=True).sqrt() + 1e-9)  # but that of padding, which holds zeros
    model.get_output_embeddings().weight.copy_(rows[torch.randperm(len(rows))])
    assistant = random_assistant(assistant_config(config, config.hidden_size))
    for block, attended in [(block, 6.0) for block in model.model.layers] + [
        (block, 0.1) for block in assistant.model.layers
    ]:
        block.post_attention_layernorm.weight.fill_(attended)
        block.post_feedforward_layernorm.weight.fill_(0.1)
        if getattr(block, "post_per_layer_input_norm", None) is not None:
            block.post_per_layer_input_norm.weight.fill_(0.1)
    assistant.model.norm.weight.fill_(1.0)
    assistant.lm_head.weight.copy_(model.get_output_embeddings().weight)  # tied to its embedding, which nobody reads
    eye = torch.eye(config.hidden_size)
    front = torch.cat((eye, torch.zeros_like(eye)), 1)
    assistant.pre_projection.weight.copy_(front + noise * torch.randn_like(front))
    assistant.post_projection.weight.copy_(eye)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    assistant.save_pretrained(folder / "assistant")
    return folder / "model", folder / "assistant"
