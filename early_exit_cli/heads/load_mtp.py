"""The MTP layer of a backbone's checkpoint, made ready to draft beside the backbone's blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from early_exit_cli.backbone.mtp import load_mtp
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
