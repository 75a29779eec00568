"""The backbone's LM head, and an exact argmax over it that reads half the bytes.

Greedy decoding needs only the best token. The full product reads all rows in bfloat16; `ExactArgmax` reads them as int8
with a scale each, keeps the few tokens that could still win, and lets their bfloat16 rows decide. Its choice is the
full product's in every case, also among equals: a token's int8 logit A is no farther from its logit than

    E = 1.01 (c ||h|| + 2^-8 |A|),  c = ||w - w'|| + 2 K 2^-24 ||w||

for a row w of size K, its int8 form w' and a state h. So a token whose A + E is below the A - E of another cannot be
the best. docs/decisions/0004 derives the bound. At first only the largest A of each group of tokens is compared, with
the largest c of the group.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_CANDIDATES = 512
LARGEST_GROUP = 64
SLACK = 1.01 * 2.0**-8


def int8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, in] float32 -> int8 of the same shape and scales [rows] bfloat16, for `torch._weight_int8pack_mm`."""
    scales = (rows.abs().amax(1) / 127).clamp(min=1e-12).to(torch.bfloat16)
    return (rows / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def full_argmax(weight: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
    """The full product: [width, hidden] -> (choices [width], their logits [width])."""
    best, choices = F.linear(normed, weight).max(-1)
    return choices, best


class ExactArgmax:
    """argmax of normed @ weight.T, equal to the full product's in every case.

    Args:
        weight: [vocab, hidden] bfloat16 on the CPU.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.quantized = torch.empty(weight.shape, dtype=torch.int8)
        self.scales = torch.empty(weight.shape[0], dtype=torch.bfloat16)
        self.row_bound = torch.empty(weight.shape[0])  # [vocab] float32, c of the module's docstring
        accumulation = 2 * weight.shape[1] * 2.0**-24
        for start in range(0, weight.shape[0], 4096):  # in parts: float32 copies of the whole would double the memory
            part = slice(start, start + 4096)
            rows = weight[part].float()
            quantized, scales = int8_rows(rows)
            self.quantized[part], self.scales[part] = quantized, scales
            error = (rows - quantized.float() * scales.float()[:, None]).norm(dim=1)
            self.row_bound[part] = 1.01 * (error + accumulation * rows.norm(dim=1))
        self.group = max(size for size in range(1, LARGEST_GROUP + 1) if weight.shape[0] % size == 0)
        self.within = torch.arange(self.group)
        self.group_bound = self.row_bound.unflatten(0, (-1, self.group)).amax(-1)

    def __call__(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """[width, hidden] bfloat16 -> (choices [width] int64, the approximate best logit [width])."""
        approximate = torch._weight_int8pack_mm(normed, self.quantized, self.scales)  # [width, vocab] bfloat16
        peaks = approximate.unflatten(1, (-1, self.group)).amax(-1).float()  # [width, groups]
        best, winner = peaks.max(-1)
        norm = torch.linalg.vector_norm(normed, dim=-1, dtype=torch.float32)  # [width]
        floor = best - SLACK * best.abs()
        least = floor - self.group_bound[winner] * norm
        highest = peaks + SLACK * peaks.abs() + self.group_bound * norm[:, None]
        groups = (highest >= least[:, None]).any(0).nonzero()
        if groups.numel() == 0:  # NaN, which the caller finds in `best`
            return full_argmax(self.weight, normed)
        places = (groups * self.group + self.within).flatten()
        values = approximate[:, places].float()  # [width, groups * group]
        bound = self.row_bound[places] * norm[:, None]
        floor = floor - bound.gather(1, values.argmax(-1, keepdim=True))[:, 0]
        places = places[(values + SLACK * values.abs() + bound >= floor[:, None]).any(0)]
        if places.numel() > MOST_CANDIDATES:
            return full_argmax(self.weight, normed)
        return places[F.linear(normed, self.weight[places]).argmax(-1)], best


def usable(weight: Tensor) -> bool:
    """Whether the int8 product exists here and a row's bfloat16 product does not depend on the rows beside it."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not hasattr(torch, "_weight_int8pack_mm"):
        return False
    if weight.shape[0] < 4096:
        return False
    states = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for width in (1, 2, 3, 4, 8):
        whole = F.linear(states[:width], weight)
        for rows in (1, 3, 16, 100, MOST_CANDIDATES):
            places = torch.arange(rows) * (weight.shape[0] // rows)
            if not torch.equal(F.linear(states[:width], weight[places]), whole[:, places]):
                return False
    return True


def faster_widths(exact: ExactArgmax, states: Tensor, widths: tuple[int, ...]) -> tuple[int, ...]:
    """The widths at which the exact argmax beats the full product on this device.

    Args:
        states: [rows, hidden] real normed states; random ones would leave too many candidates.
    """
    found = []
    for width in widths:
        sample = states[:width]
        times = []
        for choose in (exact, lambda x: full_argmax(exact.weight, x)):
            choose(sample)
            runs = []
            for _ in range(5):
                started = time.perf_counter()
                choose(sample)
                runs.append(time.perf_counter() - started)
            times.append(sorted(runs)[2])
        if times[0] < times[1]:
            found.append(width)
    return tuple(found)
