"""Reading one exit head over one token's state while drafting: in compiled code where it fits, else in PyTorch.

Drafts may be approximate: compiled code multiplies in int8, where PyTorch takes the heads' own weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from early_exit_cli.config import UncertaintyMetric
from early_exit_cli.gating import uncertainty
from early_exit_cli.heads import AdapterHead, ExitHeads
from early_exit_cli.native_blocks import VOCAB_TILE, Held
from early_exit_cli.native_code import ExitHead, has_native_code, native_code
from early_exit_cli.readout import LogitMap
from early_exit_cli.sampling import GREEDY, Chooser


class ExitReader:
    """Keeps what the head read last has said, until the next reading."""

    def __init__(self, heads: ExitHeads) -> None:
        self.heads = heads
        self.logits = torch.empty(0)

    def read(self, head: int, state: Tensor, metric: UncertaintyMetric = "entropy") -> float:
        """How unsure a head is (`gating.uncertainty`) over a token's state after its exit layer, [1, hidden]."""
        self.logits = self.heads.logits(head, state)
        return float(uncertainty(self.logits, metric))

    def token(self, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0) -> int:
        """What the head read last proposes (`Chooser.draft`)."""
        return chooser.draft(self.logits, self.heads.draft_vocab, list(drafted), temperature)


class NativeExitReader(ExitReader):
    """`ExitReader` in one call a reading."""

    def __init__(self, heads: ExitHeads) -> None:
        super().__init__(heads)
        self.code, self.held = native_code(), Held()
        final_norm = heads.lm_head.norm
        lm_head = self.held.int8_of(heads.lm_head.weight)
        self.weights = [
            ExitHead(
                *map(self.held.int8_of, (head.down.weight, head.up.weight)),
                lm_head,
                *map(self.held.address, (head.norm["weight"], final_norm.weight)),
                *(head.eps, final_norm.eps),
            )
            for head in cast("list[AdapterHead]", list(heads.heads))
        ]
        self.logits = torch.empty(1, heads.lm_head.weight.shape[0])
        self.column, self.entropy, self.confidence = ctypes.c_int64(), ctypes.c_float(), ctypes.c_float()

    def read(self, head: int, state: Tensor, metric: UncertaintyMetric = "entropy") -> float:
        state = state.contiguous()
        results = (self.logits.data_ptr(), self.column, self.entropy, self.confidence)
        if self.code.eexit_read_head(self.weights[head], state.data_ptr(), *results, torch.get_num_threads()):
            raise MemoryError
        return self.entropy.value if metric == "entropy" else -self.confidence.value

    def token(self, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0) -> int:
        if chooser.reads_logits:
            return super().token(chooser, drafted, temperature)
        vocab = self.heads.draft_vocab
        return self.column.value if vocab is None else int(vocab[self.column.value])


def exit_reader(heads: ExitHeads) -> ExitReader:
    """The reader for heads on their device."""
    return NativeExitReader(heads) if _fits(heads) else ExitReader(heads)


def _fits(heads: ExitHeads) -> bool:
    weight, norm = heads.lm_head.weight, heads.lm_head.norm
    if heads.kind != "adapter" or weight.device.type != "cpu" or heads.lm_head.logit_map != LogitMap():
        return False
    if norm.subtracts_mean or {weight.dtype, norm.weight.dtype, *(p.dtype for p in heads.parameters())} != {
        torch.bfloat16
    }:
        return False
    if any(size % VOCAB_TILE for size in (*weight.shape, heads.rank)):
        return False
    return has_native_code()
