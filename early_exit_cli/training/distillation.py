"""What heads learn: the backbone's own distribution, over a draft vocabulary, by KL divergence and total variation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.backbone.output import BackboneView, logits_of
from early_exit_cli.hidden_states.states import States, log_normalizer
from early_exit_cli.numerics import require_finite

ROWS_AT_ONCE = 128
"""Positions of a loss that a CPU works on together: a few megabytes, which stay in its caches."""


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
    """What the backbone says of the positions that are learned.

    probabilities: [learned, draft vocab] float32, renormalised to the draft vocabulary. mass: [learned] float32, the
    probability it gives to that vocabulary. negative_entropy: [learned] float32, of `probabilities`, in nats. places:
    [positions] int64, the row of each position of the text, -1 where it is not learned.
    """

    probabilities: Tensor
    mass: Tensor
    negative_entropy: Tensor
    places: Tensor

    def at(self, positions: Tensor) -> Teacher:
        """Of some of the positions that are learned, which stand in a row then."""
        rows = self.places[positions]
        return Teacher(
            self.probabilities[rows],
            self.mass[rows],
            self.negative_entropy[rows],
            torch.arange(len(rows), device=rows.device),
        )


def teach(view: BackboneView, states: States, draft_vocab: Tensor | None, only_measured: bool = False) -> Teacher:
    """The teacher's view; only the rows of the draft vocabulary are multiplied where the normalizer is known.

    Args:
        only_measured: of the positions that a text's answer follows.

    Raises:
        NumericsError: NaN or infinite logits.
    """
    count = states.final.shape[0]
    learned = states.measured if only_measured else torch.ones_like(states.measured)
    places = torch.full((count,), -1, device=learned.device)
    places[learned] = torch.arange(int(learned.sum()), device=learned.device)
    final = states.final[learned]
    if draft_vocab is None:
        probabilities = torch.softmax(logits_of(view, final), -1, dtype=torch.float32)
        require_finite(probabilities.amax(-1))
        mass = torch.ones(probabilities.shape[0], device=probabilities.device)
    else:
        normalizer = states.normalizer
        normalizer = log_normalizer(logits_of(view, final)) if normalizer is None else normalizer[learned]
        require_finite(normalizer)
        kept = logits_of(view, final, draft_vocab).float()
        mass = (kept.logsumexp(-1) - normalizer).exp().clamp(max=1.0)
        probabilities = torch.softmax(kept, -1)
    return Teacher(probabilities, mass, torch.xlogy(probabilities, probabilities).sum(-1), places)


class _Divergence(torch.autograd.Function):
    """Weighted (1 - v) KL(p || q) + v TV(p, q) with q = softmax(logits); the gradient is made in the same pass.

    d KL / d logits = q - p. With s = sign(q - p) / 2, TV = sum s (q - p), and d TV / d logits = q (s - sum q s).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Teacher, weight: Tensor, variation: float) -> Tensor:
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        at_once = ROWS_AT_ONCE if logits.device.type == "cpu" else max(len(logits), 1)
        for start in range(0, len(logits), at_once):
            rows = slice(start, start + at_once)
            probabilities, share = teacher.probabilities[rows], weight[rows]
            log_q = torch.log_softmax(logits[rows], -1, dtype=torch.float32)
            loss = teacher.negative_entropy[rows] - torch.einsum("pv,pv->p", probabilities, log_q)
            q = log_q.exp_()
            difference = q - probabilities
            if variation:
                half_sign = difference.sign().mul_(0.5)
                distance = torch.einsum("pv,pv->p", half_sign, difference)
                loss = (1 - variation) * loss + variation * distance
                mean = torch.einsum("pv,pv->p", half_sign, q)
                turned = half_sign.sub_(mean[:, None]).mul_(q).mul_(variation)
                difference.mul_(1 - variation).add_(turned)
            gradient[rows] = difference.mul_(share[:, None])
            total += (loss * share).sum()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None, None


def distillation_loss(logits: Tensor, teacher: Teacher, variation: float = 0.0) -> Tensor:
    """(1 - variation) KL(backbone || head) + variation TV(backbone, head), averaged over positions (Hinton et al. 2015).

    KL in nats at temperature 1; the total variation is one minus the probability that a sampled draft is accepted
    (Leviathan et al. 2023). A position counts as much as the probability the backbone gives to the draft vocabulary:
    what no head can say should not be taught. The teacher's own entropy is subtracted: a perfect head has loss 0.

    Args:
        logits: [positions, draft vocab].
    """
    weight = teacher.mass / max(teacher.mass.numel(), 1)
    return _Divergence.apply(logits, teacher, weight, variation)
