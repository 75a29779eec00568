"""The block runner for NVIDIA GPUs: passes of our own kernels, each width recorded once as one CUDA graph.

Nothing in a recording is a text's own: where it stands, its KV cache and its tokens are read from device memory, so
that one recording serves all texts. The order of every sum depends on shapes alone (`cuda/`), hence the same bits at
every width, in any neighbours and any buffer. Prompts, which are wider than a pass, go through PyTorch
(`fused_blocks`), always cut the same way.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.runtime import cuda_code
from early_exit_cli.runtime.blocks import KEY_STEP, LARGEST_WIDTH
from early_exit_cli.runtime.cuda_kernels import (
    HEAD_SIZES,
    PAIRS,
    SEGMENT,
    AttentionPlan,
    CudaKernels,
    Kernels,
    NF4Weight,
    Place,
    Places,
    Step,
    recorder,
)
from early_exit_cli.runtime.device_pass import BlockWeights, Buffers, block_steps
from early_exit_cli.runtime.fused_blocks import FusedBlocks, why_no_code, why_not_nf4
from early_exit_cli.runtime.kv_cache import KVCache, Part, Rotary
from early_exit_cli.runtime.llama_block import Norm
from early_exit_cli.runtime.nf4_linear import SCALED_TOGETHER, MergedNF4, is_plain_nf4
from early_exit_cli.runtime.reference_kernels import ReferenceKernels

PREFILL_ROWS = 2048
SHORT_PROMPT = 128
"""Tokens up to which passes of 16 rows read a prompt sooner than unpacking the weights (an H100, 8B: 23 ms)."""
TOLERANCE = 0.01
"""Of a kernel against double precision, ||ours - theirs|| / ||theirs||: bfloat16 rounds at 0.002, up to three times."""


class CudaBlocks(FusedBlocks):
    """`FusedBlocks` whose decoding passes, final norm, logits and choices are our own kernels', with bits of their own.

    Args:
        kernels: by default those of the backbone's card.
        record: makes of a step what repeats it, by default a CUDA graph.
        is_recorded: whether passes are recorded at all.

    Raises:
        UnsupportedBackboneError: not this backbone, or not on this machine; the message says why.
    """

    candidate_widths = (1, 2, 4, 6, 8, 12, LARGEST_WIDTH)

    def __init__(
        self,
        backbone: Backbone,
        kernels: Kernels | None = None,
        record: Callable[[Step], Step] | None = None,
        *,
        is_recorded: bool = True,
    ) -> None:
        reason = why_not_ours(backbone)
        if reason is None and kernels is None:
            try:
                kernels = CudaKernels(backbone.device)
                record = recorder(backbone.device) if is_recorded else (lambda step: step)
            except cuda_code.NoCudaCode as error:
                reason = str(error)
        if reason is not None or kernels is None or record is None:
            raise UnsupportedBackboneError(f"{backbone.name}: no kernels of our own: {reason}", hint="--runner auto")
        super().__init__(backbone)
        self.kernels, self.record = kernels, record
        self.weights = [self._weights(index) for index in range(self.num_blocks)]
        self.last_norm = backbone.final_norm.weight.detach()
        self.places_of: dict[int, Places] = {}
        self.place = self._places(1).of[0]
        self.buffers: dict[int, Buffers] = {}
        self.passes: dict[tuple[int, ...], Step] = {}
        self.finishes: dict[int, tuple[Step, Tensor, Tensor, Tensor]] = {}
        self.tables: Rotary = {}
        self.partial = torch.zeros(0, device=backbone.device)

    @property
    def name(self) -> str:
        return f"{super().name} {cuda_code.code_key()[:8]}"

    def _weights(self, index: int) -> BlockWeights:
        layer = self.layers[index]
        qkv, output, gate_up, down = (
            nf4_weight(cast(MergedNF4, product)) for product in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        plan = AttentionPlan(
            *(index, self.query_heads, self.kv_heads, self.head_dim, self.windows[index] or 0, self.scale),
            *(None if layer.qk_norm is None else layer.qk_norm.weight.detach().contiguous(), self.eps),
        )
        input_norm, mlp_norm = (cast(Norm, norm).weight.detach() for norm in (layer.input_norm, layer.mlp_norm))
        return BlockWeights(input_norm, qkv, plan, output, mlp_norm, gate_up, down)

    def prepare(self) -> None:
        """Record every width of the whole backbone, and let the library load what long prompts need.

        Nothing of that falls into an answer then.
        """
        started = time.perf_counter()
        for width in self.widths:
            self._pass(width, 0, self.num_blocks, by_token=True)
            self._pass(width, 0, self.num_blocks, by_token=False)
            self._finish(width)
        with torch.inference_mode():
            tokens, room = [0] * (SHORT_PROMPT + 1), self.new_cache(SHORT_PROMPT + LARGEST_WIDTH)
            self.final_norm(self.run_through(self.embed_tokens(tokens), room, 0, [self.num_blocks])[0])
        self.recording_seconds += time.perf_counter() - started

    def prepare_parts(self, stops: Sequence[int]) -> None:
        """Record the parts between them, each once: early exits run one part, verification the rest."""
        started = time.perf_counter()
        for first, last in itertools.combinations([0, *stops, self.num_blocks], 2):
            for width in self.widths:
                self._pass(width, first, last, by_token=False)
        self.recording_seconds += time.perf_counter() - started

    def check(self) -> str | None:
        """What is wrong with a kernel on this card, against double precision on the first block's real weights."""
        device = self.backbone.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.backbone.embedding.num_embeddings, (LARGEST_WIDTH,), generator=generator).tolist()
        found = []
        for kernels in (self.kernels, ReferenceKernels()):
            cache = self.new_cache(SEGMENT + LARGEST_WIDTH)
            place, size = self.place, self.backbone.hidden_size
            buffers = Buffers(LARGEST_WIDTH, self.weights[:1], size, self.eps, device)
            for position in range(0, SEGMENT + 1, LARGEST_WIDTH):  # over two segments
                self._stand(cache, position, LARGEST_WIDTH, ids)
                for step in self._steps(kernels, place, buffers, 0, 1, by_token=True):
                    step()
            token = torch.zeros(LARGEST_WIDTH, dtype=torch.int64, device=device)
            value, normed = torch.zeros(LARGEST_WIDTH, device=device), torch.empty_like(buffers.middle)
            for step in self._finish_steps(kernels, buffers.hidden[1], normed, token, value):
                step()
            found.append(
                (buffers.qkv, buffers.attended, buffers.middle, buffers.gated, buffers.hidden[1], normed, value)
            )
        names = (
            "q, k and v",
            "attention",
            "the output product",
            "gate and up",
            "down",
            "the final norm",
            "the LM head",
        )
        for name, ours, theirs in zip(names, *found, strict=True):
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
            if not error < TOLERANCE:
                return f"the kernel of {name} is off by {float(error):.2g} on this card"
        return None

    def prompt_pieces(self, length: int) -> Iterator[slice]:
        """Short prompts in recorded passes, long ones in large pieces, of which each unpacks the weights once."""
        rows = LARGEST_WIDTH if length <= SHORT_PROMPT else PREFILL_ROWS
        for start in range(0, length, rows):
            yield slice(start, min(start + rows, length))

    def shared_positions(self, prefilled: int, same: int, length: int) -> int:
        """Of prompts that recorded passes read all positions, decoded ones too: these give a token the same bits anywhere."""
        if self.is_invariant and max(prefilled, length) <= SHORT_PROMPT:
            return same
        return super().shared_positions(prefilled, same, length)

    def new_cache(self, limit: int) -> KVCache:
        """One allocation for all blocks: a pass finds them from the first one's address. Whole steps of keys, so that how many a
        prefill's piece reads does not depend on the request, and texts that are kept fit into each other's."""
        limit = -(-limit // KEY_STEP) * KEY_STEP
        device, dtype = self.backbone.device, self.backbone.dtype
        with torch.inference_mode(False):
            shape = (2, self.num_blocks, self.kv_heads, limit, self.head_dim)
            keys, values = torch.zeros(shape, dtype=dtype, device=device)
            group = self.query_heads // self.kv_heads
            segments = -(-limit // SEGMENT) + 1
            room = segments * self.kv_heads * -(-LARGEST_WIDTH * group // PAIRS) * PAIRS * (self.head_dim + 2)
            if self.partial.numel() < room:
                self.partial = torch.zeros(room, device=device)
        cache = KVCache(list(keys.unbind()), list(values.unbind()), self.rotary_tables(limit), limit)
        cache.addresses = Addresses(cache, self.partial)
        return cache

    def rotary_tables(self, limit: int) -> Rotary:
        """Shared by all texts; they only grow."""
        known = next(iter(self.tables.values()))[0].shape[0] if self.tables else 0
        if known < limit:
            with torch.inference_mode(False):
                tables = super().rotary_tables(1 << (limit - 1).bit_length())
                self.tables = {kind: (cos.contiguous(), sin.contiguous()) for kind, (cos, sin) in tables.items()}
        return {kind: (cos[:limit], sin[:limit]) for kind, (cos, sin) in self.tables.items()}

    def grows(self, limit: int) -> bool:
        """Never: only the keys that a row needs are read, however large the buffer is."""
        return False

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        if hidden.shape[0] > LARGEST_WIDTH:
            return super().run(hidden, cache, position, first, last)
        return self.run_through(hidden, cache, position, [last], first)[0]

    def run_through(
        self, hidden: Tensor, cache: KVCache, position: int, stops: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        width = hidden.shape[0]
        if width > LARGEST_WIDTH:
            return super().run_through(hidden, cache, position, stops, first)
        self._stand(cache, position, width)
        replay = self._pass(width, first, stops[-1], by_token=False)
        self.buffers[width].incoming.copy_(hidden)
        replay()
        return [self.buffers[width].hidden[stop].clone() for stop in stops]

    def run_tokens(self, tokens: list[int], cache: KVCache, position: int, stops: Sequence[int]) -> list[Tensor]:
        width = len(tokens)
        if width > LARGEST_WIDTH or stops[-1] != self.num_blocks:
            return super().run_tokens(tokens, cache, position, stops)
        if min(tokens) < 0 or max(tokens) >= self.backbone.embedding.num_embeddings:
            raise IndexError(
                f"tokens {min(tokens)} to {max(tokens)}, of which {self.backbone.embedding.num_embeddings} are embedded"
            )
        self._stand(cache, position, width, tokens)
        self._pass(width, 0, self.num_blocks, by_token=True)()
        return [self.buffers[width].hidden[stop].clone() for stop in stops]

    def run_batch(self, hidden: Tensor, parts: list[Part], stops: Sequence[int]) -> list[Tensor]:
        """Products are over the rows of all texts; attention is each text's own. Not recorded: texts come and go."""
        width = hidden.shape[0]
        if width > LARGEST_WIDTH:
            return super().run_batch(hidden, parts, stops)
        buffers = self._buffers(width)
        ends = list(itertools.accumulate(part.width for part in parts))
        places = self._places(len(parts))
        for part in parts:
            self._require_room(part.cache, part.position, part.width)
        places.tell(
            [place.set(part.cache, part.position, part.width) for place, part in zip(places.of, parts, strict=True)]
        )
        rows = [slice(end - part.width, end) for part, end in zip(parts, ends, strict=True)]
        texts = list(zip(places.of, rows, strict=True))
        buffers.incoming.copy_(hidden)
        for step in self._steps(self.kernels, self.place, buffers, 0, stops[-1], by_token=False, texts=texts):
            step()
        return [buffers.hidden[stop][: ends[-1]].clone() for stop in stops]

    def final_norm(self, hidden: Tensor) -> Tensor:
        if hidden.shape[0] > LARGEST_WIDTH:
            return super().final_norm(hidden)
        out = torch.empty_like(hidden)
        self.kernels.norm(hidden.contiguous(), self.last_norm, self.backbone.final_norm.eps, out)()
        return out

    def logits(self, normed: Tensor) -> Tensor:
        weight = self.backbone.lm_head.weight
        if normed.shape[0] > LARGEST_WIDTH:
            return super().logits(normed)
        out = normed.new_empty(normed.shape[0], weight.shape[0])
        self.kernels.logits(weight.detach(), normed.contiguous(), out)()
        return self.backbone.logit_map(out)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        width = hidden.shape[0]
        if width > LARGEST_WIDTH:
            return super().finish(hidden)
        replay, incoming, normed, token = self._finish(width)
        incoming.copy_(hidden)
        replay()
        return normed.clone(), token.clone()

    def choose(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        if normed.shape[0] > LARGEST_WIDTH:
            return super().choose(normed)
        token = torch.zeros(normed.shape[0], dtype=torch.int64, device=normed.device)
        value = torch.zeros(normed.shape[0], device=normed.device)
        for step in self.kernels.choose(
            self.backbone.lm_head.weight.detach(), normed.contiguous(), token, value, None, None
        ):
            step()
        return token, value

    def _stand(self, cache: KVCache, position: int, width: int, tokens: Sequence[int] = ()) -> None:
        self._require_room(cache, position, width)
        self._places(1).tell([self.place.set(cache, position, width, tokens)])

    def _places(self, count: int) -> Places:
        if count not in self.places_of:
            self.places_of[count] = Places(count, self.backbone.device)
        return self.places_of[count]

    def _require_room(self, cache: KVCache, position: int, width: int) -> None:
        if position + width > cache.capacity:
            raise IndexError(f"rows up to {position + width} in a KV cache of {cache.capacity}")
        if cache.addresses is None or not cache.addresses.are_of(cache):
            cache.addresses = Addresses(cache, self.partial)

    def _buffers(self, width: int) -> Buffers:
        if width not in self.buffers:
            with torch.inference_mode(False):
                size, device = self.backbone.hidden_size, self.backbone.device
                self.buffers[width] = Buffers(width, self.weights, size, self.eps, device)
        return self.buffers[width]

    def _pass(self, width: int, first: int, last: int, *, by_token: bool) -> Step:
        """What runs blocks first .. last - 1 of a width; recorded when first asked for."""
        key = (width, first, last, by_token)
        if key not in self.passes:
            steps = self._steps(self.kernels, self.place, self._buffers(width), first, last, by_token=by_token)
            self.passes[key] = self.record(lambda: [step() for step in steps])
        return self.passes[key]

    def _steps(
        self,
        kernels: Kernels,
        place: Place,
        buffers: Buffers,
        first: int,
        last: int,
        *,
        by_token: bool,
        texts: list[tuple[Place, slice]] | None = None,
    ) -> list[Step]:
        source = self.backbone.embedding_weight.detach() if by_token else buffers.incoming
        norm = self.weights[first].input_norm
        return [
            kernels.enter(place, source, by_token, norm, buffers.hidden[first], buffers.normed),
            *block_steps(kernels, self.weights, self.last_norm, buffers, texts or [(place, slice(None))], first, last),
        ]

    def _finish(self, width: int) -> tuple[Step, Tensor, Tensor, Tensor]:
        """What norms the states of a width and chooses; its states, normed states and choices."""
        if width not in self.finishes:
            with torch.inference_mode(False):
                incoming = torch.zeros_like(self._buffers(width).middle)
                normed, device = torch.zeros_like(incoming), incoming.device
                token, value = torch.zeros(width, dtype=torch.int64, device=device), torch.zeros(width, device=device)
            steps = self._finish_steps(self.kernels, incoming, normed, token, value)
            self.finishes[width] = (self.record(lambda: [step() for step in steps]), incoming, normed, token)
        return self.finishes[width]

    def _finish_steps(
        self, kernels: Kernels, hidden: Tensor, normed: Tensor, token: Tensor, value: Tensor
    ) -> list[Step]:
        weight = self.backbone.lm_head.weight.detach()
        norm = kernels.norm(hidden, self.last_norm, self.backbone.final_norm.eps, normed)
        return [norm, *kernels.choose(weight, normed, token, value, None, None)]


class Addresses:
    """Where a KV cache's buffers are: keys, values, rotary tables, and room for attention over long texts."""

    def __init__(self, cache: KVCache, partial: Tensor) -> None:
        ((cos, sin),) = cache.rotary.values()
        self.held = (cache.keys[0], cache.values[0], cos, sin, partial)
        self.pointers = [tensor.data_ptr() for tensor in self.held]

    def are_of(self, cache: KVCache) -> bool:
        """Whether the buffers are still these."""
        return self.held[0] is cache.keys[0]

    def __getitem__(self, part: slice) -> list[int]:
        return self.pointers[part]


def nf4_weight(product: MergedNF4) -> NF4Weight:
    """A merged product as the kernels read it."""
    packed = product.packed.view(product.out_features, product.in_features // 2)
    scale = product.scales.view(product.out_features, -1)
    return NF4Weight(packed, scale, product.bias, product.out_features, product.in_features)


def why_not_ours(backbone: Backbone) -> str | None:
    """Why our kernels cannot run this backbone's passes; None where they can, given a card that takes them."""
    if backbone.without_llama_shape is not None:
        return f"they are for blocks of the Llama shape, and {backbone.without_llama_shape}"
    reason = why_no_code(backbone, lambda products: why_not_nf4(products, is_plain_nf4, "on a GPU"), ("silu",))
    if reason is not None:
        return reason
    products = [module for module in backbone.blocks.modules() if isinstance(module, nn.Linear)]
    sizes = {size for module in products for size in (module.in_features, module.out_features)}
    head_dim = int(cast(Any, backbone.blocks[0]).self_attn.head_dim)
    if head_dim not in HEAD_SIZES or any(size % SCALED_TOGETHER for size in sizes):
        return f"their tiles do not fit head_dim {head_dim} and products of {sorted(sizes)}"
    if len({backbone.rotary_kind(block) for block in range(backbone.num_blocks)}) > 1:
        return "its blocks read several rotary tables"
    return None
