"""What a GPU's pass is made of: kernels of `cuda/` as calls on tensors, each prepared once and run again and again.

`Kernels` says what each does; `CudaKernels` launches them, `reference_kernels.ReferenceKernels` is the same in PyTorch,
for the comparison at load and for machines without a card.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from early_exit_cli.runtime import cuda_code
from early_exit_cli.runtime.blocks import LARGEST_WIDTH
from early_exit_cli.runtime.nf4_linear import SCALED_TOGETHER

Step = Callable[[], object]
TILE = 16
"""Rows of a weight that are multiplied together."""
HEAD_SIZES = (64, 128)
"""Dimensions of a head that attention.cu is compiled for."""
SEGMENT, PAIRS = 256, 16
"""Keys of a text, and pairs of a row and a query head, that a block of threads attends to and for, see attention.cu."""
THREADS = 256
TOKENS = 8
"""Rows that a product takes at the price of one."""
MOST_SEGMENTS_AT_ONCE = 16
MOST_KEPT = 4 * SCALED_TOGETHER
"""Inputs of a product that a warp keeps in registers, see product.cu."""


@dataclass(frozen=True)
class NF4Weight:
    """packed: [out, in / 2] uint8, first value in the high nibble. scale: [out, in / 64] float32. bias: [out]."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    outputs: int
    inputs: int

    def dense(self) -> Tensor:
        """[out, in] float32, what the numbers stand for."""
        code = NF4_VALUES.to(self.packed.device)
        packed = self.packed.view(self.outputs, -1)
        values = code[torch.stack((packed >> 4, packed & 15), -1).long()].view(self.outputs, -1, SCALED_TOGETHER)
        return (values * self.scale.view(self.outputs, -1, 1)).view(self.outputs, self.inputs)


NF4_VALUES = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
"""Dettmers et al. 2023, appendix E."""


@dataclass(frozen=True)
class Normed:
    """States times a norm's weight, and what is left to do of the norm: each row's sum of squares, in parts.

    scaled: [rows, size]. squares: [rows, parts] float32.
    """

    scaled: Tensor
    squares: Tensor
    eps: float


@dataclass(frozen=True)
class AttentionPlan:
    """Of one block: which one, its heads, window (0: none), and the weights of the norm on queries and keys, if any."""

    block: int
    query_heads: int
    kv_heads: int
    head_dim: int
    window: int
    scale: float
    qk_norm: Tensor | None
    eps: float


class Place:
    """Where a pass stands, on the device: position, KV cache and tokens of a text (`Place` in common.cuh).

    cos, sin: the rotary tables, [limit, 1, head_dim].
    """

    FIELDS = 8

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        self.position, self.rows = 0, 0
        self.cache: Any = None

    def set(self, cache: Any, position: int, rows: int, tokens: Sequence[int] = ()) -> list[int]:
        """Stand there from now on -> the numbers that say so, for the device."""
        self.cache, self.position, self.rows = cache, position, rows
        addresses, padding = cache.addresses, [0] * (LARGEST_WIDTH - len(tokens))
        return [position, rows, *addresses[:2], cache.capacity, *addresses[2:], *tokens, *padding]


class Places:
    """Some places, told to the device in one copy that waits for nothing.

    A copy reads its host memory when the device gets to it: so there are SLOTS of it in turns, and one is written again
    only when its copy is over.
    """

    SLOTS = 16

    def __init__(self, count: int, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        shape = (count, Place.FIELDS + LARGEST_WIDTH)
        self.numbers = torch.zeros(shape, dtype=torch.int64, device=device)
        self.of = [Place(row) for row in self.numbers.unbind()]
        self.slots = torch.zeros(self.SLOTS, *shape, dtype=torch.int64, pin_memory=self.is_gpu).unbind()
        self.written = [slot.numpy() for slot in self.slots]
        self.copied = [torch.cuda.Event() for _ in self.slots] if self.is_gpu else []
        self.turn = 0

    def tell(self, words: list[list[int]]) -> None:
        """What `Place.set` gave, for the first so many places."""
        self.turn = (self.turn + 1) % self.SLOTS
        if self.is_gpu:
            self.copied[self.turn].synchronize()
        count = len(words)
        self.written[self.turn][:count] = words
        self.numbers[:count].copy_(self.slots[self.turn][:count], non_blocking=True)
        if self.is_gpu:
            self.copied[self.turn].record()


class Kernels(Protocol):
    """Each gives back a call that runs it on the tensors named here; sizes are fixed, contents are not."""

    def enter(self, place: Place, source: Tensor, by_token: bool, norm: Tensor, hidden: Tensor, out: Normed) -> Step:
        """Rows [rows, size] into `hidden`, and scaled by `norm` with their sums of squares into `out`.

        Args:
            source: the embedding [vocab, size], or where not by_token the rows themselves.
        """

    def product(self, weight: NF4Weight, x: Tensor | Normed, out: Tensor) -> Step:
        """x [rows, in] times the weight -> out [rows, outputs]."""

    def gated(self, weight: NF4Weight, x: Normed, out: Tensor) -> Step:
        """silu of the first half of the outputs times the second half -> out [rows, outputs / 2]."""

    def added(self, weight: NF4Weight, x: Tensor, residual: Tensor, out: Tensor, norm: Tensor, normed: Normed) -> Step:
        """residual + product -> out [rows, outputs]; that scaled by `norm`, and its sums of squares, into `normed`."""

    def attention(self, place: Place, plan: AttentionPlan, qkv: Tensor, out: Tensor) -> Step:
        """qkv [rows, (query + 2 kv heads) * head_dim] at the place -> out [rows, query heads * head_dim]; keeps the
        rows' keys and values in the place's KV cache."""

    def norm(
        self, hidden: Tensor, weight: Tensor | None, eps: float, out: Tensor, last_of: Place | None = None
    ) -> Step:
        """[rows, size] -> out, normed where there is a weight. With last_of: only the place's last real row -> out [1, size]."""

    def logits(self, weight: Tensor, x: Tensor, out: Tensor) -> Step:
        """x [rows, in] times weight [vocab, in] -> out [rows, vocab]."""

    def choose(
        self, weight: Tensor, x: Tensor, token: Tensor, value: Tensor, entropy: Tensor | None, vocab: Tensor | None
    ) -> list[Step]:
        """The best column of x times weight into token [rows] int64 (of `vocab`, where the columns are not all tokens;
        -1 where it is not finite), its logit into value [rows] float32, and the entropy in nats [rows] float32."""

    def fuse(self, states: Tensor, norms: Tensor, eps: float, out: Tensor) -> Step:
        """states [parts, rows, size], the first of them normed by norms [some, size] -> out [rows, parts * size]."""

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
        """The tokens' embeddings beside the states [rows, size], each normed -> out [rows, 2 size]; the tokens are the
        place's, or `token` [1] for one row."""


def is_even(units: int, processors: int) -> bool:
    """Whether so many equal pieces of work fall evenly to the multiprocessors: a tenth of their time lost at most."""
    return units / (-(-units // processors) * processors) > 0.9


class CudaKernels:
    """`Kernels` on a card.

    Raises:
        cuda_code.NoCudaCode: they cannot be had there.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.code = cuda_code.cuda_code(index)
        self.device = device
        self.arrived = torch.zeros(4096, dtype=torch.int32, device=device)

    def _call(
        self,
        name: str,
        grid: tuple[int, ...],
        threads: int,
        kind: type[ctypes.Structure],
        *values: Tensor | float | None,
        shared: int = 0,
    ) -> Step:
        """A launch with the fields of `kind` in their order: tensors by address, kept alive as long as the call is."""
        if any(isinstance(value, Tensor) and not value.is_contiguous() for value in values):
            raise ValueError(f"{name} reads contiguous tensors only")
        fields = (value.data_ptr() if isinstance(value, Tensor) else value for value in values)
        return self.code.launch(name, grid, threads, kind(*fields), shared, values)

    def enter(self, place: Place, source: Tensor, by_token: bool, norm: Tensor, hidden: Tensor, out: Normed) -> Step:
        rows, size = hidden.shape
        tensors = (place.numbers, source, norm, hidden, out.scaled, out.squares)
        return self._call("enter_rows", (rows,), THREADS, cuda_code.Enter, *tensors, size, by_token)

    def product(self, weight: NF4Weight, x: Tensor | Normed, out: Tensor) -> Step:
        return self._product(weight, x, out, weight.outputs)

    def gated(self, weight: NF4Weight, x: Normed, out: Tensor) -> Step:
        return self._product(weight, x, out, weight.outputs // 2)

    def added(self, weight: NF4Weight, x: Tensor, residual: Tensor, out: Tensor, norm: Tensor, normed: Normed) -> Step:
        return self._product(weight, x, out, weight.outputs, (residual, norm, normed.scaled, normed.squares))

    def _product(
        self, weight: NF4Weight, x: Tensor | Normed, out: Tensor, outputs: int, added: tuple[Tensor, ...] = ()
    ) -> Step:
        if isinstance(x, Normed):
            scaled, squares, parts, eps = x.scaled, x.squares, x.squares.shape[1], x.eps
        else:
            scaled, squares, parts, eps = x, None, 0, 0.0
        rows, code, units = out.shape[0], self.code, outputs // TILE
        sets, columns = weight.outputs // outputs, 1 if rows <= TOKENS else 2
        is_short = weight.inputs <= code.warps * MOST_KEPT
        if sets == 1 and not is_short and units % 2 == 0 and is_even(units // 2, code.multiprocessors):
            sets, units = 2, units // 2
        return self._call(
            f"product_{'short' if is_short else 'long'}_{sets}_{columns}",
            (min(units, code.multiprocessors),),
            code.warps * 32,
            cuda_code.Product,
            *(weight.packed, weight.scale, weight.bias, scaled, squares, out),
            *(added or (None,) * 4),
            *(weight.inputs, outputs, rows, parts, outputs < weight.outputs, weight.inputs, eps),
            shared=code.product_bytes(sets, columns),
        )

    def attention(self, place: Place, plan: AttentionPlan, qkv: Tensor, out: Tensor) -> Step:
        rows = qkv.shape[0]
        blocks_of_pairs = -(-rows * plan.query_heads // plan.kv_heads // PAIRS)
        return self._call(
            f"attention_{plan.head_dim}",
            (MOST_SEGMENTS_AT_ONCE, plan.kv_heads, blocks_of_pairs),
            THREADS,
            cuda_code.Attention,
            *(place.numbers, qkv, plan.qk_norm, out, self.arrived),
            *(plan.block, rows, plan.query_heads, plan.kv_heads, plan.window, plan.scale, plan.eps),
            shared=THREADS // 32 * PAIRS * (plan.head_dim + 4) * 4,
        )

    def norm(
        self, hidden: Tensor, weight: Tensor | None, eps: float, out: Tensor, last_of: Place | None = None
    ) -> Step:
        numbers = None if last_of is None else last_of.numbers
        values = (numbers, hidden, weight, out, hidden.shape[1], last_of is not None, eps)
        return self._call("norm_rows", (out.shape[0],), THREADS, cuda_code.Norm, *values)

    def logits(self, weight: Tensor, x: Tensor, out: Tensor) -> Step:
        return self._lm_head(weight, x, out, None)

    def choose(
        self, weight: Tensor, x: Tensor, token: Tensor, value: Tensor, entropy: Tensor | None, vocab: Tensor | None
    ) -> list[Step]:
        rows, parts = x.shape[0], self._lm_head_grid(weight, x.shape[0])
        best = torch.empty(rows * parts, 5, device=self.device)
        pick = self._call("pick", (rows,), 32, cuda_code.Pick, best, vocab, token, value, entropy, parts)
        return [self._lm_head(weight, x, None, best), pick]

    def _lm_head_grid(self, weight: Tensor, rows: int) -> int:
        name = f"lm_head_{1 if rows <= TOKENS else 2}"
        return min(weight.shape[0] // TILE, self.code.resident(name, THREADS, 0) * self.code.multiprocessors)

    def _lm_head(self, weight: Tensor, x: Tensor, logits: Tensor | None, best: Tensor | None) -> Step:
        rows = x.shape[0]
        values = (weight, x, logits, best, weight.shape[1], weight.shape[0], rows)
        grid = (self._lm_head_grid(weight, rows),)
        return self._call(f"lm_head_{1 if rows <= TOKENS else 2}", grid, THREADS, cuda_code.LMHead, *values)

    def fuse(self, states: Tensor, norms: Tensor, eps: float, out: Tensor) -> Step:
        parts, rows, size = states.shape
        values = (states, norms, out, size, parts, len(norms), rows, eps)
        return self._call("fuse_states", (rows, parts), THREADS, cuda_code.Fuse, *values)

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
        rows, size = hidden.shape
        values = (place.numbers, embedding, hidden, *norms, token, out, size, eps)
        return self._call("join_token", (rows, 2), THREADS, cuda_code.Join, *values)


def recorder(device: torch.device) -> Callable[[Step], Step]:
    """Records a step that launches kernels as a CUDA graph, and gives back what replays it.

    `cuda_graphs.CudaRecorder` is for steps of the library's kernels, which want to be run before they are recorded;
    these need no more than to be launched.
    """
    stream = torch.cuda.Stream(device)

    def record(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()

        def replay(held: Step = step) -> None:  # its buffers, which a graph knows by address only
            graph.replay()

        return replay

    return record
