"""GGUF files of tiny models, whole or in parts, as `gguf` writes them."""

import re
from collections.abc import Callable
from pathlib import Path

import gguf
from tiny_models import byte_tokenizer
from transformers import AutoConfig

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor of a Llama."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)\.weight", name)
    return OUTSIDE[name] if found is None else f"blk.{found[1]}.{NAMES[found[2]]}.weight"


def paired_rows(name, weight, heads):
    """Queries and keys as llama.cpp orders them: the two halves of a head's rotary dimensions in turns."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(
    path: Path,
    folder: Path,
    tensors: dict,
    parts_of: int | None = None,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> list[Path]:
    """A Llama's tensors as a GGUF file with the byte tokenizer, or as files of at most `parts_of` tensors each.

    Args:
        folder: of the model, for its configuration.
        more: adds to what is written.
    """
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=parts_of or 0)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(word for word, _ in vocabulary), "ab"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    for name, tensor in tensors.items():
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        writer.add_tensor(gguf_name(name), paired_rows(name, tensor.float().numpy(), heads))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))
