"""An EAGLE head as an EAGLE-3 checkpoint of the package `speculators`, which vLLM and SGLang serve.

The same weights under the same names. What our file leaves out because it is the backbone's goes in: the LM head's rows
of the draft vocabulary, the embedding, and the final norm as the third `fc_norm`, since that checkpoint reads the last
block's state before the norm. `d2t` holds token id minus column, `t2d` which tokens have a column.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.files.atomic import atomic_folder, write_json
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.exit_heads import DRAFT_VOCAB

LAYOUT_VERSION = "0.9.0"
"""Release of speculators whose configuration this writes."""


def export_eagle(head: EagleHead, backbone: Backbone, folder: Path, draft_tokens: int) -> None:
    """Write model.safetensors and config.json into a new folder.

    Args:
        draft_tokens: what the configuration asks of a serving engine: tokens of one draft.
    """
    with atomic_folder(folder) as temporary:
        save_file(checkpoint_tensors(head, backbone), temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", checkpoint_config(head, backbone, draft_tokens))


def checkpoint_tensors(head: EagleHead, backbone: Backbone) -> dict[str, Tensor]:
    """Everything the checkpoint holds, on the CPU."""
    vocab = backbone.vocab_size
    chosen = torch.arange(vocab) if head.draft_vocab is None else head.draft_vocab.cpu()
    has_column = torch.zeros(vocab, dtype=torch.bool)
    has_column[chosen] = True
    tensors = {name: value for name, value in head.state_dict().items() if name != DRAFT_VOCAB}
    tensors |= {"lm_head.weight": head.lm_head_weight, "embed_tokens.weight": head.embedding_weight}
    if head.layout.reads_final:
        tensors[f"fc_norm.{len(head.exit_layers)}.weight"] = backbone.final_norm.weight
    tensors = {name: value.detach().to("cpu", backbone.dtype).clone() for name, value in tensors.items()}
    if head.draft_vocab is not None:
        tensors |= {"d2t": chosen - torch.arange(chosen.numel()), "t2d": has_column}
    return tensors


def checkpoint_config(head: EagleHead, backbone: Backbone, draft_tokens: int) -> dict[str, Any]:
    """config.json of the checkpoint."""
    layout = head.layout
    others = {"target_hidden_size": backbone.hidden_size} if layout.hidden != backbone.hidden_size else {}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": LAYOUT_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": draft_tokens}],
            "verifier": {"name_or_path": backbone.name, "architectures": list(backbone.config.architectures or [])},
        },
        "transformer_layer_config": {
            "model_type": "qwen3" if layout.qk_norm else "llama",
            "hidden_size": layout.hidden,
            "intermediate_size": layout.inner,
            "num_attention_heads": layout.query_heads,
            "num_key_value_heads": layout.kv_heads,
            "head_dim": layout.head_dim,
            "hidden_act": layout.activation,
            "rms_norm_eps": layout.eps,
            "rope_parameters": layout.rope,
            "max_position_embeddings": backbone.context_length if head.is_ours else layout.positions,
            "vocab_size": backbone.vocab_size,
            "num_hidden_layers": 1,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
        "draft_vocab_size": head.lm_head_weight.shape[0],
        "eagle_aux_hidden_state_layer_ids": [*head.exit_layers, *([backbone.num_blocks] if layout.reads_final else [])],
        "fc_norm": layout.fc_norm,
        "norm_output": layout.norm_output,
        "norm_before_residual": layout.norm_before_residual,
        **({"norm_before_fc": True} if layout.joint_norm else {}),
        **others,
        "tie_word_embeddings": False,
        "torch_dtype": str(backbone.dtype).removeprefix("torch."),
    }
