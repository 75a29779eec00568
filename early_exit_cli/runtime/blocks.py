"""Running the backbone's decoder blocks a to b over a preallocated KV cache.

The contract of both runners, on which every promise of this program stands:

* A pass takes `width` rows: the tokens at `position .. position + width - 1`. Row i attends to keys 0 .. position + i.
* The KV cache is one buffer per block. A pass overwrites its rows there; what lies behind the last committed token is
  never read, so rolling back is forgetting a number. Blocks with a state keep as much of the last tokens as that takes
  (`block_state`): a pass begins at most 15 rows behind the last committed token, and never before it.
* **Width invariance**: for widths of `widths`, a token's result has the same bits whatever its row, its neighbours
  (rejected drafts, padding) and the width. `invariant_widths.measure_widths` checks this on the device at hand. The
  number of keys read may change the last bits, so a decoding pass reads the whole buffer, masked: one length for a
  request. Where the runner's attention was found to give the same bits at every length, the buffer of a long request
  starts small and grows. Passes wider than `LARGEST_WIDTH` are the prompt's, always cut alike, and read what they must.

`HFBlocks` runs the library's own modules, for any supported family; `fused_blocks.FusedBlocks` is our lean path for the
Llama shape. Both round at the same places, so they agree bit for bit where their products do.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from early_exit_cli.backbone.backbone import Backbone
from early_exit_cli.backbone.plain import told
from early_exit_cli.errors import ConfigError
from early_exit_cli.runtime.exact_argmax import ExactArgmax, full_argmax
from early_exit_cli.runtime.kv_cache import LARGEST_WIDTH, KVCache, Part, Rotary, Rows

PREFILL_WIDTH = 64
KEY_STEP = 64
GROWTH = 256


class Blocks(ABC):
    """Interface of the runners."""

    candidate_widths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12, LARGEST_WIDTH)
    """Widths that are measured for invariance."""

    def __init__(self, backbone: Backbone) -> None:
        backbone.refuse_lost_changes()
        config = backbone.config
        self.backbone = backbone
        self.changes = backbone.changes
        """Of the library's modules, as they were when this runner was made for them."""
        self.reads_lm_head = backbone.has_plain_lm_head
        self.num_blocks = backbone.num_blocks
        self.query_heads = int(config.num_attention_heads)
        self.kv_shapes = [backbone.kv_shapes(block) for block in range(self.num_blocks)]
        """(heads, size) of each block's keys, and of its values."""
        self.has_keys = [backbone.has_keys(block) for block in range(self.num_blocks)]
        self.kv_heads, self.head_dim = self.kv_shapes[self.has_keys.index(True)][0]
        self.windows = [backbone.window_of(block) for block in range(self.num_blocks)]
        self.rotary_kinds = [backbone.rotary_kind(block) for block in range(self.num_blocks)]
        self.widths: tuple[int, ...] = (LARGEST_WIDTH,)
        self.is_invariant = False
        self.argmax_widths: tuple[int, ...] = ()
        self.exact_argmax: ExactArgmax | None = None
        self.any_length = False
        """Whether bits are the same at every length of the buffer: measured, see `invariant_widths.measure_widths`."""
        self.recording_seconds = 0.0
        """What recording passes has taken."""
        self.without_kernels: str | None = None
        """Why this machine's passes are not our own code's although they are written for such a model, see `select`."""
        self.without_graphs: str | None = None
        """Why passes are not recorded here although they were to be, see `select.use_graphs`."""

    def refuse_later_changes(self) -> None:
        """Refuse to answer for modules that were changed since this runner was made for them.

        Raises:
            ConfigError: naming the first.
        """
        now = self.backbone.changes
        if now != self.changes:
            name, what = min({*now.items()} ^ {*self.changes.items()})
            when = "only since" if name in now else "no longer since"
            raise ConfigError(
                f"{told(name, what)} {when} this EarlyExitModel was made",
                hint="make it anew: EarlyExitModel.from_pretrained(model=model); merge_and_unload() merges an adapter",
            )

    @property
    def probed_blocks(self) -> int:
        """How many blocks, from the first on, a search for invariant widths runs."""
        return self.num_blocks

    @property
    def name(self) -> str:
        """What measurements are remembered under."""
        return type(self).__name__

    @abstractmethod
    def run(self, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor:
        """Run blocks first .. last - 1 on the rows at `position`, [width, hidden] to [width, hidden].

        Block 0 takes what `embed` gives.
        """

    def run_through(
        self, hidden: Tensor, cache: KVCache, position: int, stops: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        """Blocks from `first` on: the states of the rows at `position` after each of `stops` blocks, ascending."""
        states = [hidden]
        for start, stop in itertools.pairwise([first, *stops]):
            states.append(self.run(states[-1], cache, position, start, stop))
        return states[1:]

    def run_tokens(self, tokens: list[int], cache: KVCache, position: int, stops: Sequence[int]) -> list[Tensor]:
        """All blocks over embedded tokens, as `run_through`."""
        return self.run_through(self.embed_tokens(tokens), cache, position, stops)

    def run_batch(self, hidden: Tensor, parts: list[Part], stops: Sequence[int]) -> list[Tensor]:
        """`run_through` for the rows of several texts, one after another; rows behind the last part are padding."""
        pieces = hidden[: sum(part.width for part in parts)].split([part.width for part in parts])
        outputs = [
            self.run_through(piece, part.cache, part.position, stops) for piece, part in zip(pieces, parts, strict=True)
        ]
        return [torch.cat(states) for states in zip(*outputs, strict=True)]

    def prepare_parts(self, stops: Sequence[int]) -> None:  # noqa: B027
        """Drafting will pause after these numbers of blocks: what can be made beforehand is made."""

    def prompt_pieces(self, length: int) -> Iterator[slice]:
        """How a prompt of so many tokens is cut into passes: by its length alone, so that its bits are its own."""
        for start in range(0, length, PREFILL_WIDTH):
            yield slice(start, min(start + PREFILL_WIDTH, length))

    def shared_positions(self, prefilled: int, same: int, length: int) -> int:
        """How many positions of a prefill of `length` tokens have the bits that an earlier text left there.

        Those of passes that both prefills made: wide ones, whose bits do not depend on the size of the buffer.

        Args:
            prefilled: tokens of the earlier prefill. same: tokens that both texts begin with.
        """
        shared = 0
        for ours, theirs in zip(self.prompt_pieces(length), self.prompt_pieces(prefilled), strict=False):
            if ours != theirs or ours.stop > same or ours.stop - ours.start <= LARGEST_WIDTH:
                break
            shared = ours.stop
        return shared

    def keys_read(self, cache: KVCache, end: int, width: int) -> int:
        """How many keys a pass of `width` rows up to position `end` reads."""
        needed = min(-(-end // KEY_STEP) * KEY_STEP, cache.capacity)
        return needed if width > LARGEST_WIDTH else cache.capacity

    def grows(self, limit: int) -> bool:
        """Whether the buffer of a request that may need `limit` tokens starts empty and grows."""
        return False

    def new_cache(self, limit: int) -> KVCache:
        """A KV cache for up to `limit` tokens, rounded up to whole steps of keys."""
        limit = -(-limit // KEY_STEP) * KEY_STEP
        device, dtype = self.backbone.device, self.backbone.dtype
        capacity = 0 if self.grows(limit) else limit
        keys, values = (
            [torch.zeros(heads, capacity, size, dtype=dtype, device=device) for heads, size in shapes]
            for shapes in zip(*self.kv_shapes, strict=True)
        )
        return KVCache(
            keys=keys,
            values=values,
            rotary=self.rotary_tables(limit),
            limit=limit,
            with_state=self.backbone.blocks_with_state,
        )

    def rotary_tables(self, limit: int) -> Rotary:
        """cos and sin of positions 0 .. limit - 1, [limit, 1, rotary dimensions] each, by the kind of block."""
        tables = self.backbone.rotary_tables(torch.arange(limit, device=self.backbone.device))
        return {kind: (cos[:, None], sin[:, None]) for kind, (cos, sin) in tables.items()}

    def embed(self, token_ids: Tensor) -> Tensor:
        """[width] int64 -> [width, hidden], or wider: what block 0 takes. Where positions are learned, it adds them: it knows
        where it runs.
        """
        return self.backbone.embed(token_ids)

    def embed_tokens(self, tokens: list[int]) -> Tensor:
        """`embed` of tokens that are not on the device yet."""
        return self.embed(torch.tensor(tokens).to(self.backbone.device, non_blocking=True))

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm in front of the LM head, [width, hidden] -> [width, hidden]."""
        return self.backbone.norm(hidden)

    def logits(self, normed: Tensor) -> Tensor:
        """[width, hidden], final norm applied -> [width, vocab]."""
        return self.backbone.logit_map(self.backbone.lm_head(normed))

    def choose(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's choice after each row, [width, hidden] -> ([width] int64, [width] best logits or near them).

        Always the argmax of `logits`, which is that of the LM head's product; by `ExactArgmax` at the widths where that
        is faster on this device.
        """
        if self.exact_argmax is not None and normed.shape[0] in self.argmax_widths:
            return self.exact_argmax(normed)
        if not self.reads_lm_head:
            best, choices = self.backbone.lm_head(normed).max(-1)
            return choices, best
        return full_argmax(self.backbone.lm_head.weight, normed)

    def finish(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States after the last block -> (normed states [width, hidden], the backbone's choices [width] int64).

        A row whose best logit is NaN or infinite has the choice -1: reading the choices from the device tells both.
        """
        normed = self.final_norm(hidden)
        choices, best = self.choose(normed)
        return normed, choices.masked_fill(~torch.isfinite(best), -1)

    def rows(self, cache: KVCache, position: int, width: int) -> Rows:
        """Rotary tables and masks of a pass; the last one is kept, since a pass is often run in parts."""
        end = position + width
        place = slice(position, end)
        if cache.rows is not None and cache.rows.place == place:
            return cache.rows
        if end > cache.capacity:
            cache.grow(min(-(-end // GROWTH) * GROWTH, cache.limit))
        keys = self.keys_read(cache, end, width)
        masks, grouped = self._masks(torch.arange(position, end, device=self.backbone.device), keys)
        rotary = {kind: (cos[place], sin[place]) for kind, (cos, sin) in cache.rotary.items()}
        cache.rows = Rows(place, width, keys, rotary, masks, grouped)
        return cache.rows

    def rows_at(self, cache: KVCache, position: Tensor, width: int) -> Rows:
        """The same for a position [] int64 that only the device knows, reading the whole buffer.

        Tensors in, tensors out, nothing read back: it can be recorded once and replayed at other positions.
        """
        place = position + torch.arange(width, device=position.device)
        masks, grouped = self._masks(place, cache.capacity)
        rotary = {
            kind: (cos.index_select(0, place), sin.index_select(0, place)) for kind, (cos, sin) in cache.rotary.items()
        }
        return Rows(place, width, cache.capacity, rotary, masks, grouped)

    def _masks(self, place: Tensor, keys: int) -> tuple[dict[int | None, Tensor], dict[int | None, Tensor]]:
        """`Rows.masks` and `Rows.grouped` of the rows at `place` [width] over the first `keys` keys."""
        width, group = place.shape[0], self.query_heads // self.kv_heads
        row, key = place[:, None], torch.arange(keys, device=place.device)
        masks: dict[int | None, Tensor] = {}
        grouped: dict[int | None, Tensor] = {}
        for window in set(self.windows):
            hidden_keys = key > row
            if window is not None:
                hidden_keys |= key <= row - window
            mask = torch.zeros(width, keys, dtype=self.backbone.dtype, device=place.device)
            mask.masked_fill_(hidden_keys, float("-inf"))
            masks[window] = mask[None, None]
            grouped[window] = mask[:, None].expand(-1, group, -1).reshape(1, 1, width * group, keys)
        return masks, grouped

    @property
    def batch_rows(self) -> int:
        """The most rows of several texts that a pass takes."""
        return self.widths[-1]

    def pass_width(self, rows: int) -> int:
        """The smallest invariant width that holds `rows`; where none does, the largest (see `passes`)."""
        return next((width for width in self.widths if width >= rows), self.widths[-1])
