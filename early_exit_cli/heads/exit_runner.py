"""Reading the exit heads over one text, a token at a time: in compiled code where it fits, else in PyTorch.

A head without attention looks at one state. One with attention looks at the text's states after its block as well:
those of verified tokens, which it is shown, and those of the tokens drafted since. Drafts may be approximate: compiled
code multiplies in int8, where PyTorch takes the heads' own weights.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from early_exit_cli.backbone.output import LogitMap
from early_exit_cli.backbone.quantization import HEAD_STEP
from early_exit_cli.config_training import UncertaintyMetric
from early_exit_cli.heads.attention import HeadCache
from early_exit_cli.heads.exit_heads import AdapterHead, AttentionHead, ExitHeads, LinearHead
from early_exit_cli.heads.native_head_cache import NativeHeadCache
from early_exit_cli.heads.uncertainty import uncertainty
from early_exit_cli.runtime.native_buffers import Held
from early_exit_cli.runtime.native_code import Attention, ExitHead, Int8, has_native_code, native_code
from early_exit_cli.runtime.nf4_linear import VOCAB_TILE
from early_exit_cli.runtime.thread_count import pass_threads
from early_exit_cli.sampling import GREEDY, Chooser


class Seen:
    """What a head with attention has seen of a text.

    cache: its keys and values, of verified tokens and of `ahead` drafted ones behind them. waiting: states of verified
    tokens that it has not read yet, [rows, hidden] each; then nothing is ahead.
    """

    def __init__(self, cache: HeadCache) -> None:
        self.cache = cache
        self.ahead = 0
        self.waiting: list[Tensor] = []

    def verified(self, states: Tensor) -> None:
        """The next tokens are verified, [rows, hidden]; what was read of them while drafting is kept."""
        kept = min(self.ahead, len(states))
        self.cache.length += kept
        self.ahead = 0
        if kept < len(states):
            self.waiting.append(states[kept:])

    def take(self, states: Sequence[Tensor]) -> tuple[Tensor, int]:
        """A round's states so far, [1, hidden] each -> those that were not read, verified ones first, and their
        position.

        They count as read from now on.
        """
        position = self.cache.length + self.ahead
        new = torch.cat([*self.waiting, *states[self.ahead :]])
        self.cache.length += sum(map(len, self.waiting))
        self.waiting, self.ahead = [], len(states)
        return new, position


class ExitRunner:
    """Keeps what the head read last has said, until the next reading."""

    cache_kind: ClassVar[type[HeadCache]] = HeadCache

    def __init__(self, heads: ExitHeads) -> None:
        self.heads = heads
        self.logits = torch.empty(0)
        self.begin()

    def begin(self) -> None:
        """Another text."""
        self.seen = {
            number: Seen(self.cache_kind(head.shape, head.o_proj.weight))
            for number, head in enumerate(self.heads.heads)
            if isinstance(head, AttentionHead)
        }

    def fork(self) -> ExitRunner:
        """The same heads over another text."""
        other = copy.copy(self)
        other.begin()
        return other

    def watched(self, heads: Sequence[int]) -> list[int]:
        """Those of some heads that must see the states of verified tokens."""
        return [head for head in heads if head in self.seen]

    def process(self, head: int, states: Tensor) -> None:
        """States of verified tokens after a watched head's exit layer, [rows, hidden]."""
        self.seen[head].verified(states)

    def logits_of(self, head: int, states: Sequence[Tensor], last: int) -> Tensor:
        """What a head says of the last tokens of a round, [last, draft vocab], in its own weights.

        Args:
            states: after its exit layer, of the tokens since the last verified one, [1, hidden] each.
        """
        if head in self.seen:
            new, position = self.seen[head].take(states)
            module = cast(AttentionHead, self.heads.heads[head])
            return self.heads.logits(head, module.over_cache(new, self.seen[head].cache, position, last))
        return self.heads.logits(head, torch.cat(list(states[-last:])))

    def read(self, head: int, states: Sequence[Tensor], metric: UncertaintyMetric = "entropy") -> float:
        """How unsure a head is (`uncertainty.uncertainty`) of the last token of a round; `states` as in `logits_of`."""
        self.logits = self.logits_of(head, states, 1)
        return float(uncertainty(self.logits, metric))

    def token(self, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0) -> int:
        """What the head read last proposes (`Chooser.draft`)."""
        return chooser.draft(self.logits, self.heads.draft_vocab, list(drafted), temperature)


class NativeExitRunner(ExitRunner):
    """`ExitRunner` in one call a reading."""

    cache_kind = NativeHeadCache

    def __init__(self, heads: ExitHeads) -> None:
        super().__init__(heads)
        self.code = native_code()
        self.held = Held(self.code)
        if heads.kind == "linear":
            self.weights = [self._linear_weights(head) for head in cast("list[LinearHead]", list(heads.heads))]
        else:
            lm_head = self.held.int8_of(heads.lm_head.weight)
            self.weights = [self._weights(head, lm_head) for head in cast("list[AdapterHead]", list(heads.heads))]
        self._hold_results()

    def _linear_weights(self, head: LinearHead) -> ExitHead:
        linear, norm = self.held.int8_of(head.linear.weight), self.held.address(head.norm["weight"])
        return ExitHead(Attention(), Int8(), Int8(), linear, None, None, norm, 0.0, head.eps)

    def _weights(self, head: AdapterHead, lm_head: Int8) -> ExitHead:
        held, final_norm = self.held, self.heads.lm_head.norm
        attention, attention_norm = Attention(), None
        if isinstance(head, AttentionHead):
            projections = (head.q_proj.weight, head.k_proj.weight, head.v_proj.weight, head.o_proj.weight)
            attention = held.attention(head.shape, projections)
            attention_norm = head.attention_norm["weight"]
        return ExitHead(
            *(attention, held.int8_of(head.down.weight), held.int8_of(head.up.weight), lm_head),
            *map(held.address, (attention_norm, head.norm["weight"], final_norm.weight)),
            *(head.eps, final_norm.eps),
        )

    def _hold_results(self) -> None:
        self.logits = torch.empty(1, self.weights[0].lm_head.outputs)
        self.column, self.entropy, self.confidence = ctypes.c_int64(), ctypes.c_float(), ctypes.c_float()

    def fork(self) -> ExitRunner:
        other = cast(NativeExitRunner, super().fork())
        other._hold_results()
        return other

    def read(self, head: int, states: Sequence[Tensor], metric: UncertaintyMetric = "entropy") -> float:
        new, position, buffers = states[-1].contiguous(), 0, None
        if head in self.seen:
            new, position = self.seen[head].take(states)
            cache = cast(NativeHeadCache, self.seen[head].cache)
            cache.reserve(position + len(new))
            buffers = cache.buffers
        results = (self.logits.data_ptr(), self.column, self.entropy, self.confidence)
        given = (self.weights[head], new.data_ptr(), len(new), position, buffers)
        if self.code.eexit_read_head(*given, *results, pass_threads.now):
            raise MemoryError
        return self.entropy.value if metric == "entropy" else -self.confidence.value

    def token(self, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0) -> int:
        if chooser.reads_logits:
            return super().token(chooser, drafted, temperature)
        vocab = self.heads.draft_vocab
        return self.column.value if vocab is None else int(vocab[self.column.value])


def exit_runner(heads: ExitHeads) -> ExitRunner:
    """A reader for heads on their device."""
    return NativeExitRunner(heads) if _fits(heads) else ExitRunner(heads)


def _fits(heads: ExitHeads) -> bool:
    read: list[Tensor] = list(heads.parameters())
    if heads.kind != "linear":
        lm_head = heads.lm_head
        if lm_head.norm.subtracts_mean or lm_head.bias is not None or lm_head.logit_map != LogitMap():
            return False
        read += [lm_head.weight, lm_head.norm.weight]
    if any(weight.device.type != "cpu" or weight.dtype != torch.bfloat16 for weight in read):
        return False
    if any(size % VOCAB_TILE for weight in read for size in weight.shape):
        return False
    if any(isinstance(head, AttentionHead) and head.shape.head_dim % HEAD_STEP for head in heads.heads):
        return False
    return has_native_code()
