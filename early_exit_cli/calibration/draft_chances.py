"""What calibration learns for drafting: how likely drafts survive, by drafter, on held-out text.

Lookup: how often the next token of a match of some length is the text's. EAGLE: P(agree | entropy) per draft
position, by a logistic fit, over roll-outs from every answer position. Both kinds of head: the temperature at which a
sampled draft survives most often. Kept in `eexit.json` under `drafting`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from early_exit_cli.backbone.output import logits_of
from early_exit_cli.calibration.thresholds import fit_logistic
from early_exit_cli.data.documents import Document
from early_exit_cli.data.packing import Batch
from early_exit_cli.drafting.chances import Survival
from early_exit_cli.drafting.suffix_automaton import PRIOR, PRIOR_STRENGTH, SuffixAutomaton, kind_of_match
from early_exit_cli.engine import Engine
from early_exit_cli.heads.uncertainty import entropy
from early_exit_cli.hidden_states.live import run_states
from early_exit_cli.numerics import bfloat16_products, require_finite

STEPS = 7
"""Draft positions that are told apart."""
KEPT_ENTROPIES = 16
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
TEMPERATURE_BATCHES = 16
TEMPERATURE_STRIDE = 4
"""One position in so many is looked at for the temperature: each needs the backbone's whole distribution."""


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


def roll_out(
    engine: Engine, batches: Iterable[Batch], on_batch: Callable[[int], None] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """The EAGLE head from every answer position, the text's own tokens in between: it agreed so far.

    Returns:
        For each draft position that the text reaches, (entropies [samples] in nats, whether the backbone agreed).
    """
    head = engine.eagle
    if head is None:
        return []
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(STEPS)]
    sequences = 0
    with torch.inference_mode():
        for batch in batches:
            states = run_states(engine.backbone, batch, head.exit_layers)
            best, choices = engine.backbone.lm_head(states.final).max(-1)
            require_finite(best)
            with bfloat16_products(engine.backbone.device, engine.backbone.dtype):
                predictions = head(states, STEPS, only_measured=True)
            for step, said in enumerate(predictions):
                agreed = head.token_ids(said.logits.argmax(-1)) == choices[said.positions]
                found[step].append((entropy(said.logits).cpu(), agreed.cpu()))
            sequences += batch.input_ids.shape[0]
            if on_batch:
                on_batch(sequences)
    joined = [tuple(torch.cat(part) for part in zip(*parts, strict=True)) for parts in found if parts]
    return [(entropies, agreed) for entropies, agreed in joined if agreed.numel()]


def fit_eagle(
    first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]
) -> tuple[list[Survival], list[tuple[float, float]]]:
    """P(agree | entropy) per draft position from the first text's roll-outs, and what the second's say of it."""
    fitted = [fit_survival(entropies, agreed) for entropies, agreed in first]
    checked = [
        (float(agreed.double().mean()), sum(map(survival.at, entropies.tolist())) / agreed.numel())
        for survival, (entropies, agreed) in zip(fitted, second)  # noqa: B905 (a short text has no late positions)
    ]
    return fitted[: len(checked)], checked


def fit_temperatures(engine: Engine, batches: Iterable[Batch]) -> tuple[float, float]:
    """For exit heads and for the EAGLE head: the temperature of its distribution q at which a draft from it survives
    most often, where the text is sampled at temperature 1. By the overlap of both, sum of min(p, q) over the tokens
    (Leviathan et al. 2023, section 3.2); 1 without such a head.
    """
    overlaps: dict[str, list[Tensor]] = {"exit": [], "eagle": []}
    heads, eagle = engine.heads, engine.eagle
    with torch.inference_mode():
        for batch in itertools.islice(batches, TEMPERATURE_BATCHES):
            if heads is not None:
                states = run_states(engine.backbone, batch, heads.exit_layers)
                places = states.measured.nonzero()[::TEMPERATURE_STRIDE, 0]
                expected = logits_of(engine.backbone, states.final[places])
                overlaps["exit"] += [overlap(expected, said, heads.draft_vocab) for said in heads(states, places)]
            if eagle is not None:
                states = run_states(engine.backbone, batch, eagle.exit_layers)
                with bfloat16_products(engine.backbone.device, engine.backbone.dtype):
                    first = eagle(states, 1, only_measured=True)[0]
                expected = logits_of(engine.backbone, states.final[first.positions[::TEMPERATURE_STRIDE]])
                logits = first.logits[::TEMPERATURE_STRIDE]
                overlaps["eagle"].append(overlap(expected, logits, eagle.draft_vocab))
    best = {
        kind: TEMPERATURES[int(torch.cat(found).mean(0).argmax())] if found else 1.0 for kind, found in overlaps.items()
    }
    return best["exit"], best["eagle"]


def overlap(backbone: Tensor, head: Tensor, draft_vocab: Tensor | None) -> Tensor:
    """Logits [positions, vocab] and [positions, draft vocab] -> sum of min(p, q), [positions, TEMPERATURES]."""
    log_p = backbone.float().log_softmax(-1)
    p = (log_p if draft_vocab is None else log_p[:, draft_vocab]).exp()
    return torch.stack(
        [torch.minimum(p, (head.float() / temperature).softmax(-1)).sum(-1) for temperature in TEMPERATURES], -1
    )


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
