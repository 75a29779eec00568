"""Why acceptance is low: held-out text drafted and verified as decoding would, and what became of each token asked for.

Nothing is run here. The heads' readings along the text are enough: a head that is right drafts the very token the text
goes on with. Where the text departs from the backbone's choice (an answer that was sampled), the walk follows the text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.calibration.head_outputs import HeadOutputs
from early_exit_cli.calibration.thresholds import exits_in_order

REASONS = {
    "accepted": "drafted, and the backbone chose the same",
    "vocabulary": "the backbone's choice is not in the draft vocabulary: no head can say it",
    "head": "it is, but the head that exited said another token; or none exited, and none had it first",
    "threshold": "none exited, though a head had the backbone's choice first",
    "position": "behind a wrong token of the same draft, so thrown away whatever it was",
}


@dataclass(frozen=True)
class Acceptance:
    """What became of the tokens that the exit drafter was asked for at one level, every head read in order.

    tokens: of the text. rounds: drafts that covered it, empty ones included. asked: tokens asked for; the last one of a
    round is the one at which no head exited, unless the draft was full. drafted: those that a head exited at. counts:
    reason -> how many of the asked ones; they add up to `asked`.
    """

    level: float
    draft_length: int
    tokens: int
    rounds: int
    asked: int
    drafted: int
    counts: dict[str, int]

    def record(self) -> dict[str, Any]:
        """As JSON: with shares that add up to 1, and the two figures that decoding reports too."""
        return {
            "accuracy_level": self.level,
            "draft_length": self.draft_length,
            "tokens": self.tokens,
            "rounds": self.rounds,
            "asked": self.asked,
            "drafted": self.drafted,
            "acceptance_rate": self.counts["accepted"] / self.drafted if self.drafted else None,
            "accept_length": self.tokens / self.rounds,
            "shares": {reason: count / self.asked for reason, count in self.counts.items()},
        }


def explain_acceptance(
    head_outputs: HeadOutputs,
    thresholds: list[float],
    draft_vocab: Tensor | None,
    level: float,
    draft_length: int,
) -> Acceptance:
    """Walk through the positions round by round.

    A round asks for a token at each position from where the last round ended: until no head exits, `draft_length` tokens
    are drafted, or the answer ends (or is cut). What the backbone would not have chosen and all behind it is rejected;
    the next round begins after the backbone's own token, which stands at the first wrong or undrafted position.

    Args:
        head_outputs: in the order of the text, by the metric of the thresholds. thresholds: one a head. draft_vocab: token
            ids that heads may say, [draft vocab] int64; None for all.
    """
    drafted_at, verdicts = _verdicts(head_outputs, thresholds, draft_vocab)
    documents, places = head_outputs.documents, head_outputs.places
    goes_on = ((documents[1:] == documents[:-1]) & (places[1:] == places[:-1] + 1)).tolist()
    counts: Counter[str] = Counter()
    drafted = rounds = start = 0
    while start < len(verdicts):
        rounds += 1
        end = start  # behind the last token asked for
        wrong: int | None = None
        for place in range(start, min(start + draft_length, len(verdicts))):
            if place > start and not goes_on[place - 1]:
                break
            counts[verdicts[place] if wrong is None else "position"] += 1
            drafted += drafted_at[place]
            end = place + 1
            if not drafted_at[place]:
                break
            if wrong is None and verdicts[place] != "accepted":
                wrong = place
        if wrong is not None:
            start = wrong + 1
        elif drafted_at[end - 1] and end < len(verdicts) and goes_on[end - 1]:
            start = end + 1  # a full draft: the backbone's own token was never asked for
        else:
            start = end
    return Acceptance(
        level=level,
        draft_length=draft_length,
        tokens=len(verdicts),
        rounds=rounds,
        asked=counts.total(),
        drafted=drafted,
        counts={reason: counts[reason] for reason in REASONS},
    )


def _verdicts(
    head_outputs: HeadOutputs, thresholds: list[float], draft_vocab: Tensor | None
) -> tuple[list[bool], list[str]]:
    """Of each position asked for with nothing wrong before it: whether a head exits there, and what becomes of its token."""
    exits = exits_in_order(head_outputs.uncertainties, thresholds)
    choices = head_outputs.choices
    correct = head_outputs.tokens == choices
    in_vocabulary = torch.ones_like(choices, dtype=torch.bool)
    if draft_vocab is not None:
        in_vocabulary = torch.isin(choices, draft_vocab.cpu())
    is_drafted, is_right = exits.any(0).tolist(), (exits & correct).any(0).tolist()
    verdicts = [
        "accepted" if right else "vocabulary" if not known else "head" if drafted or not somewhere else "threshold"
        for right, known, drafted, somewhere in zip(
            is_right, in_vocabulary.tolist(), is_drafted, correct.any(0).tolist(), strict=True
        )
    ]
    return is_drafted, verdicts
