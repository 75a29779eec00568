"""The EAGLE head over one text, in PyTorch: its KV cache, reading what was verified, and steps of its own.

Drafts may be approximate, so on a CPU the head's products run in int8 (docs/decisions/0010).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.heads.attention import HeadCache
from early_exit_cli.heads.eagle import EagleHead
from early_exit_cli.heads.head_runner import HeadRunner
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.runtime.blocks import LARGEST_WIDTH
from early_exit_cli.runtime.exact_argmax import int8_rows
from early_exit_cli.sampling import GREEDY, Chooser

LinearMap = Callable[[Tensor], Tensor]


def draft_linear(weights: list[Tensor]) -> LinearMap:
    """x [rows, in] -> [rows, sum of out]: for a few rows on the CPU in int8 with a scale a row, else the weights as they are."""
    weight = torch.cat(weights)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not hasattr(torch, "_weight_int8pack_mm"):
        return lambda x: F.linear(x, weight)
    quantized, scales = int8_rows(weight.float())
    return lambda x: (
        torch._weight_int8pack_mm(x, quantized, scales) if x.shape[0] <= LARGEST_WIDTH else F.linear(x, weight)
    )


class EagleRunner(HeadRunner):
    """The EAGLE head over one text."""

    cache_kind: ClassVar[type[HeadCache]] = HeadCache
    cache: HeadCache

    def __init__(self, head: EagleHead) -> None:
        self.head = head
        self.inner = head.block.mlp.down_proj.in_features
        self.cache = self.cache_kind(head.block.self_attn.shape, head.fc.weight)
        self.load_weights()

    def load_weights(self) -> None:
        """Bring the head's weights into the form in which they are multiplied."""
        block, attention = self.head.block, self.head.block.self_attn
        self.fc = draft_linear([self.head.fc.weight])
        self.qkv = draft_linear([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        self.output = draft_linear([attention.o_proj.weight])
        self.gate_up = draft_linear([block.mlp.gate_proj.weight, block.mlp.up_proj.weight])
        self.down = draft_linear([block.mlp.down_proj.weight])
        self.lm_head = draft_linear([self.head.lm_head_weight])

    def fork(self) -> EagleRunner:
        other = copy.copy(self)
        other.cache = self.cache.fork()
        return other

    def read(self, tokens: list[int], states: list[Tensor]) -> Tensor:
        hidden = self._block(tokens, self.fc(self.head.normed(states)), self.cache.length)
        self.cache.length += len(tokens)
        return hidden

    def step(self, token: int, hidden: Tensor, ahead: int) -> Tensor:
        return self._block([token], hidden, self.cache.length + ahead - 1)

    def _block(self, tokens: list[int], hidden: Tensor, position: int) -> Tensor:
        head, block = self.head, self.head.block
        ids = torch.tensor(tokens, device=hidden.device)
        joined, residual = block.enter(F.embedding(ids, head.embedding_weight), hidden)
        qkv = block.self_attn.normed(self.qkv(joined))
        hidden = residual[-1:] + self.output(self.cache.attend(qkv, position, 1))
        gate_up = self.gate_up(block.post_attention_layernorm(hidden))
        hidden = hidden + self.down(block.mlp.activation(gate_up[:, : self.inner]) * gate_up[:, self.inner :])
        return head.norm(hidden) if head.layout.norm_output else hidden

    def choose(
        self, hidden: Tensor, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[int, float]:
        logits = self.lm_head(self.head.said(hidden))
        token = chooser.draft(logits, self.head.draft_vocab, list(drafted), temperature)
        return token, float(entropy(logits))
