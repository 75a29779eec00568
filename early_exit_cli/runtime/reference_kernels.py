"""`Kernels` in PyTorch, in double precision: what each kernel must give but for rounding.

The kernels of a card are compared with these when a model loads, and a pass of them runs where there is no card.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.runtime.cuda_kernels import TILE, AttentionPlan, NF4Weight, Normed, Place, Step


def _rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the library rounds a norm."""
    return (x.double() * _rms(x, eps)).to(x.dtype).double() * weight.double()


def _multiplied(weight: NF4Weight, x: Tensor | Normed) -> Tensor:
    """[rows, outputs] float64, bias added."""
    if isinstance(x, Normed):
        mean = x.squares.double().sum(-1, keepdim=True) / weight.inputs
        product = x.scaled.double() @ weight.dense().double().T * torch.rsqrt(mean + x.eps)
    else:
        product = x.double() @ weight.dense().double().T
    return product if weight.bias is None else product + weight.bias.double()


class ReferenceKernels:
    """See the module's docstring. A place is known here by its KV cache, not by addresses."""

    def enter(self, place: Place, source: Tensor, by_token: bool, norm: Tensor, hidden: Tensor, out: Normed) -> Step:
        def step() -> None:
            tokens = place.numbers[place.FIELDS : place.FIELDS + len(hidden)]
            hidden.copy_(source[tokens] if by_token else source)
            out.scaled.copy_(hidden.double() * norm.double())
            out.squares.copy_(hidden.double().square().unflatten(-1, (-1, TILE)).sum(-1))

        return step

    def product(self, weight: NF4Weight, x: Tensor | Normed, out: Tensor) -> Step:
        return lambda: out.copy_(_multiplied(weight, x))

    def gated(self, weight: NF4Weight, x: Normed, out: Tensor) -> Step:
        def step() -> None:
            gate, up = _multiplied(weight, x).to(out.dtype).double().chunk(2, -1)
            out.copy_(F.silu(gate).to(out.dtype).double() * up)

        return step

    def added(self, weight: NF4Weight, x: Tensor, residual: Tensor, out: Tensor, norm: Tensor, normed: Normed) -> Step:
        def step() -> None:
            out.copy_(residual.double() + _multiplied(weight, x).to(out.dtype).double())
            normed.scaled.copy_(out.double() * norm.double())
            normed.squares.copy_(out.double().square().unflatten(-1, (-1, TILE)).sum(-1))

        return step

    def attention(self, place: Place, plan: AttentionPlan, qkv: Tensor, out: Tensor) -> Step:
        rows, heads, size = qkv.shape[0], plan.query_heads + plan.kv_heads, plan.head_dim

        def step() -> None:
            cache, position = place.cache, place.position
            here = slice(position, position + rows)
            ((cos, sin),) = cache.rotary.values()
            split = qkv.view(rows, heads + plan.kv_heads, size)
            qk = split[:, :heads].double()
            if plan.qk_norm is not None:
                qk = _normed(split[:, :heads], plan.qk_norm, plan.eps).to(qkv.dtype).double()
            qk = qk * cos[here].double() + qk.roll(size // 2, -1) * sin[here].double()
            keys, values = (
                held if isinstance(held, Tensor) else held[plan.block] for held in (cache.keys, cache.values)
            )
            keys[:, here] = qk[:, plan.query_heads :].to(qkv.dtype).transpose(0, 1)
            values[:, here] = split[:, heads:].transpose(0, 1)
            row = torch.arange(position, position + rows, device=qkv.device)[:, None]
            key = torch.arange(position + rows, device=qkv.device)
            hidden = key > row
            if plan.window:
                hidden |= key <= row - plan.window
            group = plan.query_heads // plan.kv_heads
            all_keys, all_values = (
                held[:, : position + rows].double().repeat_interleave(group, 0) for held in (keys, values)
            )
            queries = qk[:, : plan.query_heads].to(qkv.dtype).double().transpose(0, 1)
            scores = (queries @ all_keys.transpose(1, 2) * plan.scale).masked_fill(hidden, float("-inf"))
            out.copy_((scores.softmax(-1) @ all_values).transpose(0, 1).reshape(rows, -1))

        return step

    def norm(
        self, hidden: Tensor, weight: Tensor | None, eps: float, out: Tensor, last_of: Place | None = None
    ) -> Step:
        def step() -> None:
            last = slice(None) if last_of is None else slice(last_of.rows - 1, last_of.rows)
            out.copy_(hidden[last] if weight is None else _normed(hidden[last], weight, eps))

        return step

    def logits(self, weight: Tensor, x: Tensor, out: Tensor) -> Step:
        return lambda: out.copy_(x.double() @ weight.double().T)

    def choose(
        self, weight: Tensor, x: Tensor, token: Tensor, value: Tensor, entropy: Tensor | None, vocab: Tensor | None
    ) -> list[Step]:
        def step() -> None:
            logits = (x.double() @ weight.double().T).to(x.dtype)
            best = logits.amax(-1)
            column = (logits == best[:, None]).int().argmax(-1)
            column[~torch.isfinite(best)] = 0
            token.copy_(torch.where(torch.isfinite(best), column if vocab is None else vocab[column], -1))
            value.copy_(best)
            if entropy is not None:
                log_p = logits.double().log_softmax(-1)
                entropy.copy_(-(log_p.exp() * log_p).sum(-1))

        return [step]

    def fuse(self, states: Tensor, norms: Tensor, eps: float, out: Tensor) -> Step:
        def step() -> None:
            parts = [_normed(x, norm, eps) for x, norm in zip(states, norms, strict=False)]
            out.copy_(torch.cat([*parts, *states[len(norms) :].double()], -1))

        return step

    def join(
        self,
        place: Place,
        embedding: Tensor,
        hidden: Tensor,
        norms: tuple[Tensor, Tensor],
        eps: float,
        token: Tensor | None,
        out: Tensor,
    ) -> Step:
        def step() -> None:
            tokens = token if token is not None else place.numbers[place.FIELDS : place.FIELDS + len(hidden)]
            input_norm, hidden_norm = norms
            joined = (_normed(embedding[tokens], input_norm, eps), _normed(hidden, hidden_norm, eps))
            out.copy_(torch.cat(joined, -1))

        return step
