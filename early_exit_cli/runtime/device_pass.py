"""A pass over the rows of a text as a list of kernels: five a block, with buffers between them that never move.

The norm in front of a product is folded into it: its weight is multiplied in where the states are written, each row's
factor after the product, from sums of squares that the writer leaves beside them. So a block is: q, k and v; attention
with rotary embedding and KV cache; the output product, added; gate and up, gated; the down product, added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit_cli.runtime.cuda_kernels import TILE, AttentionPlan, Kernels, NF4Weight, Normed, Place, Step


@dataclass(frozen=True)
class BlockWeights:
    """One decoder block of the Llama shape. gate_up: gate rows, then up rows."""

    input_norm: Tensor
    qkv: NF4Weight
    attention: AttentionPlan
    output: NF4Weight
    mlp_norm: Tensor
    gate_up: NF4Weight
    down: NF4Weight


class Buffers:
    """What stands between the kernels of passes of one width.

    incoming: [width, size], rows that come as states.
    hidden: [blocks + 1, width, size], the states before the first block and after each.
    """

    def __init__(self, width: int, blocks: Sequence[BlockWeights], size: int, eps: float, device: torch.device) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        plan = blocks[0].attention
        self.hidden = new(len(blocks) + 1, width, size)
        self.incoming, self.middle = new(width, size), new(width, size)
        self.qkv = new(width, blocks[0].qkv.outputs)
        self.attended = new(width, plan.query_heads * plan.head_dim)
        self.gated = new(width, blocks[0].down.inputs)
        self.normed = Normed(new(width, size), new(width, size // TILE, dtype=torch.float32), eps)


def block_steps(
    kernels: Kernels,
    blocks: Sequence[BlockWeights],
    last_norm: Tensor,
    buffers: Buffers,
    texts: Sequence[tuple[Place, slice]],
    first: int,
    last: int,
) -> list[Step]:
    """Blocks first .. last - 1 over the rows that `enter_step` has put into the buffers.

    Args:
        last_norm: weight of the norm behind the last block.
        texts: the rows of each, and where it stands.
    """
    steps = []
    normed = buffers.normed
    for number in range(first, last):
        block, states = blocks[number], buffers.hidden[number]
        following = blocks[number + 1].input_norm if number + 1 < len(blocks) else last_norm
        steps.append(kernels.product(block.qkv, normed, buffers.qkv))
        for place, rows in texts:
            steps.append(kernels.attention(place, block.attention, buffers.qkv[rows], buffers.attended[rows]))
        steps += [
            kernels.added(block.output, buffers.attended, states, buffers.middle, block.mlp_norm, normed),
            kernels.gated(block.gate_up, normed, buffers.gated),
            kernels.added(block.down, buffers.gated, buffers.middle, buffers.hidden[number + 1], following, normed),
        ]
    return steps
