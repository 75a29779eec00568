"""Documents packed into rows of one length; attention never crosses from one document to the next."""

from __future__ import annotations

import bisect
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from early_exit_cli.data.documents import Document

IGNORED = -1


@dataclass(frozen=True)
class Batch:
    """Packed sequences.

    input_ids: [batch, seq] int64. documents: [batch, seq] int64, the number of the document a token belongs to among
    those packed, IGNORED (-1) for padding. places: [batch, seq] int64, where in the document's answer the token stands:
    0 is the first, a prompt's tokens have negative ones (plain text is all answer). Positions need no tensor: the mask
    says where a document begins.
    """

    input_ids: Tensor
    documents: Tensor
    places: Tensor

    @property
    def valid(self) -> Tensor:
        """[batch, seq] bool: not padding."""
        return self.documents != IGNORED

    @property
    def answers(self) -> Tensor:
        """[batch, seq] bool: of an answer."""
        return self.places >= 0

    @property
    def measured(self) -> Tensor:
        """[batch, seq] bool: the following token is of the same document, and of an answer.

        Heads are calibrated and scored on these positions only: a chat template and a prompt are never decoded, and
        the template's fixed words would flatter every head.
        """
        same = torch.zeros_like(self.documents, dtype=torch.bool)
        same[:, :-1] = (self.documents[:, 1:] == self.documents[:, :-1]) & self.answers[:, 1:]
        return same & self.valid

    def block_mask(self) -> Tensor:
        """[batch, 1, seq, seq] bool: causal, within a document; a padding row sees itself."""
        seq = self.input_ids.shape[1]
        causal = torch.ones(seq, seq, dtype=torch.bool, device=self.input_ids.device).tril()
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (causal & same)[:, None]

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.documents.to(device), self.places.to(device))


def pack(documents: list[Document], max_length: int, pad_id: int) -> list[Batch]:
    """Rows of `max_length` tokens, each a [1, max_length] Batch padded behind, in the order of their first documents.

    A document that fits into a row stays whole: the longest come first, each into the row that it leaves the least room
    in (best-fit packing, Ding et al. 2024, section 3). One longer than a row is cut, and no piece sees the one before.
    """
    pieces = [
        (owner, start, min(max_length, len(document.ids) - start))
        for owner, document in enumerate(documents)
        for start in range(0, len(document.ids), max_length)
    ]
    rows: list[list[tuple[int, int, int]]] = []
    rooms: list[tuple[int, int]] = []  # what is left in a row and its number, ascending
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        fits = bisect.bisect_left(rooms, (piece[2], -1))
        room, row = rooms.pop(fits) if fits < len(rooms) else (max_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (room - piece[2], row))
    return [_packed(documents, sorted(row), max_length, pad_id) for row in sorted(rows, key=min)]


def _packed(documents: list[Document], pieces: list[tuple[int, int, int]], max_length: int, pad_id: int) -> Batch:
    """One row of pieces: (number of the document, where in it, tokens)."""
    ids: list[int] = []
    owners: list[int] = []
    places: list[int] = []
    for owner, start, length in pieces:
        document = documents[owner]
        ids += document.ids[start : start + length]
        owners += [owner] * length
        places += range(start - document.answer_start, start - document.answer_start + length)
    missing = max_length - len(ids)
    return Batch(
        torch.tensor([ids + [pad_id] * missing], dtype=torch.int64),
        torch.tensor([owners + [IGNORED] * missing], dtype=torch.int64),
        torch.tensor([places + [IGNORED] * missing], dtype=torch.int64),
    )


def stacked(rows: list[Batch]) -> Batch:
    """Rows of any lengths as one batch, padded behind."""
    longest = max(row.input_ids.shape[1] for row in rows)

    def join(parts: list[Tensor], filler: int) -> Tensor:
        return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=filler) for part in parts])

    return Batch(
        join([row.input_ids for row in rows], 0),
        join([row.documents for row in rows], IGNORED),
        join([row.places for row in rows], IGNORED),
    )


def batches(rows: list[Batch], batch_size: int, seed: int | None = None) -> Iterator[Batch]:
    """Batches of `batch_size` rows; shuffled by `seed`, in order without one. The last batch may be smaller."""
    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for start in range(0, len(order), batch_size):
        chosen = [rows[index] for index in order[start : start + batch_size]]
        yield stacked(chosen)


def apart(packed: list[Batch], tokens: int) -> list[Batch]:
    """The documents of packed sequences in rows of their own, those of like length together: where attention is counted over
    whole rows, no document pays for its neighbours.

    Args:
        tokens: places of a batch at most, padding included; a longer document is a batch by itself.

    Returns:
        Batches in ascending order of length, whose `documents` keep their numbers.
    """
    rows = []
    for batch in packed:
        for fields in zip(batch.input_ids, batch.documents, batch.places, strict=True):
            lengths = fields[1].unique_consecutive(return_counts=True)[1].tolist()
            pieces = (
                Batch(*(part[None] for part in piece))
                for piece in zip(*(f.split(lengths) for f in fields), strict=True)
            )
            rows += [piece for piece in pieces if piece.valid.any()]
    rows.sort(key=lambda row: row.input_ids.shape[1])
    found: list[list[Batch]] = []
    for row in rows:
        if not found or (len(found[-1]) + 1) * row.input_ids.shape[1] > tokens:
            found.append([])
        found[-1].append(row)
    return [stacked(group) for group in found]
