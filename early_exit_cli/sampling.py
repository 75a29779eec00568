"""How the next token follows from the backbone's logits: the best one, or one sampled with noise of its place.

Sampling is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the argmax of log p + G, with independent standard
Gumbel noise G for every token of the vocabulary, is distributed as p. The noise is drawn from the seed, a row for each
new token in order. A drafter takes the argmax of its own log q and the same noise, and verification compares, as in
greedy decoding: with one seed every drafter gives the very tokens of plain sampling. docs/decisions/0013 says why this
and not min(1, p/q), and what it costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from early_exit_cli.config import SamplingConfig

Processors = Callable[[Tensor, Tensor], Tensor]
"""(token ids so far [1, length], scores [1, vocab] float32) -> scores [1, vocab]: transformers' LogitsProcessor."""
LIKELY = 1024
"""Tokens among which a nucleus is looked for before the whole vocabulary is sorted."""


class Chooser(ABC):
    """Turns what the backbone, or a head, says into tokens."""

    reads_logits: ClassVar[bool] = True
    """Whether it needs the backbone's logits, or its best token alone, which is had faster."""

    def begin(self, vocab_size: int, prompt_ids: list[int]) -> None:  # noqa: B027 (a greedy choice needs nothing else)
        """A new text starts with these tokens; the backbone will give so many logits."""

    def commit(self, tokens: list[int]) -> None:  # noqa: B027
        """These tokens were appended to the text."""

    @abstractmethod
    def choose(self, said: Tensor, drafted: list[int]) -> list[int]:
        """The text's next token after the pending one and after each of the drafted ones, from what the backbone says.

        Args:
            said: of the pending token and the drafted ones, a row each: the best token [rows] int64, or, if
                `reads_logits`, logits [rows, vocab].

        Returns:
            A choice for each row, at least up to the first that is not the drafted one.
        """

    @abstractmethod
    def draft(self, logits: Tensor, token_ids: Tensor | None, drafted: list[int], temperature: float = 1.0) -> int:
        """What a head with these logits proposes.

        Args:
            logits: [1, draft vocab].
            token_ids: [draft vocab] int64, the token of each; None when they are the vocabulary's.
            drafted: tokens drafted already, after the committed ones.
            temperature: of the head's distribution, times the text's.
        """


class Greedy(Chooser):
    """The best token."""

    reads_logits = False

    def choose(self, said: Tensor, drafted: list[int]) -> list[int]:
        return said.tolist()

    def draft(self, logits: Tensor, token_ids: Tensor | None, drafted: list[int], temperature: float = 1.0) -> int:
        return _token(int(logits.argmax(-1)), token_ids)


class Sampler(Chooser):
    """Tokens sampled from the processed distribution; greedy at temperature 0.

    Args:
        processors: applied to the backbone's scores instead of the settings' own; drafts keep to the settings.
        bias: added to the scores of these tokens before anything else, those of drafts too.
    """

    def __init__(
        self, settings: SamplingConfig, processors: Processors | None = None, bias: Mapping[int, float] | None = None
    ) -> None:
        self.settings = settings
        self.processors = processors
        self.bias = bias
        self.added: Tensor | None = None
        """`bias` for each token of the vocabulary."""
        self.generator = torch.Generator()
        self.text: list[int] = []
        self.noise: list[Tensor] = []
        """Gumbel noise [vocab] of the places after the committed text that were looked at."""
        self.vocab_size = 0
        self.held = torch.empty(0, dtype=torch.bool)
        """Which tokens of the vocabulary the text holds, [vocab]."""

    def begin(self, vocab_size: int, prompt_ids: list[int]) -> None:
        self.vocab_size = vocab_size
        self.generator.manual_seed(self.settings.seed)
        self.text = list(prompt_ids)
        self.noise = []
        self.held = torch.zeros(vocab_size, dtype=torch.bool)
        self.held = self._held_with(prompt_ids)
        if self.bias:
            self.added = torch.zeros(vocab_size)
            self.added[[*self.bias]] = torch.tensor([*self.bias.values()])

    def commit(self, tokens: list[int]) -> None:
        self.text += tokens
        self.held = self._held_with(tokens)
        self.noise = self.noise[len(tokens) :]

    def _held_with(self, tokens: list[int]) -> Tensor:
        """`held` after further tokens, of which some may stand for no logit."""
        known = [token for token in tokens if 0 <= token < self.vocab_size]
        return self.held.index_fill(0, torch.tensor(known, dtype=torch.int64), True)

    def choose(self, said: Tensor, drafted: list[int]) -> list[int]:
        choices: list[int] = []
        for row, logits in enumerate(said.float()):
            before = drafted[:row]
            if self.processors is None:
                choices.append(self._pick(logits, None, before, self.settings.temperature))
            else:
                scores = self.processors(torch.tensor([self.text + before], device=said.device), logits[None])[0]
                choices.append(self._draw(scores, torch.arange(scores.numel(), device=scores.device), row))
            if choices[-1:] != drafted[row : row + 1]:
                break
        return choices

    def draft(self, logits: Tensor, token_ids: Tensor | None, drafted: list[int], temperature: float = 1.0) -> int:
        return self._pick(logits[0].float(), token_ids, drafted, self.settings.temperature * temperature)

    def _pick(self, scores: Tensor, token_ids: Tensor | None, before: list[int], temperature: float) -> int:
        """The choice from scores [n] of `token_ids`, after `before`, itself after the committed text."""
        settings = self.settings
        if token_ids is None:
            token_ids = torch.arange(scores.numel(), device=scores.device)
        if self.added is not None:
            scores = scores + self.added.to(scores.device)[token_ids]
        if settings.repetition_penalty != 1.0:
            repeated = self._held_with(before).to(scores.device)[token_ids]
            scores = penalized(scores, repeated, settings.repetition_penalty)
        if temperature:
            scores, kept = truncated(scores / temperature, settings)
            token_ids = token_ids if kept is None else token_ids[kept]
        return self._draw(scores, token_ids, len(before))

    def _draw(self, scores: Tensor, token_ids: Tensor, ahead: int) -> int:
        """argmax of scores [n] and the noise of a place, `ahead` tokens after the committed text."""
        if self.settings.temperature:
            scores = scores + self._noise(ahead).to(scores.device)[token_ids]
        return int(token_ids[scores.argmax()])

    def _noise(self, ahead: int) -> Tensor:
        while len(self.noise) <= ahead:
            self.noise.append(-torch.empty(self.vocab_size).exponential_(generator=self.generator).log_())
        return self.noise[ahead]


def penalized(scores: Tensor, repeated: Tensor, penalty: float) -> Tensor:
    """Scores [n] over the penalty, times it where negative, of those tokens that are repeated, [n] bool (Keskar et al. 2019)."""
    return torch.where(repeated, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def truncated(scores: Tensor, settings: SamplingConfig) -> tuple[Tensor, Tensor | None]:
    """What top-k, then the nucleus of top-p, then min-p leave of scores [n]: (scores [kept], their places; None: all).

    The same tokens as transformers' warpers keep, in that order; where scores tie at an edge, top-k keeps all of them. Something
    is always left, of scores that are NaN too, as a head's may be.
    """
    kept: Tensor | None = None

    def keep(places: Tensor) -> None:
        nonlocal scores, kept
        scores, kept = scores[places], places if kept is None else kept[places]

    if 0 < settings.top_k < scores.numel():
        keep((~(scores < scores.topk(settings.top_k).values[-1])).nonzero()[:, 0])
    if settings.top_p < 1:
        keep(nucleus(scores, settings.top_p))
    if settings.min_p:
        keep((~(scores < scores.max() + torch.tensor(settings.min_p).log())).nonzero()[:, 0])
    return scores, kept


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Places of the fewest best of scores [n] that hold a probability of top_p together (Holtzman et al. 2020)."""
    total = scores.logsumexp(0)
    for count in (min(LIKELY, scores.numel()), scores.numel()):
        best = scores.topk(count)
        before = (best.values - total).exp().cumsum(0).roll(1)
        before[0] = 0.0
        if before[-1] >= top_p or count == scores.numel():
            break
    return best.indices[before < top_p]


def _token(place: int, token_ids: Tensor | None) -> int:
    return place if token_ids is None else int(token_ids[place])


GREEDY = Greedy()


def make_chooser(settings: SamplingConfig, bias: Mapping[int, float] | None = None) -> Chooser:
    """Greedy decoding keeps its fast argmax.

    Args:
        bias: token -> what is added to its score.
    """
    return GREEDY if settings.is_greedy and not bias else Sampler(settings, bias=bias)
