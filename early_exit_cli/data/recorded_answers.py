"""Answering many prompts together on a GPU: hundreds of rows, decoding steps recorded, only ends of texts read back.

Memory stands still: keys and values for so many rows, and the texts as token ids [rows, capacity]. A step reads the
token at `position` of each row, runs the blocks, and writes the next token behind it, chosen or sampled on the device.
Running a step twice does what running it once does, so a recorder may run it to warm up. The host counts `position`
forward, draws the noise of a sampled step before it, and looks for end tokens now and then: rows that have ended are
dropped when the others fit into the next smaller size.

A recording is bound to the number of rows and of keys that it reads. Both come in few sizes, so that recordings serve
again, and short texts do not pay for long buffers.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from early_exit_cli.runtime.cuda_graphs import CudaRecorder, Recorder, Step
from early_exit_cli.runtime.fused_blocks import FusedBlocks
from early_exit_cli.runtime.llama_block import LlamaBlock
from early_exit_cli.runtime.padded import PaddedRows, dense_bytes, dense_layers

MOST_ROWS = 1024
CAPACITY_STEP = 256
KEYS_STEP = 128
"""Tokens of the buffers, and of what a step reads of them, in whole steps."""
LOOK_EVERY = 16
"""Steps between two looks at what has ended: each waits for the device."""
PIECE_TOKENS = 8192
MASK_ELEMENTS = 2**27
"""A pass over prompts has at most so many tokens, and a mask of at most so many elements."""
MOST_RECORDINGS = 64
GPU_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Kernels that take a mask as they find it; cuDNN's are planned anew for each shape, and prompts have many."""


class RecordedAnswers:
    """Answers prompts together, with the memory and the recordings of earlier calls.

    Args:
        record: by default CUDA graphs on a GPU; elsewhere, and for 8-bit weights, steps run as they are.

    Attributes:
        failure: why recording failed, after which steps run as they are.
    """

    def __init__(self, blocks: FusedBlocks, record: Recorder | None = None) -> None:
        backbone = blocks.backbone
        self.blocks = blocks
        self.failure: str | None = None
        is_recorded = backbone.device.type == "cuda" and backbone.quantization != "8bit"
        self.record = record or (CudaRecorder(backbone.device) if is_recorded else _as_it_is)
        self.ends = torch.tensor(sorted(backbone.eos_token_ids), dtype=torch.int64, device=backbone.device)
        with torch.inference_mode():
            fits = dense_bytes(blocks) <= free_bytes(backbone.device) / 2
            self.layers = dense_layers(blocks) if fits else blocks.layers
        self.memory: _Memory | None = None
        self.recordings: OrderedDict[tuple[int, int, bool], tuple[Step, Step]] = OrderedDict()

    def __call__(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[list[int]]:
        """As `answers.answer_together`, in as many parts as the memory asks for."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers: list[list[int]] = [[] for _ in prompts]
        is_gpu = self.blocks.backbone.device.type == "cuda"
        with torch.inference_mode(), sdpa_kernel(GPU_ATTENTION) if is_gpu else contextlib.nullcontext():
            most = self._rows_at_once(len(prompts), _whole(len(prompts[order[-1]]) + max_new_tokens, CAPACITY_STEP))
            parts = -(-len(prompts) // most)
            size = -(-len(prompts) // parts)
            for start in range(0, len(prompts), size):
                chosen = order[start : start + size]
                found = self._answer([prompts[index] for index in chosen], max_new_tokens, temperature, generator)
                for index, answer in zip(chosen, found, strict=True):
                    answers[index] = answer
        return answers

    def _rows_at_once(self, wanted: int, capacity: int) -> int:
        """How many rows half of the free memory holds."""
        if self.memory is not None and self.memory.holds(rows_of(min(wanted, MOST_ROWS)), capacity):
            return min(wanted, MOST_ROWS)
        held = 0 if self.memory is None else self.memory.rows * _row_bytes(self.blocks, self.memory.capacity)
        budget = (free_bytes(self.blocks.backbone.device) + held) / 2
        return _most_rows(min(MOST_ROWS, budget / _row_bytes(self.blocks, capacity)))

    def _room(self, rows: int, capacity: int) -> _Memory:
        """Memory for so many rows: that of the last call, or new one, where recordings begin anew."""
        if self.memory is None or not self.memory.holds(rows, capacity):
            self.recordings.clear()
            self.memory = None
            self.memory = _Memory(self.blocks, self.layers, rows, capacity)
        return self.memory

    def _answer(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float | None,
        generator: torch.Generator | None,
    ) -> list[list[int]]:
        """Answers to prompts in ascending order of length, as many as there is room for."""
        longest = len(prompts[-1])
        memory = self._room(rows_of(len(prompts)), _whole(longest + max_new_tokens, CAPACITY_STEP))
        is_sampled = temperature is not None
        batch = memory.first(rows_of(len(prompts)), is_sampled)
        memory.temperature.fill_(temperature or 1.0)
        memory.fill(batch, prompts)
        batch.draw(generator)
        states = self._read(batch, [len(prompt) for prompt in prompts])
        batch.text[: len(prompts), longest] = batch.choose(states, len(prompts))
        memory.position.fill_(longest)
        answers: list[list[int]] = [[] for _ in prompts]
        owners = list(range(len(prompts)))  # the prompt that each row answers
        for made in range(1, max_new_tokens):
            if made % LOOK_EVERY == 0:
                has_ended = torch.isin(batch.text[: len(owners), longest : longest + made], self.ends).any(1).tolist()
                going = [row for row, ended in enumerate(has_ended) if not ended]
                if not going:
                    break
                if rows_of(len(going)) < len(batch.text):
                    self._collect(batch, longest, made, owners, answers)
                    batch.keep(going, longest + made, memory)
                    batch = memory.first(rows_of(len(going)), is_sampled)
                    owners = [owners[row] for row in going]
            batch.draw(generator)
            self._step(batch, longest + made, is_sampled)()
            memory.position.add_(1)
        else:
            made = max_new_tokens
        self._collect(batch, longest, made, owners, answers)
        return answers

    def _read(self, batch: _Batch, lengths: list[int]) -> Tensor:
        """Prompts of ascending lengths in passes of many tokens; the last token's states, [prompts, hidden].

        Rows of like length are read together, from where the longest of them begins.
        """
        group = self.blocks.query_heads // self.blocks.kv_heads
        longest = lengths[-1]
        tokens = max(1, min(self._piece_tokens(), MASK_ELEMENTS // (group * longest)))
        states = []
        first = 0
        while first < len(lengths):
            last = first + 1
            while last < len(lengths) and (last + 1 - first) * lengths[last] <= tokens:
                last += 1
            rows = batch.rows.part(slice(first, last))
            for place in range(longest - lengths[last - 1], longest, tokens):
                found = rows.run(batch.text[first:last, place : min(place + tokens, longest)], place)
            states.append(found)
            first = last
        return torch.cat(states)

    def _piece_tokens(self) -> int:
        """Tokens of a pass whose widest states are to fit into a quarter of the free memory."""
        a_token = 6 * max(layer.layout.inner for layer in self.layers) * self.blocks.backbone.dtype.itemsize
        return int(min(PIECE_TOKENS, max(256, free_bytes(self.blocks.backbone.device) / 4 / a_token)))

    def _step(self, batch: _Batch, end: int, is_sampled: bool) -> Step:
        """What writes the next token of each row: a recording where there is one, or can be."""
        keys = min(_whole(end, KEYS_STEP), batch.rows.keys[0].shape[2])
        key = (len(batch.text), keys, is_sampled)
        if key not in self.recordings:
            step = partial(batch.advance, keys)
            try:
                self.recordings[key] = step, self.record(step)
            except RuntimeError as error:  # out of memory, or an operation that cannot be captured
                self.failure = " ".join(str(error).split())[:200]
                self.record = _as_it_is
                self.recordings.clear()
                self.recordings[key] = step, step
            if len(self.recordings) > MOST_RECORDINGS:
                self.recordings.popitem(last=False)
        self.recordings.move_to_end(key)
        return self.recordings[key][1]  # the step itself is kept beside it: it holds the memory

    def _collect(self, batch: _Batch, longest: int, made: int, owners: list[int], answers: list[list[int]]) -> None:
        """The first `made` tokens of each row's answer, up to and with an end token."""
        ends = self.blocks.backbone.eos_token_ids
        for owner, tokens in zip(owners, batch.text[: len(owners), longest : longest + made].tolist(), strict=True):
            stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
            answers[owner] = tokens[:stop]


class _Memory:
    """Buffers for up to `rows` texts of up to `capacity` tokens, which do not move; a batch is on the first of them.

    text: [rows, capacity] int64. position: [1] int64, the token that a step reads. temperature: [] float32.
    """

    def __init__(self, blocks: FusedBlocks, layers: list[LlamaBlock], rows: int, capacity: int) -> None:
        device = blocks.backbone.device
        starts = torch.zeros(rows, dtype=torch.int64, device=device)
        self.all = PaddedRows.allocate(blocks, layers, starts, capacity)
        self.text = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.temperature = torch.ones((), device=device)
        self.noise: Tensor | None = None

    @property
    def rows(self) -> int:
        return int(self.text.shape[0])

    @property
    def capacity(self) -> int:
        return int(self.text.shape[1])

    def holds(self, rows: int, capacity: int) -> bool:
        return rows <= self.rows and capacity <= self.capacity

    def first(self, rows: int, is_sampled: bool) -> _Batch:
        """A batch of `rows` on the first rows of the buffers."""
        if is_sampled and self.noise is None:
            self.noise = torch.ones(self.rows, self.all.blocks.backbone.vocab_size, device=self.text.device)
        noise = self.noise[:rows] if self.noise is not None and is_sampled else None
        return _Batch(self.all.part(slice(rows)), self.text[:rows], self.position, self.temperature, noise)

    def fill(self, batch: _Batch, prompts: list[list[int]]) -> None:
        """The prompts, padded on the left. Zeros elsewhere: masks hide an earlier text's numbers, but not a NaN."""
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        starts = [longest - len(prompt) for prompt in prompts]
        starts += [longest] * (len(batch.text) - len(prompts))  # rows without a prompt see what they write
        batch.text.zero_()
        batch.text[: len(prompts), :longest] = torch.tensor(rows, device=batch.text.device)
        batch.rows.starts.copy_(torch.tensor(starts))
        for buffer in (*batch.rows.keys, *batch.rows.values):
            buffer.zero_()


class _Batch:
    """The rows in work, and what a step reads and writes: see `_Memory`. noise: [rows, vocab] float32, or greedy."""

    def __init__(
        self, rows: PaddedRows, text: Tensor, position: Tensor, temperature: Tensor, noise: Tensor | None
    ) -> None:
        self.rows = rows
        self.text = text
        self.position = position
        self.temperature = temperature
        self.noise = noise

    def advance(self, keys: int) -> None:
        """One more token for each row, reading the first `keys` of the buffers."""
        states = self.rows.run_at(self.text.index_select(1, self.position), self.position, keys)
        self.text.index_copy_(1, self.position + 1, self.choose(states, len(self.text))[:, None])

    def draw(self, generator: torch.Generator | None) -> None:
        """Noise for the next choice."""
        if self.noise is not None:
            self.noise.exponential_(generator=generator)

    def choose(self, states: Tensor, count: int) -> Tensor:
        """The next token of the first `count` rows after the last block's states [count, hidden].

        Sampled ones by the Gumbel trick: -log of an exponential variable is one of Gumbel's, and the token with the
        largest logit / temperature + noise is a draw from the distribution (Maddison et al. 2014).
        """
        blocks = self.rows.blocks
        logits = blocks.logits(blocks.final_norm(states))
        if self.noise is None:
            return logits.argmax(-1)
        return logits.float().div_(self.temperature).sub_(self.noise[:count].log()).argmax(-1)

    def keep(self, rows: list[int], tokens: int, memory: _Memory) -> None:
        """Move `rows` to the front of the buffers, `tokens` of each; what lies behind them is padding from now on."""
        kept = torch.tensor(rows, device=self.text.device)
        for buffer in (*memory.all.keys, *memory.all.values):
            buffer[: len(rows), :, :tokens] = buffer[kept, :, :tokens]
        for small in (memory.text, memory.all.starts):
            small[: len(rows)] = small[kept]


def free_bytes(device: torch.device) -> float:
    """Memory that may be allocated there; without limit on a CPU, where nothing is sized by it."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def rows_of(count: int) -> int:
    """The size of batch that holds `count` rows: powers of two, and the numbers half way between."""
    power = max(8, 1 << (count - 1).bit_length())
    return power * 3 // 4 if count <= power * 3 // 4 else power


def _most_rows(limit: float) -> int:
    """The largest size of batch within `limit`, or the smallest there is."""
    sizes = (rows_of(count) for count in range(MOST_ROWS, 0, -1))
    return next((size for size in sizes if size <= limit), rows_of(1))


def _row_bytes(blocks: FusedBlocks, capacity: int) -> int:
    """Memory of a row: keys and values, its logits in the compute dtype and thrice in float32 when sampled."""
    backbone = blocks.backbone
    a_token = 2 * blocks.num_blocks * blocks.kv_heads * blocks.head_dim * backbone.dtype.itemsize
    return a_token * capacity + (backbone.dtype.itemsize + 12) * backbone.vocab_size


def _whole(count: int, step: int) -> int:
    return -(-count // step) * step


def _as_it_is(step: Step) -> Step:
    return step
