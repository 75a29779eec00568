"""The EAGLE head on an NVIDIA GPU: reading what was verified and all its steps as one CUDA graph, read back once.

Every step's token goes into the next one on the device. How far the chain goes is chosen before it runs; how much of it
is proposed, when its entropies are known. Drafts may be approximate, so the block's products are in NF4
(docs/decisions/0019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from early_exit_cli.heads.attention import HeadCache
from early_exit_cli.heads.eagle import Attention, EagleHead
from early_exit_cli.heads.eagle_runner import EagleRunner
from early_exit_cli.runtime import cuda_code
from early_exit_cli.runtime.blocks import LARGEST_WIDTH
from early_exit_cli.runtime.cuda_kernels import (
    HEAD_SIZES,
    PAIRS,
    SEGMENT,
    TILE,
    AttentionPlan,
    CudaKernels,
    Kernels,
    NF4Weight,
    Normed,
    Place,
    Places,
    Step,
    recorder,
)
from early_exit_cli.runtime.nf4_linear import SCALED_TOGETHER

MOST_STEPS = 8
SHORT_READ = 8 * LARGEST_WIDTH
"""Verified positions that are read in recorded passes; what comes before them, of a long prompt, in PyTorch."""
READ_WIDTHS = (8, LARGEST_WIDTH)
"""Rows that a chain reads; those that are not there are padding."""


class DeviceHeadCache(HeadCache):
    """`HeadCache` as kernels find it (`Place`)."""

    partial: Tensor

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    @property
    def addresses(self) -> list[int]:
        """Of keys, values, rotary tables, and room for attention over long texts."""
        return [tensor.data_ptr() for tensor in (self.keys, self.values, self.cos, self.sin, self.partial)]

    @property
    def rotary(self) -> dict[None, tuple[Tensor, Tensor]]:
        return {None: (self.cos, self.sin)}

    def moved(self) -> None:
        group = self.shape.query_heads // self.shape.kv_heads
        pairs = self.shape.kv_heads * -(-LARGEST_WIDTH * group // PAIRS) * PAIRS
        room = (self.capacity // SEGMENT + 2) * pairs * (self.shape.head_dim + 2)
        self.partial = torch.zeros(room, device=self.like.device)


class CudaEagle(EagleRunner):
    """`EagleRunner` that can run a whole chain of steps at once; without `chain`, as in PyTorch.

    Args:
        kernels: by default those of the head's card. record: makes of a step what repeats it.

    Raises:
        cuda_code.NoCudaCode: they cannot be had there.
    """

    cache_kind = DeviceHeadCache
    most_steps = MOST_STEPS

    def __init__(
        self, head: EagleHead, kernels: Kernels | None = None, record: Callable[[Step], Step] | None = None
    ) -> None:
        super().__init__(head)
        device = head.fc.weight.device
        self.kernels = kernels or CudaKernels(device)
        block, attention, shape = head.block, head.block.self_attn, head.block.self_attn.shape
        self.layout, self.eps = head.layout, head.layout.eps
        self.parts, self.state_size, self.size = head.parts, head.state_size, head.layout.hidden
        self.nf4 = [
            in_nf4(torch.cat(weights))
            for weights in (
                [head.fc.weight],
                [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight],
                [attention.o_proj.weight],
                [block.mlp.gate_proj.weight, block.mlp.up_proj.weight],
                [block.mlp.down_proj.weight],
            )
        ]
        self.plan = AttentionPlan(
            *(0, shape.query_heads, shape.kv_heads, shape.head_dim, 0, shape.head_dim**-0.5),
            *(qk_norm_of(attention), self.eps),
        )
        self.norms = self._new(len(head.fc_norm), self.state_size)
        for row, norm in zip(self.norms, head.fc_norm, strict=True):
            row.copy_(cast(Tensor, norm.weight).detach())
        self.vocab = None if head.draft_vocab is None else head.draft_vocab.long().contiguous()
        self.lm_head_rows = head.lm_head_weight.detach().contiguous()
        self.places = Places(MOST_STEPS, device)
        # what comes back, in one piece: tokens, then entropies
        self.results = torch.zeros(2 * MOST_STEPS, dtype=torch.int64, device=device)
        self.tokens, self.entropies = self.results[:MOST_STEPS], self.results[MOST_STEPS:].view(torch.float32)
        self.values = torch.zeros(MOST_STEPS, device=device)
        self.state, self.said = self._new(1, self.size), self._new(1, self.size)
        self.incoming = {width: self._new(self.parts, width, self.state_size) for width in READ_WIDTHS}
        record = record or recorder(device)
        self.chains: dict[tuple[int, int], Step] = {}
        for width in READ_WIDTHS:
            reading = self._reading(width)
            steps = list(reading)
            for count in range(1, MOST_STEPS + 1):
                if count > 1:
                    steps = steps + self._step(count - 1)
                self.chains[width, count] = record(lambda steps=steps: [step() for step in steps])  # type: ignore[misc]

    def _new(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.head.fc.weight.device)

    def _reading(self, width: int) -> list[Step]:
        """Rows that were verified, up to the first token and its entropy; their last state in `state`."""
        fused, hidden = self._new(width, self.parts * self.state_size), self._new(width, self.size)
        joint = self.head.input_norm
        return [
            self.kernels.fuse(self.incoming[width], self.norms, self.eps, fused),
            *([] if joint is None else [self.kernels.norm(fused, joint.weight.detach(), self.eps, fused)]),
            self.kernels.product(self.nf4[0], fused, hidden),
            *self._block_steps(self.places.of[0], hidden, None, 0),
        ]

    def _step(self, number: int) -> list[Step]:
        """A step of its own, from the state and the token of the one before."""
        return self._block_steps(self.places.of[number], self.state, self.tokens[number - 1 : number], number)

    def _block_steps(self, place: Place, hidden: Tensor, token: Tensor | None, number: int) -> list[Step]:
        """The block over rows that stand at `place`, and what its last row says.

        Args:
            hidden: [rows, hidden], fused states or the head's own. token: [1] int64 on the device, what follows the one row;
                None where the place names the tokens. number: of the step, in whose place token and entropy go.
        """
        head, kernels, width = self.head, self.kernels, hidden.shape[0]
        block, (_, qkv, output, gate_up, down) = head.block, self.nf4
        joined, projected = self._new(width, 2 * self.size), self._new(width, qkv.outputs)
        attended, gated = self._new(width, output.inputs), self._new(width, down.inputs)
        middle, last = self._new(width, self.size), self._new(width, self.size)
        squares = self._new(width, self.size // TILE, dtype=torch.float32)
        normed = Normed(self._new(width, self.size), squares, self.eps)
        one = slice(number, number + 1)
        input_norms = (block.input_layernorm.weight.detach(), block.hidden_norm.weight.detach())
        mlp_norm, last_norm = block.post_attention_layernorm.weight.detach(), head.norm.weight.detach()
        residual = self._new(width, self.size) if self.layout.norm_before_residual else hidden
        said = self.state if self.layout.norm_output else self.said
        return [
            kernels.join(place, head.embedding_weight, hidden, input_norms, self.eps, token, joined),
            *([] if residual is hidden else [kernels.norm(hidden, input_norms[1], self.eps, residual)]),
            kernels.product(qkv, joined, projected),
            kernels.attention(place, self.plan, projected, attended),
            kernels.added(output, attended, residual, middle, mlp_norm, normed),
            kernels.gated(gate_up, normed, gated),
            kernels.added(down, gated, middle, last, last_norm, normed),
            kernels.norm(last, last_norm, self.eps, said, last_of=place),
            *([] if said is self.state else [kernels.norm(last, None, self.eps, self.state, last_of=place)]),
            *kernels.choose(
                *(self.lm_head_rows, said, self.tokens[one], self.values[one], self.entropies[one]),
                self.vocab,
            ),
        ]

    def warm_up(self) -> None:
        """Let the library load what reading a prompt needs, and run a chain once, so that no answer waits for that."""
        rows = SHORT_READ + LARGEST_WIDTH
        states = [self._new(rows, self.state_size) for _ in range(len(self.head.exit_layers) + 1)]
        with torch.inference_mode():
            self.chain([0] * rows, states, 1)

    def chain(self, tokens: list[int], states: Sequence[Tensor], count: int) -> tuple[list[int], list[float]]:
        """Take in verified positions (`read`), and roll `count` steps forward, MOST_STEPS at most.

        Returns:
            The tokens, up to the first that is not finite, and their entropies (nats).
        """
        early = len(tokens) - SHORT_READ
        if early > 0:
            self.read(tokens[:early], [state[:early] for state in states])
            tokens, states = tokens[early:], [state[early:] for state in states]
        while len(tokens) > LARGEST_WIDTH:
            self._run(tokens[:LARGEST_WIDTH], [state[:LARGEST_WIDTH] for state in states], 1)
            tokens, states = tokens[LARGEST_WIDTH:], [state[LARGEST_WIDTH:] for state in states]
        self._run(tokens, states, count)
        found = self.results.cpu()  # the one time that a chain waits for the device
        said = found[:count].tolist()
        uncertain = found[MOST_STEPS:].view(torch.float32)[:count].tolist()
        end = next((place for place, token in enumerate(said) if token < 0), count)
        if end < count:  # what is not finite must not stay: it would come back as padding
            for rows_of_all in self.incoming.values():
                rows_of_all.zero_()
        return said[:end], uncertain[:end]

    def _run(self, tokens: list[int], states: Sequence[Tensor], count: int) -> None:
        """Read at most LARGEST_WIDTH verified positions, and say `count` tokens, on the device."""
        cache: Any = self.cache
        rows, position = len(tokens), cache.length
        width = next(width for width in READ_WIDTHS if width >= rows)
        cache.reserve(position + LARGEST_WIDTH + MOST_STEPS)
        for to, state in zip(self.incoming[width], states[: self.parts], strict=True):
            to[:rows].copy_(state)
        stands = [(position, rows, tokens), *((position + rows + ahead, 1, [0]) for ahead in range(MOST_STEPS - 1))]
        self.places.tell([place.set(cache, *stand) for place, stand in zip(self.places.of, stands, strict=True)])
        self.chains[width, count]()
        cache.length += rows


def qk_norm_of(attention: Attention) -> Tensor | None:
    """The norms of queries and keys, a row for each head: [query_heads + kv_heads, head_dim]; None where there are none."""
    if attention.q_norm is None or attention.k_norm is None:
        return None
    counts = (attention.shape.query_heads, attention.shape.kv_heads)
    norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach())
    return torch.cat([norm.expand(count, -1) for norm, count in zip(norms, counts, strict=True)])


def in_nf4(weight: Tensor) -> NF4Weight:
    """[out, in] -> the same in NF4."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=SCALED_TOGETHER, quant_type="nf4")
    outputs, inputs = weight.shape
    return NF4Weight(packed.view(outputs, -1), state.absmax.view(outputs, -1).contiguous(), None, outputs, inputs)


def cuda_eagle(head: EagleHead) -> CudaEagle | None:
    """The head in our kernels, where its card and its shape take them."""
    attention, mlp = head.block.self_attn, head.block.mlp
    widths = (attention.shape.query_width, attention.shape.kv_width)
    sizes = (head.state_size, head.layout.hidden, mlp.down_proj.in_features, *widths)
    if not head.suits_kernels or attention.shape.head_dim not in HEAD_SIZES:
        return None
    if any(size % SCALED_TOGETHER for size in sizes) or head.lm_head_weight.shape[0] % TILE:
        return None
    if head.on_device is None:  # kept with the head: making it records some graphs
        try:
            with torch.inference_mode(False):
                head.on_device = CudaEagle(head)
            head.on_device.fork().warm_up()
        except (cuda_code.NoCudaCode, RuntimeError):  # PyTorch steps one after another
            return None
    return cast(CudaEagle, head.on_device.fork())
