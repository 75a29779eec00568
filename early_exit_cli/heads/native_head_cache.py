"""A head's own KV cache as compiled code fills it."""

from __future__ import annotations

from early_exit_cli.heads.attention import HeadCache
from early_exit_cli.runtime.native_code import KVBuffers


class NativeHeadCache(HeadCache):
    """`HeadCache` that compiled code fills."""

    buffers: KVBuffers

    def moved(self) -> None:
        tensors = (self.keys, self.values, self.cos, self.sin)
        self.buffers = KVBuffers(*(tensor.data_ptr() for tensor in tensors), self.keys.shape[1])
