"""Drafting with the lookahead head: roll forward while another token is worth its time.

Drafts may be approximate, so the head's products run in int8 where the device has them (docs/decisions/0010). How far a
draft goes is decided token by token: calibration has measured, for each draft position, how probable it is at what
entropy that the backbone will say the same, given that it agreed so far; the pass and step costs of this device are
measured; the draft of the highest expected tokens per millisecond is proposed, and none where plain decoding has it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.blocks import LARGEST_WIDTH, KVCache
from early_exit_cli.drafters import Draft, Drafter, Step, share_of_pass
from early_exit_cli.engine import Engine
from early_exit_cli.gating import entropy
from early_exit_cli.lm_head import int8_rows
from early_exit_cli.lookahead import LookaheadHead, rotary
from early_exit_cli.sampling import GREEDY, Chooser

LinearMap = Callable[[Tensor], Tensor]

STRENGTH = 4.0
"""Drafted tokens that the calibrated probabilities count for against what this text has shown."""
NEED = 1.03
"""A draft must be expected to beat plain decoding by this factor."""
FORGETTING = 0.97
"""What is left of the text's own evidence after a round without a draft, so that drafting is tried again."""
GROWTH = 512


@dataclass(frozen=True)
class Survival:
    """P(the backbone agrees | entropy H, it agreed so far) = sigmoid(intercept + slope H) at one draft position.

    mean: the same without knowing the entropy.
    """

    intercept: float
    slope: float
    mean: float

    def at(self, uncertainty: float) -> float:
        return 1 / (1 + math.exp(min(-(self.intercept + self.slope * uncertainty), 700.0)))


def draft_linear(weights: list[Tensor]) -> LinearMap:
    """x [rows, in] -> [rows, sum of out]: for a few rows on the CPU in int8 with a scale a row, else the weights as they are."""
    weight = torch.cat(weights)
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not hasattr(torch, "_weight_int8pack_mm"):
        return lambda x: F.linear(x, weight)
    quantized, scales = int8_rows(weight.float())
    return lambda x: (
        torch._weight_int8pack_mm(x, quantized, scales) if x.shape[0] <= LARGEST_WIDTH else F.linear(x, weight)
    )


class LookaheadRunner:
    """The head over one text: a KV cache of its own, true states first, its own steps behind them until they are verified."""

    def __init__(self, head: LookaheadHead) -> None:
        block, attention = head.block, head.block.self_attn
        self.head = head
        self.query_heads, self.kv_heads, self.head_dim = (
            attention.query_heads,
            attention.kv_heads,
            attention.head_dim,
        )
        self.fc = draft_linear([head.fc.weight])
        self.qkv = draft_linear([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        self.output = draft_linear([attention.o_proj.weight])
        self.gate_up = draft_linear([block.mlp.gate_proj.weight, block.mlp.up_proj.weight])
        self.down = draft_linear([block.mlp.down_proj.weight])
        self.lm_head = draft_linear([head.lm_head_weight])
        self.inner = block.mlp.down_proj.in_features
        self.length = 0
        """Positions whose true states were read."""
        self.keys = self.values = self.cos = self.sin = torch.empty(0)

    def reset(self) -> None:
        """Begin another text."""
        self.length = 0

    def another(self) -> LookaheadRunner:
        """The same weights over another text."""
        other = copy.copy(self)
        other.keys = other.values = torch.empty(0)
        other.reset()
        return other

    def _reserve(self, length: int) -> None:
        if self.keys.numel() and length <= self.keys.shape[1]:
            return
        capacity = -(-length // GROWTH) * GROWTH
        weight = self.head.fc.weight
        kept = self.length
        grown = [weight.new_zeros(self.kv_heads, capacity, self.head_dim) for _ in range(2)]
        if kept:
            grown[0][:, :kept], grown[1][:, :kept] = self.keys[:, :kept], self.values[:, :kept]
        self.keys, self.values = grown
        positions = torch.arange(capacity, device=weight.device)
        cos, sin = rotary(positions, self.head_dim, self.head.rope_theta)
        half = self.head_dim // 2
        sin = torch.cat((-sin[:, :half], sin[:, half:]), -1)  # carries the sign of the turned half
        self.cos, self.sin = cos.to(weight.dtype)[:, None], sin.to(weight.dtype)[:, None]  # [capacity, 1, head_dim]

    def read(self, tokens: Tensor, states: list[Tensor]) -> Tensor:
        """Take in verified positions -> the state [1, hidden] that says the token after the last of `tokens`.

        Args:
            tokens: [rows] int64, the token that follows each position.
            states: after the exit layers and the final normed one, [rows, hidden] each.
        """
        hidden = self._block(tokens, self.fc(self.head.normed(states)), self.length)
        self.length += tokens.numel()
        return hidden[-1:]

    def step(self, token: Tensor, hidden: Tensor, ahead: int) -> Tensor:
        """Roll forward from its own state: [1] int64, [1, hidden], the steps before this one + 1 -> [1, hidden]."""
        return self._block(token, hidden, self.length + ahead - 1)

    def _block(self, tokens: Tensor, hidden: Tensor, position: int) -> Tensor:
        head, block, rows = self.head, self.head.block, tokens.numel()
        end = position + rows
        self._reserve(end)
        joined = torch.cat(
            (block.input_layernorm(F.embedding(tokens, head.embedding_weight)), block.hidden_norm(hidden)), -1
        )
        heads = self.query_heads + self.kv_heads
        qkv = self.qkv(joined).view(rows, heads + self.kv_heads, self.head_dim)
        qk = qkv[:, :heads]
        qk = qk * self.cos[position:end] + qk.roll(self.head_dim // 2, -1) * self.sin[position:end]
        self.keys[:, position:end] = qk[:, self.query_heads :].transpose(0, 1)
        self.values[:, position:end] = qkv[:, heads:].transpose(0, 1)
        group = self.query_heads // self.kv_heads
        # Rows (token, query head) of one key head side by side: [kv_heads, rows * group, head_dim]
        query = qk[:, : self.query_heads].reshape(rows, self.kv_heads, group, self.head_dim).transpose(0, 1)
        mask = None
        if rows > 1:
            seen = torch.arange(end, device=tokens.device) <= torch.arange(position, end, device=tokens.device)[:, None]
            mask = seen.repeat_interleave(group, 0)
        attended = F.scaled_dot_product_attention(
            query.reshape(1, self.kv_heads, rows * group, self.head_dim),
            self.keys[None, :, :end],
            self.values[None, :, :end],
            attn_mask=mask,
        )
        attended = attended.view(self.kv_heads, rows, -1).transpose(0, 1).reshape(rows, -1)
        hidden = hidden + self.output(attended)
        gate_up = self.gate_up(block.post_attention_layernorm(hidden))
        hidden = hidden + self.down(block.mlp.activation(gate_up[:, : self.inner]) * gate_up[:, self.inner :])
        return head.norm(hidden)

    def choose(
        self, hidden: Tensor, chooser: Chooser = GREEDY, drafted: Sequence[int] = (), temperature: float = 1.0
    ) -> tuple[int, float]:
        """[1, hidden] -> its token (`Chooser.draft`), and its entropy (nats)."""
        logits = self.lm_head(hidden)
        token = chooser.draft(logits, self.head.draft_vocab, list(drafted), temperature)
        return token, float(entropy(logits))


class LookaheadDrafter(Drafter):
    """Proposes what the lookahead head says, as far as it pays.

    Args:
        survival: by draft position; the last one stands for all later ones.
        pass_cost: rows -> milliseconds of a pass of the backbone over so many rows.
        read_cost: milliseconds until the first token is known. step_cost: of each further one.
        temperature: of the head's distribution, where tokens are sampled.
    """

    name = "lookahead"

    def __init__(
        self,
        head: LookaheadHead,
        survival: list[Survival],
        pass_cost: Callable[[int], float],
        read_cost: float,
        step_cost: float,
        temperature: float = 1.0,
    ) -> None:
        self.runner = LookaheadRunner(head)
        self.exit_layers = head.exit_layers
        self.survival, self.pass_cost = survival, pass_cost
        self.read_cost, self.step_cost = read_cost, step_cost
        self.temperature = temperature
        self.waiting: list[tuple[list[int], list[Tensor]]] = []
        self.hits = self.expected = 0.0

    def begin(self, prompt_ids: list[int], chooser: Chooser = GREEDY) -> None:
        self.chooser = chooser
        self.runner.reset()
        self.waiting = []
        self.hits = self.expected = 0.0

    def another(self) -> Drafter:
        other = copy.copy(self)
        other.runner = self.runner.another()
        return other

    def see(self, tokens: list[int], states: list[Tensor]) -> None:
        self.waiting.append((tokens, states))

    def expected_rate(self, limit: int) -> float:
        """Tokens per millisecond that a draft promises before its first token is known; 0 where none can be made."""
        if limit < 1 or not self.waiting:
            return 0.0
        return self._best_stop([], 0, limit)[1]

    def propose(self, model: Engine, cache: KVCache, pending: int, limit: int, stop_ids: Container[int]) -> Draft:
        if limit < 1 or not self.waiting or self._best_stop([], 0, limit)[0] == 0:
            self.hits, self.expected = self.hits * FORGETTING, self.expected * FORGETTING
            return Draft()
        device = model.backbone.device
        hidden = self.runner.read(
            torch.tensor([token for tokens, _ in self.waiting for token in tokens], device=device),
            [torch.cat(parts) for parts in zip(*(states for _, states in self.waiting), strict=True)],
        )
        self.waiting = []
        tokens: list[int] = []
        reasons: list[Step] = []
        while True:
            token, uncertainty = self.runner.choose(hidden, self.chooser, tokens, self.temperature)
            tokens.append(token)
            reasons.append(Step(len(tokens), uncertainty, self._chance(len(tokens) - 1, uncertainty)))
            best, _ = self._best_stop([reason.chance for reason in reasons], len(tokens), limit)
            if best <= len(tokens) or token in stop_ids:
                best = min(best, len(tokens))
                return Draft(tokens=tokens[:best], reasons=list(reasons[:best]))
            hidden = self.runner.step(torch.tensor([token], device=device), hidden, len(tokens))

    def observe(self, draft: Draft, tokens: list[int], accepted: int) -> None:
        for reason in draft.reasons[: accepted + 1]:
            if isinstance(reason, Step):
                self.expected += reason.chance
        if draft.reasons and isinstance(draft.reasons[0], Step):
            self.hits += accepted

    def _at(self, place: int) -> Survival:
        return self.survival[min(place, len(self.survival) - 1)]

    def _chance(self, place: int, uncertainty: float | None = None) -> float:
        """The calibrated probability at a draft position, moved by how the calibration has fared on this text."""
        survival = self._at(place)
        calibrated = survival.mean if uncertainty is None else survival.at(uncertainty)
        return min(calibrated * (self.hits + STRENGTH) / (self.expected + STRENGTH), 0.995)

    def _draft_cost(self, steps: int) -> float:
        """Milliseconds of drafting so many tokens."""
        return self.read_cost + (steps - 1) * self.step_cost if steps else 0.0

    def _best_stop(self, chances: list[float], made: int, limit: int) -> tuple[int, float]:
        """The draft length of the highest expected tokens per millisecond from here on, and that rate.

        Args:
            chances: of the tokens drafted already; later ones count with their position's mean.
            made: draft steps that are spent already.
        """
        plain = share_of_pass(self.pass_cost, 1, self.company)
        best, best_rate = 0, NEED / (plain + self._draft_cost(made))
        expected = survives = 1.0
        for count in range(1, limit + 1):
            survives *= chances[count - 1] if count <= len(chances) else self._chance(count - 1)
            expected += survives
            verifying = share_of_pass(self.pass_cost, count + 1, self.company)
            rate = expected / (verifying + self._draft_cost(max(made, count)))
            if rate > best_rate:
                best, best_rate = count, rate
        return best, best_rate
