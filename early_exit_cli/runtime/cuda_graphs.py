"""Passes recorded once and replayed: on a GPU, a pass of small kernels then costs one launch instead of hundreds.

A recording is bound to memory: it reads its own input buffers and the KV buffers it was made on, and writes its own
output buffers. Who owns what:

* The KV buffers of a bucket (`kv_bucket`) belong to `Graphs` and never move. A request leases them; `run` serves only
  the cache that holds the lease. Meanwhile a second cache of that bucket is an ordinary one, run without recordings.
* A lease starts from zeros. Rows of an earlier request would be masked, which hides numbers but not a NaN.
* What `run` and `finish` return are copies: the next replay cannot change what a caller still holds.
* `Graphs` forgets the recordings used least recently beyond MOST_RECORDINGS, and free KV buffers beyond MOST_KEYS.

`Graphs` knows nothing of CUDA: a recorder takes a step, a function without arguments, and gives back what repeats it on
the same memory. `CudaRecorder` captures it as a CUDA graph; `select.use_graphs` checks at load what it records before
anything relies on it (docs/decisions/0011).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from early_exit_cli.runtime.kv_cache import LARGEST_WIDTH, KVCache

SMALLEST_BUCKET, BUCKET_STEP = 256, 1024
MOST_RECORDINGS = 128
"""Three heads cut the blocks into some ten parts, each run at up to nine widths."""
MOST_KEYS = 8192
"""Tokens of KV buffers that are kept for later requests: 1 GB for Llama-3 8B."""
Step = Callable[[], object]
Recorder = Callable[[Step], Step]
RunAt = Callable[[Tensor, KVCache, Tensor, int, int], Tensor]
"""(hidden [width, hidden], cache, position [] int64 on the device, first, last) -> hidden [width, hidden]."""
Finish = Callable[[Tensor], tuple[Tensor, Tensor]]
"""[width, hidden] -> (normed states [width, hidden], choices [width] int64)."""


def kv_bucket(limit: int) -> int:
    """Keys of the buffers for a request of `limit` tokens: few sizes, so that requests share recordings.

    A power of two, from 256 on, up to 1,024; above that whole thousands, since masked keys are read too.
    """
    if limit > BUCKET_STEP:
        return -(-limit // BUCKET_STEP) * BUCKET_STEP
    return max(SMALLEST_BUCKET, 1 << (limit - 1).bit_length())


class CudaRecorder:
    """Captures a step as a CUDA graph; all graphs of a recorder share one memory pool.

    They may: no two run at once, and what outlives a replay is copied to buffers outside the pool.
    """

    warm_ups = 2
    """Before a capture: libraries allocate their workspaces and choose their kernels on a first call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self.stream):  # here too: a failed capture would leave it the current stream
                    for _ in range(self.warm_ups):
                        step()
                    # torch asserts that a pool named here is in use: when all its graphs are forgotten, a new one.
                    pool = next((other.pool() for other in self.alive), None)
                    with torch.cuda.graph(graph, pool=pool, stream=self.stream, capture_error_mode="thread_local"):
                        step()
            finally:
                caller.wait_stream(self.stream)
        self.alive.add(graph)
        return graph.replay


@dataclass(frozen=True)
class _Recording:
    hidden: Tensor
    position: Tensor
    outputs: list[Tensor]
    replay: Step


class _Buffers:
    """KV buffers and rotary tables of a bucket, and the cache that has them on lease."""

    def __init__(self, buffers: KVCache) -> None:
        self.buffers = buffers
        self.holder: weakref.ref[KVCache] | None = None

    def held_by(self) -> KVCache | None:
        return None if self.holder is None else self.holder()

    def lease(self) -> KVCache | None:
        """A cache on these buffers; none while another is held."""
        if self.held_by() is not None:
            return None
        own = self.buffers
        for tensor in (*own.keys, *own.values):
            tensor.zero_()
        cache = KVCache(list(own.keys), list(own.values), own.rotary, own.limit)
        self.holder = weakref.ref(cache)
        return cache


class Graphs:
    """The recordings of a block runner, a key each: (bucket, first block, last block, width), or (width) of the finish.

    failure: why recording failed, after which nothing is recorded or replayed any more.
    """

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.recordings: OrderedDict[tuple[int, ...], _Recording] = OrderedDict()
        self.buckets: OrderedDict[int, _Buffers] = OrderedDict()
        self.failure: str | None = None

    def lease(self, bucket: int, allocate: Callable[[int], KVCache]) -> KVCache | None:
        """A cache on the KV buffers of a bucket, until nobody holds that cache any more; none while another is held."""
        if bucket not in self.buckets:
            self._make_room(bucket)
            with torch.inference_mode(False):  # usable in that mode and outside
                try:
                    buffers = allocate(bucket)
                except torch.OutOfMemoryError:
                    self._make_room(MOST_KEYS)
                    buffers = allocate(bucket)
            self.buckets[bucket] = _Buffers(buffers)
        self.buckets.move_to_end(bucket)
        return self.buckets[bucket].lease()

    def _make_room(self, keys: int) -> None:
        """Drop free buffers, the least recently leased first, until `keys` more are within MOST_KEYS."""
        for other in list(self.buckets):
            if sum(self.buckets) + keys <= MOST_KEYS:
                return
            if self.buckets[other].held_by() is None:
                del self.buckets[other]
                for key in [key for key in self.recordings if len(key) > 1 and key[0] == other]:
                    del self.recordings[key]

    def run(self, run_at: RunAt, hidden: Tensor, cache: KVCache, position: int, first: int, last: int) -> Tensor | None:
        """`run_at` from its recording; none where this pass cannot be one, and has to be run as it is."""
        width, bucket = hidden.shape[0], self.buckets.get(cache.limit)
        if bucket is None or bucket.held_by() is not cache or position + width > cache.limit:
            return None
        own = bucket.buffers  # not the lease, which a recording must not keep alive
        outputs = self._replay(
            (cache.limit, first, last, width), lambda rows, at: (run_at(rows, own, at, first, last),), hidden, position
        )
        return None if outputs is None else outputs[0]

    def finish(self, finish: Finish, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """`finish` from its recording."""
        outputs = self._replay((hidden.shape[0],), lambda rows, _: finish(rows), hidden, 0)
        return None if outputs is None else (outputs[0], outputs[1])

    def _replay(
        self,
        key: tuple[int, ...],
        function: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        hidden: Tensor,
        position: int,
    ) -> list[Tensor] | None:
        if self.failure is not None or hidden.shape[0] > LARGEST_WIDTH:  # the prompt's passes are of many widths
            return None
        recording = self.recordings.get(key)
        try:
            if recording is None:
                recording = self.recordings[key] = self._record(function, hidden, position)
                if len(self.recordings) > MOST_RECORDINGS:
                    self.recordings.popitem(last=False)
            else:
                recording.hidden.copy_(hidden)
                recording.position.fill_(position)
            self.recordings.move_to_end(key)
            recording.replay()
        except RuntimeError as error:  # out of memory, or an operation that cannot be captured
            self.failure = " ".join(str(error).split())[:200]
            self.recordings.clear()
            return None
        return [output.clone() for output in recording.outputs]

    def _record(
        self, function: Callable[[Tensor, Tensor], tuple[Tensor, ...]], hidden: Tensor, position: int
    ) -> _Recording:
        """Buffers, and the function from them to them, recorded; on real rows, so that running it does no harm."""
        with torch.inference_mode(False):
            rows = torch.empty_like(hidden)
            place = torch.full((), position, device=hidden.device)
        rows.copy_(hidden)
        first = function(rows, place)
        with torch.inference_mode(False):
            outputs = [torch.empty_like(value) for value in first]

        def step() -> None:
            for output, value in zip(outputs, function(rows, place), strict=True):
                output.copy_(value)

        return _Recording(rows, place, outputs, self.record(step))
