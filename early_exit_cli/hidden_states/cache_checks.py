"""Whether the tensors of a cache's files are those that its manifest speaks of: names, shapes, types, and that they belong
together. What is right here can be read without a surprise."""

from __future__ import annotations

import torch
from torch import Tensor

from early_exit_cli.backbone.output import BlockShape
from early_exit_cli.errors import shown
from early_exit_cli.files.forms import to_block_numbers
from early_exit_cli.hidden_states.manifest import ManifestForm, Shard

LAST_BLOCK = "last_block."
"""Prefix of the last block's weights in the readout."""
READOUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATE_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)


def state_names(exit_layers: list[int]) -> list[str]:
    """What a shard calls the states after each exit layer and after the last block, such as `block.7` and `final`."""
    return [*(f"block.{block}" for block in to_block_numbers(exit_layers)), "final"]


def readout_misfit(tensors: dict[str, Tensor], manifest: ManifestForm) -> str | None:
    """What is wrong with a readout, if anything."""
    from transformers.activations import ACT2FN

    last = manifest.last_block
    hidden, vocab = manifest.hidden_size, manifest.fingerprint.vocab_size
    shapes = {"lm_head": [vocab, hidden], "norm": [hidden]}
    if "norm_bias" in tensors:
        shapes["norm_bias"] = [hidden]
    if "lm_head_bias" in tensors:
        shapes["lm_head_bias"] = [vocab]
    if last is not None:
        if last.activation not in ACT2FN:
            return f"the activation {shown(last.activation)} is unknown here"
        if any(name.startswith(LAST_BLOCK) for name in tensors):
            shapes |= {f"{LAST_BLOCK}{name}.weight": shape for name, shape in block_shapes(last, hidden).items()}
    if "embedding" in tensors:  # it may have rows that the LM head lacks
        rows = tensors["embedding"].shape[0] if tensors["embedding"].ndim else 0
        shapes["embedding"] = [max(rows, vocab), hidden]
    return _misshapen(tensors, shapes, READOUT_DTYPES) or _misshapen(tensors, {"token_counts": [vocab]}, (torch.int64,))


def block_shapes(block: BlockShape, hidden: int) -> dict[str, list[int]]:
    """The weights of a block of the Llama shape, by name."""
    queries, keys, inner = block.attention.query_width, block.attention.kv_width, block.inner
    return {
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
        "self_attn.q_proj": [queries, hidden],
        "self_attn.k_proj": [keys, hidden],
        "self_attn.v_proj": [keys, hidden],
        "self_attn.o_proj": [hidden, queries],
        "mlp.gate_proj": [inner, hidden],
        "mlp.up_proj": [inner, hidden],
        "mlp.down_proj": [hidden, inner],
    }


def shard_misfit(
    tensors: dict[str, Tensor], shard: Shard, states: list[str], hidden_size: int, vocab_size: int
) -> str | None:
    """What is wrong with a shard, if anything.

    Args:
        shard: its record in the manifest. states: names of the states that are read (`state_names`).
    """
    tokens, rows = shard.tokens, shard.rows
    scales = [f"{name}.scale" for name in states if f"{name}.scale" in tensors]
    wrong = (
        _misshapen(tensors, {name: [tokens, hidden_size] for name in states}, STATE_DTYPES)
        or _misshapen(tensors, {name: [tokens] for name in ("normalizer", *scales)}, (torch.float32,))
        or _misshapen(tensors, {"ids": [tokens], "row_starts": [rows + 1]}, (torch.int32,))
    )
    if wrong:
        return wrong
    documents = tensors.get("document_starts", tensors["ids"])
    shapes = {"document_starts": [documents.numel()], "answer_starts": [documents.numel() - 1]}
    wrong = _misshapen(tensors, shapes, (torch.int32,))
    if wrong:
        return wrong
    if int(tensors["ids"].min()) < 0 or int(tensors["ids"].max()) >= vocab_size:
        return "ids that are not in the vocabulary"
    for name in ("row_starts", "document_starts"):
        starts = tensors[name].long()
        if starts.numel() < 2 or starts[0] != 0 or starts[-1] != tokens or (starts.diff() <= 0).any():
            return f"{name} should rise from 0 to {tokens}"
    answers = tensors["answer_starts"]
    if ((answers < documents[:-1]) | (answers > documents[1:])).any():
        return "an answer should start within each document"
    return None


def _misshapen(tensors: dict[str, Tensor], shapes: dict[str, list[int]], dtypes: tuple[torch.dtype, ...]) -> str | None:
    for name, shape in shapes.items():
        found = tensors.get(name)
        if found is None or list(found.shape) != shape or found.dtype not in dtypes:
            what = None if found is None else f"{list(found.shape)} {str(found.dtype).removeprefix('torch.')}"
            kind = str(dtypes[0]).removeprefix("torch.")
            return f"{name} should be {shape} {kind}, found {what}"
    return None
