"""How sure a head is, and whether it may exit: pure tensor functions and the thresholds record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = float("-inf")
"""A threshold that no entropy is below."""


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy H = -sum p ln p of softmax(logits) over the last dimension, in nats, computed in float32."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    return -(log_p.exp() * log_p).sum(-1)


def may_exit(uncertainty: float, entropy_threshold: float) -> bool:
    """A head exits when its entropy is strictly below its threshold."""
    return uncertainty < entropy_threshold


def level_key(level: float) -> str:
    """A target accuracy as calibration.json writes it."""
    return f"{level:.2f}"


@dataclass(frozen=True)
class Thresholds:
    """Entropy thresholds (nats) of every head at every calibrated target accuracy."""

    levels: Mapping[str, Sequence[float]]

    def at(self, level: float) -> list[float]:
        """Thresholds of the heads in depth order; KeyError for a level that was not calibrated."""
        return list(self.levels[level_key(level)])
