"""The assistant of a Gemma 4 model: a checkpoint of its own, of a few small blocks that keep no keys and values.

Drafting from position p, whose token is chosen and not yet run, it reads the backbone's embedding of that token and the
backbone's final normed state at p - 1, joined in this order. Its blocks attend to keys and values of the backbone, those of
the last block of the same kind that keeps any, at positions before p. What leaves it is projected back to the size of a state
of the backbone, and stands in the place of that state in its next step, which has the next token and still position p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Keys = dict[str, tuple[Tensor, Tensor]]
"""Kind of block -> keys and values, [1, kv_heads, positions, head_dim] each."""


@dataclass(frozen=True)
class Clusters:
    """Tokens in clusters, of which only the likeliest are looked at.

    centroids: [*, hidden] -> [*, clusters]. tokens: [clusters, tokens in each] int64. most: clusters that are looked at.
    """

    centroids: nn.Module
    tokens: Tensor
    most: int

    def likely(self, hidden: Tensor) -> Tensor:
        """[1, hidden] -> token ids [most * tokens in each] int64."""
        return self.tokens[self.centroids(hidden)[0].topk(self.most).indices].flatten()


@dataclass(frozen=True)
class Assistant:
    """The assistant's modules, on the backbone's device.

    content: hash of what it was loaded from. enter: [*, 2 * backbone's hidden] -> [*, hidden]; leave: [*, hidden] ->
    [*, backbone's hidden]. kinds: of its blocks. window: of those that look back a part of the text only. clusters: where
    not all tokens are looked at.
    """

    name: str
    content: str
    enter: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module
    leave: nn.Module
    rotary: nn.Module
    kinds: list[str]
    window: int
    clusters: Clusters | None

    def seen(self, kind: str, position: int) -> slice:
        """The positions that blocks of a kind attend to, drafting from `position`: all before it, or the last window + 1.

        So has it transformers' mask, which counts from the newest key, distance `window` included. The backbone's own row
        at `position` would see window - 1 of these, and itself.
        """
        return slice(0 if kind == "full_attention" else max(0, position - self.window - 1), position)

    def rotary_at(self, position: int) -> Keys:
        """cos and sin of one position, [1, 1, head_dim] each, by the kind of block."""
        weight: Any = self.norm.weight
        like, places = weight.new_empty(0), torch.tensor([[position]], device=weight.device)
        return {kind: self.rotary(like, places, kind) for kind in {*self.kinds}}

    def run(self, embedded: Tensor, state: Tensor, rotary: Keys, keys: Keys) -> Tensor:
        """A step: the token's embedding and the state before it, [1, backbone's hidden] each -> normed, [1, hidden]."""
        hidden = self.enter(torch.cat((embedded, state), -1))[None]
        for block, kind in zip(self.blocks, self.kinds, strict=True):
            hidden = block(hidden, shared_kv_states=keys, position_embeddings=rotary[kind], attention_mask=None)
        return self.norm(hidden[0])
