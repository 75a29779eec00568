"""What heads learn: the backbone's own distribution, over a draft vocabulary, by KL divergence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.backbone import Readout
from early_exit_cli.engine import require_finite
from early_exit_cli.states import States, log_normalizer


def draft_vocabulary(counts: Tensor, size: int, always: Iterable[int]) -> Tensor | None:
    """The `size` most frequent tokens, ascending, int64, `always` among them; None keeps all.

    Args:
        counts: [vocab] int64, occurrences in the training text.
    """
    if not size or size >= counts.numel():
        return None
    ranked = counts.clone()
    ranked[torch.tensor(sorted(always), dtype=torch.int64)] = torch.iinfo(torch.int64).max
    return ranked.argsort(descending=True, stable=True)[:size].sort().values


@dataclass(frozen=True)
class Teacher:
    """What the backbone says of every position.

    probabilities: [positions, draft vocab] float32, renormalised to the draft vocabulary. mass: [positions] float32, the
    probability it gives to that vocabulary. negative_entropy: [positions] float32, of `probabilities`, in nats.
    """

    probabilities: Tensor
    mass: Tensor
    negative_entropy: Tensor


def teach(readout: Readout, states: States, draft_vocab: Tensor | None) -> Teacher:
    """The teacher's view; only the rows of the draft vocabulary are multiplied where the normalizer is known.

    Raises:
        NumericsError: NaN or infinite logits.
    """
    weight = readout.lm_head_weight
    if draft_vocab is None:
        probabilities = torch.softmax(F.linear(states.final, weight), -1, dtype=torch.float32)
        require_finite(probabilities.amax(-1))
        mass = torch.ones(probabilities.shape[0], device=probabilities.device)
    else:
        normalizer = states.normalizer
        if normalizer is None:
            normalizer = log_normalizer(F.linear(states.final, weight))
        require_finite(normalizer)
        kept = F.linear(states.final, weight[draft_vocab]).float()
        mass = (kept.logsumexp(-1) - normalizer).exp().clamp(max=1.0)
        probabilities = torch.softmax(kept, -1)
    return Teacher(probabilities, mass, torch.xlogy(probabilities, probabilities).sum(-1))


class _Divergence(torch.autograd.Function):
    """Weighted KL(p || softmax(logits)); its gradient, (softmax(logits) - p) w, is made in the same pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Teacher, weight: Tensor) -> Tensor:
        log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
        cross = torch.einsum("pv,pv->p", teacher.probabilities, log_q)
        ctx.save_for_backward(log_q.exp_().sub_(teacher.probabilities).mul_(weight[:, None]).to(logits.dtype))
        return ((teacher.negative_entropy - cross) * weight).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


def distillation_losses(logits: list[Tensor], teacher: Teacher) -> list[Tensor]:
    """KL(backbone || head) in nats per head, averaged over positions (Hinton et al. 2015, at temperature 1).

    A position counts as much as the probability the backbone gives to the draft vocabulary: what no head can say
    should not be taught. The teacher's own entropy is subtracted, so that a perfect head has loss 0.

    Args:
        logits: one tensor [positions, draft vocab] per head.
    """
    weight = teacher.mass / max(teacher.mass.numel(), 1)
    return [_Divergence.apply(row, teacher, weight) for row in logits]
