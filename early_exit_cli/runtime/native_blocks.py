"""The block runner for CPUs: a whole pass in one call of code compiled for the processor.

Eager PyTorch spends more on calling its kernels than these spend on a small pass. `native/blocks.c` does the blocks in
one parallel region, `native/lm_head.c` the argmax in another; here are the addresses they need (docs/decisions/0017).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.quantization import HEAD_STEP
from early_exit_cli.errors import UnsupportedBackboneError
from early_exit_cli.files.instruction_sets import instruction_set
from early_exit_cli.numerics import one_thread
from early_exit_cli.runtime.blocks import LARGEST_WIDTH, Blocks
from early_exit_cli.runtime.fused_blocks import FusedBlocks, why_no_code, why_not_nf4
from early_exit_cli.runtime.kv_cache import KVCache, Part, Rotary
from early_exit_cli.runtime.native_buffers import TILE, Held, native_part, parts_of
from early_exit_cli.runtime.native_code import Block, LMHead, Model, code_key, native_code, why_no_native_code
from early_exit_cli.runtime.native_code import Part as NativePart
from early_exit_cli.runtime.nf4_linear import is_int8, is_packed_nf4, is_plain_nf4
from early_exit_cli.runtime.prefix import kept_of
from early_exit_cli.runtime.thread_count import pass_threads

BATCH_ROWS = 64
PROMPT_WIDTH = 128
"""Rows of a prompt's pass at most: so long another text waits that is decoded meanwhile."""
WORTH_SHARING = 8
"""Tokens that several texts begin with, from which on they are worth a pass of their own."""
PROBED_BLOCKS = 8
"""Enough for one of each kind, full attention and windows, in the families that mix them (Gemma 3: every sixth)."""
KEPT_AS = "_compiled_blocks"
SILU, GELU = "silu", "gelu_pytorch_tanh"
VECTOR = 16
"""Numbers that are computed together."""


class NativeBlocks(FusedBlocks):
    """`FusedBlocks` whose passes, final norm, logits and choices are compiled code's, with bits of its own.

    Raises:
        UnsupportedBackboneError: not this backbone, or not on this machine; the message says why.
    """

    candidate_widths = tuple(range(1, LARGEST_WIDTH + 1))

    def __init__(self, backbone: Backbone) -> None:
        reason = why_not_native(backbone)
        if reason is not None:
            raise UnsupportedBackboneError(f"{backbone.name}: no compiled passes here: {reason}", hint="--runner auto")
        super().__init__(backbone)
        self.variant = getattr(instruction_set(), "name", "")
        self.code = native_code()
        self.held = Held(self.code)
        with one_thread():
            self.model = self._model()
            self.head = self._head()
        self.num_embeddings = self.backbone.embedding.num_embeddings

    @property
    def batch_rows(self) -> int:
        """Any number has the same bits; more than these hardly cost less for each."""
        return BATCH_ROWS

    @property
    def probed_blocks(self) -> int:
        """Some: the order of every sum is written down in the code, and all blocks run the same code."""
        return min(self.num_blocks, PROBED_BLOCKS)

    @property
    def name(self) -> str:
        return f"{super().name} {self.variant} {code_key()[:8]}"

    def _model(self) -> Model:
        blocks = (Block * self.num_blocks)(*map(self._block, range(self.num_blocks)))
        layout = self.layout
        cos, _ = self.rotary_tables(1)[self.table_kinds[0]]
        sizes = (layout.hidden, layout.inner, self.query_heads, self.kv_heads, self.head_dim)
        return Model(
            *(blocks, self.held.address(self.backbone.embedding_weight), *sizes),
            *(layout.rotary_dim, layout.activation == GELU, cos.dtype == torch.float32),
            *(layout.eps, layout.scale, layout.score_cap or 0.0),
            *(layout.embedding_multiplier, layout.residual_multiplier),
        )

    def _block(self, index: int) -> Block:
        layer, held = self.layers[index], self.held
        norms = (
            *(layer.input_norm, layer.behind_attention, layer.mlp_norm, layer.behind_mlp),
            *(layer.qk_norm, layer.q_norm, layer.k_norm),
        )
        return Block(
            *(held.norm(None if norm is None else norm.weight) for norm in norms),
            *map(held.product, (layer.qkv, layer.output, layer.gate_up, layer.down)),
            *(self.windows[index] or 0, self.table_kinds.index(self.rotary_kinds[index])),
        )

    def _head(self) -> LMHead:
        """The LM head with its int8 form, as `ExactArgmax` has it, but for the states, which are integers too."""
        weight = self.backbone.lm_head.weight.detach()
        vocab, hidden = weight.shape
        tiles, scale = torch.empty(vocab, hidden, dtype=torch.uint8), torch.empty(vocab)
        error, norm = torch.empty(vocab), torch.empty(vocab)
        accumulation = 2 * hidden * 2.0**-24
        for part in parts_of(vocab):
            rows = weight[part].float()
            tiles[part], scale[part], found = self.held.int8_tiles(rows)
            norm[part] = found.norm(dim=1)
            error[part] = (rows - found).norm(dim=1) + accumulation * rows.norm(dim=1)
        final_norm = self.held.norm(self.layout.norm_weight(self.backbone.norm))
        addresses = map(self.held.address, (error, norm, weight))
        return LMHead(self.held.int8(tiles, scale), *addresses, final_norm, vocab, hidden, self.eps)

    def pass_width(self, rows: int) -> int:
        return rows if rows in self.widths else super().pass_width(rows)

    def new_cache(self, limit: int) -> KVCache:
        return Blocks.new_cache(self, limit)

    def grows(self, limit: int) -> bool:
        """Never: only the keys that a row needs are read, however large the buffer is."""
        return False

    def prompt_pieces(self, length: int) -> Iterator[slice]:
        """In few passes of equal widths: every pass reads all weights, and its threads wait for each other."""
        step = -(-length // max(1, -(-length // PROMPT_WIDTH)))
        for start in range(0, length, max(1, step)):
            yield slice(start, min(start + step, length))

    def shared_positions(self, prefilled: int, same: int, length: int) -> int:
        """All: bits depend on nothing but the tokens before, decoded ones like those of a prefill."""
        return same

    def rotary_tables(self, limit: int) -> Rotary:
        """Contiguous: rows are read by address."""
        tables = super().rotary_tables(limit)
        return {kind: (cos.contiguous(), sin.contiguous()) for kind, (cos, sin) in tables.items()}

    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        return self.run_through(hidden, cache, position, [last], first)[0]

    def run_through(
        self, hidden: Tensor, cache: KVCache, position: int, stops: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        return self._pass(hidden, [Part(cache, position, hidden.shape[0])], first, stops)

    def run_tokens(self, tokens: list[int], cache: KVCache, position: int, stops: Sequence[int]) -> list[Tensor]:
        if min(tokens) < 0 or max(tokens) >= self.num_embeddings:
            raise IndexError(f"tokens {min(tokens)} to {max(tokens)}, of which {self.num_embeddings} are embedded")
        return self._pass(tokens, [Part(cache, position, len(tokens))], 0, stops)

    def run_batch(self, hidden: Tensor, parts: list[Part], stops: Sequence[int]) -> list[Tensor]:
        return self._pass(hidden, parts, 0, stops)

    def _pass(self, rows: Tensor | list[int], parts: list[Part], first: int, stops: Sequence[int]) -> list[Tensor]:
        """Blocks from `first` on over the rows of the texts: their states after each of `stops` blocks.

        Args:
            rows: states [rows, hidden], or tokens to be embedded.
        """
        states = torch.empty(len(stops), len(rows), self.model.hidden, dtype=torch.bfloat16)
        tokens = None
        if isinstance(rows, list):
            tokens = (ctypes.c_int64 * len(rows))(*rows)
        else:
            states[-1] = rows
        kept = len(stops) - 1
        base, size = states.data_ptr(), states.nbytes // len(stops)
        given = (
            *(self.model, tokens, base + kept * size),
            *((NativePart * len(parts))(*map(native_part, parts)), len(parts), first, stops[-1]),
            *((ctypes.c_int64 * kept)(*stops[:-1]), (ctypes.c_void_p * kept)(*(base + i * size for i in range(kept)))),
            kept,
        )
        if len(rows) > LARGEST_WIDTH:
            failed = self.code.eexit_run(*given, torch.get_num_threads())
        else:
            with pass_threads.timed((len(rows), first, stops[-1])) as threads:
                failed = self.code.eexit_run(*given, threads)
        if failed:
            raise MemoryError
        return list(states.unbind())

    def final_norm(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        normed = torch.empty_like(hidden)
        self.code.eexit_final_norm(self.head, hidden.data_ptr(), normed.data_ptr(), hidden.shape[0])
        return normed

    def logits(self, normed: Tensor) -> Tensor:
        normed = normed.contiguous()
        found = torch.empty(normed.shape[0], self.head.vocab, dtype=torch.bfloat16)
        self.code.eexit_logits(self.head, normed.data_ptr(), found.data_ptr(), normed.shape[0], torch.get_num_threads())
        return self.backbone.logit_map(found)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.contiguous()
        normed = torch.empty_like(hidden)
        return normed, self._choose(hidden.data_ptr(), normed)[0]

    def choose(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        return self._choose(None, normed.contiguous())

    def _choose(self, states: int | None, normed: Tensor) -> tuple[Tensor, Tensor]:
        """From normed states, or from the states at an address, whose normed ones are filled in."""
        width = normed.shape[0]
        choices, best = torch.empty(width, dtype=torch.int64), torch.empty(width)
        failed = self.code.eexit_choose(
            *(self.head, states, normed.data_ptr(), choices.data_ptr(), best.data_ptr()),
            *(width, pass_threads.now),
        )
        if failed:
            raise MemoryError
        return choices, best

    def states_of(self, input_ids: Tensor, documents: Tensor, exit_layers: list[int]) -> list[Tensor]:
        """What `Backbone.hidden_states_at` gives, for packed text: a document's tokens see that document alone.

        Args:
            input_ids, documents: [batch, seq] int64, documents negative where there is padding, which stays zero.

        Returns:
            len(exit_layers) + 1 tensors [batch, seq, hidden]; the last one has the final norm applied.
        """
        real = documents.flatten() >= 0
        rows = torch.arange(len(documents))[:, None]
        owners = (documents * len(documents) + rows).flatten()[real]  # one that goes on in another row begins again
        widths = owners.unique_consecutive(return_counts=True)[1].tolist()
        stops = sorted({*exit_layers, self.num_blocks})
        states = self._states_of_texts(input_ids.flatten()[real].split(widths), stops)
        found = []
        for state in (*(states[stops.index(layer)] for layer in exit_layers), self.final_norm(states[-1])):
            whole = state.new_zeros(real.numel(), state.shape[-1])
            whole[real] = state
            found.append(whole.view(*input_ids.shape, -1))
        return found

    def _states_of_texts(self, texts: Sequence[Tensor], stops: Sequence[int]) -> list[Tensor]:
        """`run_batch` over whole texts, [tokens] int64 each. What all begin with, a template's first words, is computed once."""
        caches = [self.new_cache(len(text)) for text in texts]
        shared = shared_beginning(texts)
        parts = [Part(cache, shared, len(text) - shared) for cache, text in zip(caches, texts, strict=True)]
        if shared == 0:
            return self.run_batch(self.embed(torch.cat([*texts])), parts, stops)
        first = self.new_cache(shared)
        begun = self.run_batch(self.embed(texts[0][:shared]), [Part(first, 0, shared)], stops)
        prefix = kept_of(first, texts[0][:shared].tolist(), shared, {})
        for cache in caches:
            prefix.copy_to(cache, shared)
        states = self.run_batch(self.embed(torch.cat([text[shared:] for text in texts])), parts, stops)
        sizes = [part.width for part in parts]
        return [
            torch.cat([piece for rest in own.split(sizes) for piece in (same, rest)])
            for same, own in zip(begun, states, strict=True)
        ]


def shared_beginning(texts: Sequence[Tensor]) -> int:
    """How many tokens all of several texts begin with, where that is worth a pass of its own: less than any of them has.

    Args:
        texts: [tokens] int64 each.
    """
    most = min(map(len, texts)) - 1
    alike = torch.stack([text[:most] == texts[0][:most] for text in texts]).all(0)
    shared = int(alike.cumprod(0).sum())
    return shared if len(texts) > 1 and shared >= WORTH_SHARING else 0


def compiled_blocks(backbone: Backbone) -> NativeBlocks | None:
    """The backbone's one compiled runner, made when first asked for; None where it cannot be had.

    Kept among the backbone's attributes, as a cached property would be: the runner holds the backbone, so a table of
    them elsewhere, weak or not, would keep both alive.
    """
    kept = vars(backbone)
    if KEPT_AS not in kept:
        kept[KEPT_AS] = NativeBlocks(backbone) if why_not_native(backbone) is None else None
    return cast("NativeBlocks | None", kept[KEPT_AS])


def is_nf4(module: Any) -> bool:
    """Whether code for this processor can read a linear map's weight: bitsandbytes' packing for AVX512-BF16 that code as it
    is, other code unpacked; and its plain one, which it has on all other processors, other code."""
    variant = instruction_set()
    if variant is not None and variant.name == "avx512bf16":
        return is_packed_nf4(module)
    return is_plain_nf4(module) or is_packed_nf4(module)


def _why_not_these(products: list[Any]) -> str | None:
    """Why code for this processor cannot read these linear maps' weights; None where it can."""
    if all(map(is_int8, products)) or all(type(p) is nn.Linear and p.weight.dtype == torch.bfloat16 for p in products):
        return None
    return why_not_nf4(products, is_nf4, "in bitsandbytes' packing for this processor, in 8 bit, or in bfloat16")


def why_not_native(backbone: Backbone) -> str | None:
    """Why this backbone's passes cannot be compiled code's on this machine; None where they can."""
    if backbone.device.type != "cpu":
        return "they are for CPUs"
    reason = why_no_code(backbone, _why_not_these, (SILU, GELU))
    if reason is not None:
        return reason
    layout = backbone.block_layout
    head_dim, inner = layout.head_dim, layout.inner
    if head_dim % HEAD_STEP or any(size % TILE for size in (inner, layout.query_heads * head_dim, layout.hidden)):
        return f"their tiles do not fit head_dim {head_dim} and intermediate_size {inner}"
    tables = backbone.rotary_tables(torch.zeros(1, dtype=torch.int64)).values()
    if any(cos.dtype == torch.float32 for cos, _ in tables) and not layout.norms_all_heads:
        return "they know rotary tables in float32 only behind norms over all heads"
    if layout.rotary_dim % (2 * VECTOR):
        return f"their vectors do not fit {layout.rotary_dim} turned numbers of a head"
    return why_no_native_code()
