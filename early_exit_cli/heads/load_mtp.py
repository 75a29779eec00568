"""The MTP layer of a backbone's checkpoint, or its assistant, made ready to draft beside the backbone's blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.backbone.assistant import Clusters
from early_exit_cli.backbone.load_assistant import load_assistant
from early_exit_cli.backbone.mtp import load_mtp
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.heads.assistant import AssistantHead
from early_exit_cli.heads.eagle_runner import draft_linear
from early_exit_cli.heads.mtp import MtpHead
from early_exit_cli.runtime.blocks import KEY_STEP, Blocks
from early_exit_cli.runtime.hf_blocks import HFBlocks
from early_exit_cli.runtime.kv_cache import KVCache


class MtpBlocks(HFBlocks):
    """The layer's block. Drafts may be approximate: a pass takes as many rows and reads as many keys as there are."""

    def grows(self, limit: int) -> bool:
        return True

    def keys_read(self, cache: KVCache, end: int, width: int) -> int:
        return min(-(-end // KEY_STEP) * KEY_STEP, cache.capacity)


def load_mtp_head(blocks: Blocks) -> MtpHead | None:
    """The layer that the backbone of some blocks brings; None where it brings none.

    Raises:
        BackboneError: as `load_mtp`.
    """
    layer = load_mtp(blocks.backbone)
    if layer is None:
        return None
    exact = blocks.exact_argmax  # whose int8 rows are there already

    def product(x: Tensor) -> Tensor:
        if exact is None:
            return blocks.logits(x)
        return blocks.backbone.logit_map(torch._weight_int8pack_mm(x, exact.quantized, exact.scales))

    return MtpHead(layer, MtpBlocks(layer.block), [blocks.num_blocks], product)


def load_assistant_head(blocks: Blocks, name: str) -> AssistantHead:
    """The assistant, a folder or Hub id, of the backbone of some blocks.

    Raises:
        BackboneError, UnsupportedBackboneError: as `load_assistant`; or these blocks keep keys in an order of their own.
    """
    backbone = blocks.backbone
    if not isinstance(blocks, HFBlocks):
        raise UnsupportedBackboneError(
            f"the assistant {name} reads the keys that the library's blocks keep", hint="--runner hf"
        )
    assistant, weight = load_assistant(name, backbone)
    said = _said_of_all(weight) if assistant.clusters is None else _said_of_likely(weight, assistant.clusters)

    def embed(tokens: list[int]) -> Tensor:  # without what the backbone's blocks are given besides
        return backbone.embed(torch.tensor(tokens).to(backbone.device, non_blocking=True))

    return AssistantHead(assistant, blocks.keys_of, [blocks.num_blocks], embed, said)


def _said_of_all(weight: Tensor) -> Callable[[Tensor], tuple[Tensor, None]]:
    product = draft_linear([weight])
    return lambda hidden: (product(hidden), None)


def _said_of_likely(weight: Tensor, clusters: Clusters) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def said(hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens = clusters.likely(hidden)
        return F.linear(hidden, weight[tokens]), tokens

    return said
