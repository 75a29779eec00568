"""How far a share of right tokens can be trusted: interval, independent tokens, and how many more it would take.

Tokens of one text are alike: where a head follows the pattern of a text, it is right for many tokens in a row. So the
interval counts the tokens as the number of independent ones that vary as much as these do from text to text.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

SURE = 0.95
"""Certainty of the intervals that are reported."""


def deviations(certainty: float) -> float:
    """Standard deviations z below which a normal variable lies with this probability."""
    return NormalDist().inv_cdf(certainty)


def lower_bound(share: Tensor, tokens: Tensor, certainty: float = SURE) -> Tensor:
    """The share that is exceeded with this certainty when `share` of so many independent tokens are right (Wilson 1927).

    Args:
        share, tokens: of one shape, float64; tokens need not be whole numbers.
    """
    z2 = deviations(certainty) ** 2
    spread = (share * (1 - share) / tokens + z2 / (4 * tokens**2)).clamp(min=0).sqrt()
    return ((share + z2 / (2 * tokens) - z2**0.5 * spread) / (1 + z2 / tokens)).clamp(min=0)


def independent_tokens(correct: Tensor, documents: Tensor) -> Tensor:
    """How many independent tokens the first 1, 2, ... n tokens are worth, [n] float64, at most 1, 2, ... n.

    The variance of a share r = sum k_d / sum n_d over documents d, of which k_d of n_d tokens are right, is about
    sum (k_d - r n_d)^2 / n^2 (Cochran 1977, a ratio of cluster totals). It is r (1 - r) / m for m independent tokens.

    Args:
        correct: [n] bool. documents: [n], the document of each token.
    """
    order = documents.argsort(stable=True)
    right, owner = correct[order].double(), documents[order]
    starts = torch.ones_like(owner, dtype=torch.bool)
    starts[1:] = owner[1:] != owner[:-1]
    group = starts.cumsum(0) - 1
    seen = torch.arange(len(owner), dtype=torch.float64)
    hits = right.cumsum(0) - right
    n, k = torch.empty_like(right), torch.empty_like(right)  # of the same document, before each token
    n[order] = seen - seen[starts][group]
    k[order] = hits - hits[starts][group]

    is_right = correct.double()
    total = torch.arange(1, len(owner) + 1, dtype=torch.float64)
    share = is_right.cumsum(0) / total
    sum_nn = (2 * n + 1).cumsum(0)
    sum_kk = (is_right * (2 * k + 1)).cumsum(0)
    sum_kn = ((k + is_right) * (n + 1) - k * n).cumsum(0)
    variance = (sum_kk - 2 * share * sum_kn + share**2 * sum_nn) / total**2
    simple = share * (1 - share) / total
    return total * torch.where(simple > 0, simple / torch.maximum(variance, simple), 1.0)


def tokens_missing(agreement: float, tokens: int, independent: float, level: float, margin: float) -> int:
    """How many more such tokens it takes until the lower bound reaches `level - margin`; 0 when it does already.

    Wilson's bound L solves (agreement - L)^2 = z^2 L (1 - L) / m. An agreement below the level is taken as the level.
    """
    bound = level - margin
    alike = tokens / independent if tokens else 1.0
    needed = deviations(SURE) ** 2 * bound * (1 - bound) / (max(agreement, level) - bound) ** 2
    return max(0, math.ceil(needed * alike) - tokens)
