"""Reading what a GGUF file says of itself. The package `gguf` does so, at 30 us an element of a list: a vocabulary of 262,144
tokens took half a minute, and transformers reads it three times."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch

from early_exit_cli.errors import BackboneError

LONG = 4096
"""Elements of a list that is read at once: tokens, their scores and types; a configuration holds no such list."""


class GGUFReader(gguf.GGUFReader):
    """The package's reader over a plain array, which is ten times as fast to slice as a memory map. Long lists are read at
    once; one of numbers is one part of its field."""

    @property
    def data(self) -> Any:
        return self._bytes

    @data.setter
    def data(self, mapped: Any) -> None:
        self._bytes = mapped.view(np.ndarray)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
        count = self._get(orig_offs + 4, np.uint64)
        number = self.gguf_scalar_to_np.get(kind)
        if count[0] <= LONG or (number is None and kind != gguf.GGUFValueType.STRING):
            return super()._get_field_parts(orig_offs, raw_type)
        end = orig_offs + 12
        if number is None:
            values, end = self._texts(end, int(count[0]))
        else:
            values = [self._get(end, number, int(count[0]))]
            end += values[0].nbytes
        if end > len(self.data):
            raise ValueError("a list is cut off")
        parts = [self._get(orig_offs, np.uint32), count, *values]
        return end - orig_offs, parts, [*range(2, len(parts))], [gguf.GGUFValueType.ARRAY, kind]

    def _texts(self, place: int, count: int) -> tuple[list[Any], int]:
        """So many texts from a place on, each behind its length; and where they end."""
        data = self.data
        order: Literal["little", "big"] = "little" if self.endianess == gguf.GGUFEndian.LITTLE else "big"
        found = []
        for _ in range(count):
            start = place + 8
            place = start + int.from_bytes(data[start - 8 : start].tobytes(), order)
            found.append(data[start:place])
        return found, place


def reader_of(path: Path) -> GGUFReader:
    """The reader of a GGUF file.

    Raises:
        BackboneError: not a whole GGUF file.
    """
    try:
        return GGUFReader(path)
    except Exception as error:  # the GGUF reader raises whatever a damaged file provokes
        raise BackboneError(f"{path} is not a whole GGUF file: {error}") from error


def field_of(reader: GGUFReader, name: str) -> Any:
    """What a file says under a name; None where it says nothing."""
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def unpacked(data: Any, kind: Any) -> Any:
    """The numbers of a quantized tensor, float32, whole and with all threads: the package unpacks 16 rows at a time.

    Args:
        data: [*, bytes a row] uint8, or the numbers themselves. kind: `gguf.GGMLQuantizationType`.
    """
    from transformers.integrations.gguf.dequant import GGML_BLOCK
    from transformers.integrations.gguf.kernels import dequantize_blocks

    if int(kind) not in GGML_BLOCK:
        return unpacked_by_the_package(data, kind)
    elements, size = GGML_BLOCK[int(kind)]
    rows = torch.tensor(data.reshape(-1, data.shape[-1]))
    columns = data.shape[-1] // size * elements
    values = dequantize_blocks(rows, int(kind), rows.shape[0], columns, torch.float32)
    return values.numpy().reshape(*data.shape[:-1], columns)


unpacked_by_the_package = gguf.dequantize


@contextlib.contextmanager
def read_fast() -> Iterator[None]:
    """In the block transformers reads and unpacks GGUF files with what stands above, and makes the table of an
    architecture's names once and not for each module; it looks all three up anew each time.
    """
    ours = {
        "GGUFReader": GGUFReader,
        "dequantize": unpacked,
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    theirs = {name: getattr(gguf, name) for name in ours}
    for name, value in ours.items():
        setattr(gguf, name, value)
    try:
        yield
    finally:
        for name, value in theirs.items():
            setattr(gguf, name, value)
