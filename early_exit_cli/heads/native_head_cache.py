"""A head's own KV cache as compiled code fills it."""

from __future__ import annotations

from early_exit_cli.heads.attention import HeadCache
from early_exit_cli.runtime.native_code import Memory


class NativeHeadCache(HeadCache):
    """`HeadCache` that compiled code fills."""

    memory: Memory

    def reserve(self, length: int) -> None:
        had = self.keys
        super().reserve(length)
        if self.keys is not had:
            buffers = (self.keys, self.values, self.cos, self.sin)
            self.memory = Memory(*(buffer.data_ptr() for buffer in buffers), self.keys.shape[1])
