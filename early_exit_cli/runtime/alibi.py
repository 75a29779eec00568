"""Distances in the attention in place of positions (ALiBi, Press et al. 2022): BLOOM, MPT and some Falcon models.

A head adds to the score of each key a number that grows with the key's position. What is the same for all keys of a row
changes no softmax, so it does not matter from where one counts: from the buffer's first key, or, as MPT does, from its last.
The number of keys read is that of the request, so every pass of it adds the same numbers.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone


def with_distances(backbone: Backbone, mask: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The mask as the family's blocks take it, and their arguments for the distances, by the library's own functions.

    Args:
        mask: additive, [1, 1, width, keys].
    """
    trunk, heads, keys = backbone.trunk, int(backbone.config.num_attention_heads), mask.shape[-1]
    if backbone.config.model_type == "mpt":  # whose mask tells what is hidden
        return mask.bool(), {"position_bias": trunk.build_mpt_alibi_tensor(heads, keys, device=mask.device)}
    if backbone.config.model_type == "falcon" and not backbone.config.alibi:
        return mask, {"alibi": None}
    whole = torch.ones(1, keys, dtype=torch.long, device=mask.device)
    alibi = sys.modules[type(trunk).__module__].build_alibi_tensor(whole, heads, mask.dtype)  # [heads, 1, keys]
    if backbone.config.model_type == "falcon":  # which adds them with the mask, before the scores are scaled
        scale = math.sqrt(backbone.hidden_size // heads)
        mask = torch.masked_fill(alibi[None] / scale, mask < 0, torch.finfo(mask.dtype).min)
    return mask, {"alibi": alibi}
