"""What a block with a state keeps of a text: gated delta nets, Mamba 2, short convolutions.

Such a block folds all tokens so far into one state, where attention keeps keys and values for each. Its memory obeys the
contract of the KV cache (`blocks`): a pass begins anywhere up to the last committed token, overwrites its rows, and what
lies behind is never read, so rolling back stays forgetting a number. For that it keeps

* the inputs of the recurrence and of the convolution in front of it, by position, of the last RING tokens;
* the states before the last chunks of CHUNK tokens, which begin at multiples of CHUNK.

A pass takes the state before the chunk that it begins in and runs that chunk from its first token on, always as a chunk
of CHUNK rows: those before the pass come from memory, those behind it are leftovers, which no earlier row sees. So a token
is always the same row of products of the same shapes, whatever pass it comes in, and its result has the same bits. A
state is kept when a pass has filled its chunk, and kept anew when that chunk is run again with other tokens.

The recurrence is the function that the library takes for prompts. Its modules call that, and the convolution, by a name in
their file: `use_block_states` puts in their place functions that do so for a memory of ours, and as before for all others.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.errors import UnsupportedBackboneError

CHUNK = 16
CHUNKS = 3
"""A pass begins at most 15 rows behind the last committed token and has at most 16 (`kv_cache.LARGEST_WIDTH`), so that
what is committed, and all that may still be taken back, lie in so many chunks."""
RING = CHUNK * CHUNKS
CONVOLUTION = "causal_conv1d_fn"
COLUMNS = "columns"
"""The input of the convolution."""
LONGEST_KERNEL = RING - 30
"""Of a convolution: a pass reads the inputs before it, which 30 rows may follow that are taken back."""


@dataclass(frozen=True)
class Scan:
    """How the library's function for a recurrence takes its arguments.

    rows: those with one row a token, [1, tokens, ...]. state: what it starts from. wants_state: whether to return its last.
    """

    rows: tuple[str, ...]
    state: str
    wants_state: str


SCANS = {
    "torch_chunk_gated_delta_rule": Scan(("query", "key", "value", "g", "beta"), "initial_state", "output_final_state"),
    "mamba2_chunk_scan": Scan(("hidden_states", "dt", "B", "C"), "initial_states", "return_final_states"),
}


class BlockState:
    """The memory of one block for one text. Shapes and dtypes follow from the first pass."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}
        """Name of an input -> [CHUNKS, CHUNK, ...], the row of position p at p modulo RING."""
        self.states: list[Tensor | None] = [None] * CHUNKS
        """The state before chunk c at c modulo CHUNKS; None: nothing was read yet."""

    @property
    def bytes(self) -> int:
        return sum(
            held.numel() * held.element_size() for held in (*self.rows.values(), *self.states) if held is not None
        )

    def kept_at(self, position: int) -> BlockState:
        """A copy to continue from `position`, where a chunk begins and a pass has just ended."""
        kept, chunk = BlockState(), position // CHUNK % CHUNKS
        if COLUMNS in self.rows:
            kept.rows[COLUMNS] = self.rows[COLUMNS].clone()
        kept.states[chunk] = self.states[chunk]  # it may be replaced, and never changes
        return kept

    def with_earlier(self, new: Tensor, position: int, earlier: int) -> Tensor:
        """[tokens, channels] at `position` -> the same behind the `earlier` rows before them; zeros before the text."""
        ring = self._ring(COLUMNS, new).flatten(0, 1)
        rows = torch.cat([*(ring[part] for part in _parts(position - earlier, position)), new])
        end, left = position + len(new), new[-RING:]
        for part in _parts(end - len(left), end):
            ring[part], left = left[: part.stop - part.start], left[part.stop - part.start :]
        return rows

    def scan(
        self, rows: dict[str, Tensor], position: int, run: Callable[[dict[str, Tensor], Tensor | None], Any]
    ) -> Tensor:
        """The recurrence over rows [1, tokens, ...] at `position`, a chunk at a time: outputs [1, tokens, ...].

        Args:
            run: the same over one chunk, from the state before it: (outputs, state after it).
        """
        end = position + next(iter(rows.values())).shape[1]
        outputs = []
        for chunk in range(position // CHUNK, -(-end // CHUNK)):
            first = chunk * CHUNK
            start, stop = max(position, first), min(end, first + CHUNK)
            whole = {}
            for name, new in rows.items():
                held = self._ring(name, new[0])[chunk % CHUNKS]
                held[start - first : stop - first] = new[0, start - position : stop - position]
                whole[name] = held[None]
            output, state = run(whole, self.states[chunk % CHUNKS] if chunk else None)
            if stop == first + CHUNK:
                self.states[(chunk + 1) % CHUNKS] = state
            outputs.append(output[:, start - first : stop - first])
        return torch.cat(outputs, 1)

    def _ring(self, name: str, like: Tensor) -> Tensor:
        """[CHUNKS, CHUNK, ...] of an input whose rows are `like` [tokens, ...]."""
        if name not in self.rows:
            self.rows[name] = like.new_zeros(CHUNKS, CHUNK, *like.shape[1:])
        return self.rows[name]


def _parts(start: int, stop: int) -> list[slice]:
    """Where positions `start` to `stop` - 1, RING at most, lie in a ring."""
    first, behind = start % RING, start % RING + stop - start - RING
    return [slice(first, min(first + stop - start, RING)), *([slice(0, behind)] if behind > 0 else [])]


@dataclass(frozen=True)
class StateAt:
    """What the library's modules get in the place of a state, and hand to a recurrence."""

    memory: BlockState
    position: int


@dataclass(frozen=True)
class Columns:
    """What they get in the place of a convolution's input, [earlier + tokens, channels]."""

    rows: Tensor


_replaced: set[tuple[str, str]] = set()
"""(file, name) of the library's functions that know our memory by now."""


def use_block_states(model: Any) -> None:
    """Have the blocks of a `transformers` model run over a memory of ours, where they are given one.

    Raises:
        UnsupportedBackboneError: it has such blocks, and this release of transformers computes them in another way.
    """
    for mixer in [module for module in model.modules() if hasattr(module, "conv_kernel_size")]:
        home = sys.modules[type(mixer).__module__]
        names = [name for name in SCANS if name in vars(home)]
        if CONVOLUTION not in vars(home) or not (names or type(mixer).__name__.endswith("ShortConv")):
            raise UnsupportedBackboneError(f"{type(mixer).__name__} of this transformers is not known here")
        if mixer.conv_kernel_size > LONGEST_KERNEL:
            raise UnsupportedBackboneError(f"a convolution over {mixer.conv_kernel_size} tokens is too long here")
        for name in [CONVOLUTION, *names]:
            if (home.__name__, name) not in _replaced:
                original = getattr(home, name)
                setattr(home, name, _scanning(original, SCANS[name]) if name in SCANS else _convolving(original))
                _replaced.add((home.__name__, name))


def _scanning(original: Callable[..., Any], scan: Scan) -> Callable[..., Any]:
    """The library's function for a recurrence, which continues from a memory of ours too: by its own code in PyTorch, also
    where packages with kernels for it are installed, whose arguments have other names."""
    signature, plain = inspect.signature(original), inspect.unwrap(original)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        at = given.pop(scan.state, None)
        if not isinstance(at, StateAt):
            return original(*args, **kwargs)
        rows = {name: given.pop(name) for name in scan.rows}
        given |= {"chunk_size": CHUNK, scan.wants_state: True}

        def run(chunk: dict[str, Tensor], state: Tensor | None) -> Any:
            return plain(**chunk, **given, **{scan.state: state})

        return at.memory.scan(rows, at.position, run), None

    return function


def _convolving(original: Callable[..., Any]) -> Callable[..., Any]:
    """The library's causal convolution, which takes `Columns` too.

    PyTorch's may order its sums by the number of tokens. Here each product and each sum is rounded by itself, in float32.
    """
    from transformers.activations import ACT2FN

    @functools.wraps(original)
    def function(hidden_states: Any, weight: Tensor, bias: Any = None, activation: Any = None, **kwargs: Any) -> Tensor:
        if not isinstance(hidden_states, Columns):
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        taps = weight.float().t()  # [kernel, channels]
        rows = hidden_states.rows.float()
        tokens = len(rows) - len(taps) + 1
        total = rows[:tokens] * taps[0]
        for number, tap in enumerate(taps[1:], 1):
            total = total + rows[number : number + tokens] * tap
        if bias is not None:
            total = total + bias.float()
        if activation is not None:
            total = ACT2FN[activation](total)
        return total.to(hidden_states.rows.dtype).t()[None]

    return function
