"""How sure a head is, and whether it may exit: pure tensor functions and the thresholds record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit_cli.config_training import UncertaintyMetric
from early_exit_cli.errors import ConfigError

NEVER = float("-inf")
"""A threshold that no uncertainty is below."""


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy H = -sum p ln p of softmax(logits) over the last dimension, in nats, computed in float32."""
    log_p = torch.log_softmax(logits.float(), -1)  # several times faster than the operator's own conversion
    return -(log_p.exp() * log_p).sum(-1)


def uncertainty(logits: Tensor, metric: UncertaintyMetric) -> Tensor:
    """How unsure softmax(logits) is over the last dimension, in float32; lower is surer.

    `confidence` is minus the highest probability, which is what DSSD writes into calibration.json under that name: its
    thresholds and ours mean the same.
    """
    if metric == "entropy":
        return entropy(logits)
    return -torch.softmax(logits, -1, dtype=torch.float32).amax(-1)


def may_exit(found: float, threshold: float) -> bool:
    """A head exits when its uncertainty is strictly below its threshold."""
    return found < threshold


def level_key(level: float) -> str:
    """A target accuracy as calibration.json writes it."""
    return f"{level:.2f}"


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of every head at every calibrated target accuracy, in the units of `metric`."""

    levels: Mapping[str, Sequence[float]]
    metric: UncertaintyMetric = "entropy"

    def at(self, level: float) -> list[float]:
        """Thresholds of the heads in depth order.

        Raises:
            ConfigError: a level that was not calibrated.
        """
        if level_key(level) not in self.levels:
            raise ConfigError(
                f"accuracy level {level_key(level)} was not calibrated; calibrated: {', '.join(self.levels)}"
            )
        return list(self.levels[level_key(level)])
