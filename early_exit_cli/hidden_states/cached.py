"""Reading a cache for training: shuffled, one shard ahead, in memory that does not grow with the cache."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from early_exit_cli.config import TrainingConfig
from early_exit_cli.data.packing import Batch, stacked
from early_exit_cli.errors import CacheError
from early_exit_cli.files.atomic import sha256_of
from early_exit_cli.files.forms import to_block_numbers
from early_exit_cli.hidden_states.cache import (
    Cache,
    StoredView,
    load_shard,
    measured_positions,
    owned_text,
    unpacked,
)
from early_exit_cli.hidden_states.cache_checks import shard_misfit, state_names
from early_exit_cli.hidden_states.manifest import Shard
from early_exit_cli.hidden_states.states import States


class _LoadedShard:
    """One shard in memory; rows are cut from it."""

    def __init__(
        self, path: Path, shard: Shard, exit_layers: list[int], view: StoredView, device: torch.device
    ) -> None:
        tensors = load_shard(path)
        names = state_names(exit_layers)
        what = shard_misfit(tensors, shard, names, view.hidden_size, view.vocab_size)
        if what:
            raise CacheError(f"{path} is no shard of this cache: {what}", hint="eexit cache verify names all damage")
        # clone: the file is mapped into memory, and is read here rather than in the middle of a step
        self.states = [unpacked(name, tensors, view.dtype).clone().to(device) for name in names]
        self.normalizer = tensors["normalizer"].clone().to(device)
        self.measured = measured_positions(tensors).to(device)
        self.row_starts = tensors["row_starts"].tolist()
        self.ids, self.owners, self.places = owned_text(tensors)
        for name, state in zip(names, self.states, strict=True):
            if not torch.isfinite(state).all():
                raise CacheError(f"{path}: NaN or infinite values in {name}", hint="eexit cache repair")

    def row(self, number: int) -> States:
        part = slice(self.row_starts[number], self.row_starts[number + 1])
        *exits, final = [state[part] for state in self.states]
        text = Batch(self.ids[None, part], self.owners[None, part], self.places[None, part])
        return States(exits, final, self.measured[part], text, self.normalizer[part])


class CachedStates:
    """States from a cache: offline training (`states.StateSource`).

    An epoch shuffles the shards, then the sequences within each: a shard is read once an epoch and process, the next one
    meanwhile in the background, and two are held at a time, whatever the size of the cache.
    """

    def __init__(
        self, cache: Cache, exit_layers: list[int] | None, training: TrainingConfig, device: torch.device
    ) -> None:
        cache.require_complete()
        cache.require_sizes()
        self.cache = cache
        self.exit_layers = exit_layers or cache.exit_layers
        if not set(self.exit_layers) <= set(cache.exit_layers):
            kept, asked = to_block_numbers(cache.exit_layers), to_block_numbers(self.exit_layers)
            raise CacheError(
                f"the cache in {cache.folder} holds states after blocks {kept}; heads ask for {asked}",
                hint="extract them, or --head-layer-indices",
            )
        self.view = cache.view(device)
        self.batch_size, self.seed, self.device = training.batch_size, training.seed, device
        self.loaded: OrderedDict[str, _LoadedShard] = OrderedDict()
        self.loading: dict[str, Future[_LoadedShard]] = {}
        self.reader = ThreadPoolExecutor(1)
        self._order: tuple[tuple[int, int, int], list[tuple[int, int]]] | None = None

    def token_counts(self) -> Tensor:
        return self.cache.readout_tensors["token_counts"]

    def sequences(self, rank: int, world: int) -> int:
        return len(range(rank, self.cache.sequences(), world))

    def identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.view.fingerprint,
            "sequences": self.cache.sequences(),
            "cache": sha256_of(*(shard.sha256 for shard in self.cache.shards))[:16],
        }

    def batch(self, number: int, rank: int, world: int) -> States:
        per_epoch = -(-self.sequences(rank, world) // self.batch_size)
        epoch, index = divmod(number, per_epoch)
        order = self._epoch_order(epoch, rank, world)
        return self._rows(self.cache.split("train"), order, index * self.batch_size)

    def held_out(self) -> Iterator[States]:
        shards = self.cache.split("eval")
        order = [(number, row) for number, shard in enumerate(shards) for row in range(shard.rows)]
        for start in range(0, len(order), self.batch_size):
            yield self._rows(shards, order, start)

    def _epoch_order(self, epoch: int, rank: int, world: int) -> list[tuple[int, int]]:
        """(shard, row within it) in the order of an epoch, of one process."""
        key = (epoch, rank, world)
        if self._order is None or self._order[0] != key:
            dice = random.Random(self.seed * 1_000_003 + epoch)
            shards = list(enumerate(self.cache.split("train")))
            dice.shuffle(shards)
            order: list[tuple[int, int]] = []
            for number, shard in shards:
                rows = list(range(shard.rows))
                dice.shuffle(rows)
                order.extend((number, row) for row in rows)
            self._order = (key, order[rank::world])
        return self._order[1]

    def _rows(self, shards: list[Shard], order: list[tuple[int, int]], start: int) -> States:
        """batch_size rows of `order` from `start` on, one after another."""
        chosen = order[start : start + self.batch_size]
        parts = [self._shard(shards[number]).row(row) for number, row in chosen]
        current = chosen[-1][0]
        ahead = range(start + len(chosen), len(order))
        following = next((order[place][0] for place in ahead if order[place][0] != current), None)
        if following is not None:
            self._prefetch(shards[following])
        return States(
            [torch.cat([part.exits[head] for part in parts]) for head in range(len(self.exit_layers))],
            torch.cat([part.final for part in parts]),
            torch.cat([part.measured for part in parts]),
            stacked([part.batch for part in parts]).to(self.device),
            torch.cat([part.normalizer for part in parts if part.normalizer is not None]),
        )

    def _shard(self, shard: Shard) -> _LoadedShard:
        name = shard.file
        if name in self.loading:
            self.loaded[name] = self.loading.pop(name).result()
        elif name not in self.loaded:
            self.loaded[name] = self._read(shard)
        self.loaded.move_to_end(name)
        while len(self.loaded) + len(self.loading) > 2 and len(self.loaded) > 1:
            self.loaded.popitem(last=False)
        return self.loaded[name]

    def _read(self, shard: Shard) -> _LoadedShard:
        return _LoadedShard(self.cache.path(shard), shard, self.exit_layers, self.view, self.device)

    def _prefetch(self, shard: Shard) -> None:
        name = shard.file
        if name not in self.loaded and name not in self.loading:
            while len(self.loaded) > 1:
                self.loaded.popitem(last=False)
            self.loading[name] = self.reader.submit(self._read, shard)
