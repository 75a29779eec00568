"""What calibration learns for drafting: how likely drafts survive, by drafter, on held-out text.

Lookup: how often the next token of a match of some length is the text's. EAGLE: P(agree | entropy) per draft
position, by a logistic fit, over roll-outs from every answer position. Both kinds of head: the temperature at which a
sampled draft survives most often. Kept in `eexit.json` under `drafting`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from early_exit_cli.calibration.held_out import TEMPERATURES, HeldOutSample, Rolled
from early_exit_cli.calibration.thresholds import fit_logistic
from early_exit_cli.data.documents import Document
from early_exit_cli.drafting.chances import DraftChances, Survival
from early_exit_cli.drafting.suffix_automaton import PRIOR, PRIOR_STRENGTH, SuffixAutomaton, kind_of_match

KEPT_ENTROPIES = 16


def fit_draft_chances(documents: Iterable[Document], first: HeldOutSample, second: HeldOutSample) -> DraftChances:
    """From the first text, its documents among it; the EAGLE head's are looked at on the second text too."""
    survival, checked = fit_eagle(first.rolled, second.rolled)
    return DraftChances(
        lookup=fit_lookup(documents),
        eagle=survival,
        checked=checked,
        exit_temperature=fit_temperature(first.overlaps.get("exit")),
        eagle_temperature=fit_temperature(first.overlaps.get("eagle")),
    )


def fit_lookup(documents: Iterable[Document]) -> list[float]:
    """How often a match's next token is right, in the answers of the documents; few cases lean on the prior."""
    right = [PRIOR_STRENGTH * chance for chance in PRIOR]
    seen = [PRIOR_STRENGTH] * len(PRIOR)
    for document in documents:
        automaton = SuffixAutomaton()
        automaton.extend(document.ids[: document.answer_start])
        for token in document.ids[document.answer_start :]:
            if automaton.match_length:
                kind = kind_of_match(automaton.match_length)
                seen[kind] += 1
                right[kind] += automaton.predict(1) == [token]
            automaton.extend([token])
    return [hits / count for hits, count in zip(right, seen, strict=True)]


def fit_eagle(first: list[Rolled], second: list[Rolled]) -> tuple[list[Survival], list[tuple[float, float]]]:
    """P(agree | entropy) per draft position from the first text's roll-outs, and what the second's say of it."""
    fitted = [fit_survival(entropies, agreed) for entropies, agreed in first]
    checked = [
        (float(agreed.double().mean()), sum(map(survival.at, entropies.tolist())) / agreed.numel())
        for survival, (entropies, agreed) in zip(fitted, second)  # noqa: B905 (a short text has no late positions)
    ]
    return fitted[: len(checked)], checked


def fit_temperature(overlaps: Tensor | None) -> float:
    """The temperature of a head's distribution at which a draft from it survives most often, over the text's own; 1 without
    such a head.

    Args:
        overlaps: [positions, TEMPERATURES].
    """
    return 1.0 if overlaps is None else TEMPERATURES[int(overlaps.mean(0).argmax())]


def fit_survival(entropies: Tensor, agreed: Tensor) -> Survival:
    """The logistic P(agree | entropy) of [samples] entropies (nats) and outcomes (bool)."""
    intercept, slope = fit_logistic(entropies, agreed, 1e-4)
    places = (torch.arange(KEPT_ENTROPIES) + 0.5) / KEPT_ENTROPIES
    kept = entropies.float().sort().values[(places * entropies.numel()).long()]
    return Survival(
        intercept=intercept,
        slope=slope,
        mean=float(agreed.double().mean()),
        entropies=tuple(round(value, 4) for value in kept.tolist()),
    )
