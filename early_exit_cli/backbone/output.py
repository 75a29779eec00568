"""From the last block's state to logits: what heads, their training and a cache of states need to know of a backbone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from early_exit_cli.backbone.families import rotary_settings
from early_exit_cli.files.forms import Form, Positive

WIDEST_HEAD, INNER_STEP, ROPE_THETA = 128, 64, 10000.0
"""Of blocks near another shape: dimensions of an attention head, what the width of the MLP is a multiple of, and the base of
rotary positions where a configuration has none."""


@dataclass(frozen=True)
class FinalNorm:
    """The norm in front of the LM head: RMSNorm, or LayerNorm where it subtracts the mean.

    weight: [hidden], what the normed state is multiplied by. bias: [hidden], added at the end, where there is one.
    """

    weight: Tensor
    eps: float
    subtracts_mean: bool = False
    bias: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[*, hidden] -> [*, hidden]."""
        weight = self.weight.to(hidden.dtype)
        if not self.subtracts_mean:
            return rms_norm(hidden, weight, self.eps)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.layer_norm(hidden, weight.shape, weight, bias, self.eps)


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square normalisation (Zhang & Sennrich 2019) over the last dimension, as the backbone rounds it."""
    return weight * F.rms_norm(hidden, (hidden.shape[-1],), None, eps)


class LogitMap(Form, extra="forbid"):
    """What some families do to the LM head's product: divide it (Granite), bend it below a cap (Gemma 2).

    It grows with the product, so that the best token stays the best; entropies and probabilities change. In float32, where
    it rounds no two logits to one.
    """

    divisor: float = Field(gt=0.0, default=1.0)
    cap: float | None = Field(gt=0.0, default=None)

    def __call__(self, product: Tensor) -> Tensor:
        if self.divisor != 1.0:
            product = product.float() / self.divisor
        return product if self.cap is None else torch.tanh(product.float() / self.cap) * self.cap


class BlockShape(Form, extra="forbid"):
    """A block of the Llama shape, without its weights: the backbone's, or as wide as one of its blocks."""

    query_heads: Positive
    kv_heads: Positive
    head_dim: Positive
    inner: Positive
    activation: str
    rope_theta: float = Field(gt=0.0)

    @classmethod
    def near(cls, config: Any) -> BlockShape:
        """Of a block about as wide as those of a configuration (transformers' own), which are of another shape; with heads of
        128 dimensions at most, which our kernels know.
        """
        hidden, query_heads = int(config.hidden_size), int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or query_heads)
        head_dim = int(getattr(config, "head_dim", None) or hidden // query_heads)
        parts = head_dim // WIDEST_HEAD if head_dim % WIDEST_HEAD == 0 else 1
        inner = getattr(config, "intermediate_size", None) or 4 * hidden
        return cls(
            query_heads=query_heads * parts,
            kv_heads=(kv_heads if query_heads % kv_heads == 0 else query_heads) * parts,
            head_dim=head_dim // parts,
            inner=-(-inner // INNER_STEP) * INNER_STEP,
            activation="silu",
            rope_theta=max(float(table.get("rope_theta", ROPE_THETA)) for table in rotary_settings(config)),
        )

    @property
    def attention(self) -> AttentionShape:
        """Its attention's shape."""
        return AttentionShape(self.query_heads, self.kv_heads, self.head_dim, self.rope_theta)


@dataclass(frozen=True)
class LastBlock:
    """What heads with an attention of their own start from.

    weights: of the backbone's last block where that has the Llama shape, as `transformers` names them within the block,
    dequantized, [out, in]; empty where it has not: such heads start from chance.
    """

    shape: BlockShape
    weights: dict[str, Tensor]


class BackboneView(Protocol):
    """What heads and their training need of a backbone: identity, shape, final norm, LM head, embedding, last block.

    A `Backbone` is one; so is what a cache of hidden states keeps of it, so that training loads no backbone.
    """

    @property
    def name(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def fingerprint(self) -> dict[str, Any]: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def final_norm(self) -> FinalNorm: ...
    @property
    def logit_map(self) -> LogitMap: ...

    @property
    def lm_head_weight(self) -> Tensor:
        """[vocab, hidden]"""

    @property
    def lm_head_bias(self) -> Tensor | None:
        """[vocab], where there is one: Phi, GPT-J."""

    @property
    def embedding_weight(self) -> Tensor:
        """[vocab, hidden]; the LM head's where the two are tied."""

    @property
    def last_block(self) -> LastBlock: ...


def logits_of(view: BackboneView, normed: Tensor, vocab: Tensor | None = None) -> Tensor:
    """The backbone's logits of final normed states, [*, hidden] -> [*, vocab], or of the tokens `vocab` [chosen] only."""
    weight, bias = view.lm_head_weight, view.lm_head_bias
    if vocab is not None:
        weight, bias = weight[vocab], None if bias is None else bias[vocab]
    return view.logit_map(F.linear(normed, weight, bias))


@dataclass(frozen=True)
class ScaledRotary:
    """Rotary positions that are scaled: what a position turns each pair of dimensions by, [head_dim / 2] in radians, and what
    cos and sin are multiplied by."""

    frequencies: tuple[float, ...]
    factor: float


@dataclass(frozen=True)
class AttentionShape:
    """Grouped-query attention with rotary positions: of a base, or `scaled`, which then is all that counts."""

    query_heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    scaled: ScaledRotary | None = None

    @property
    def query_width(self) -> int:
        """Of the queries of one token."""
        return self.query_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Of its keys, and of its values."""
        return self.kv_heads * self.head_dim
