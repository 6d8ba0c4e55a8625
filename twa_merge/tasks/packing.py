"""Documents → two disjoint sides; their tokens → sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

# Fewer distinct documents than FEW are cut into at least PIECES pieces, so that a split by
# document can come close to its share.
FEW = 20
PIECES = 32


@dataclass(frozen=True)
class Piece:
    """A document, or one of the contiguous pieces that it was cut into.

    Attributes:
        document: number of the document.
        place: number of the piece inside it.
    """

    text: str
    document: int
    place: int = 0

    def follows(self, other: Piece) -> bool:
        return self.document == other.document and self.place == other.place + 1


class Packed(Dataset[dict[str, Tensor]]):
    """Sequences of tokens: example i is ``{"input_ids": (length,) int64}``.

    Attributes:
        groups: the text that most of each sequence is of, by number; those of one text are alike.
    """

    def __init__(self, tokens: Tensor, length: int, texts: Tensor) -> None:
        """Cuts ``tokens`` (T,) into T // length sequences.

        The remainder is dropped, unless it is all there is.

        Args:
            texts: number of the text that each token is of, (T,) integer.
        """
        n = len(tokens) // length
        self.sequences = tokens[: n * length].view(n, length) if n else tokens[None]
        owners = texts[: n * length].view(n, length) if n else texts[None]
        self.groups: list[int] = owners.mode(1).values.tolist()

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences[index].long()}


def cut_few(documents: Sequence[str]) -> list[Piece]:
    """The documents as they are or, where there are few, the long ones in pieces.

    Pieces end after a line where that is possible, after a blank otherwise, and are contiguous:
    put together again they are the document.
    """
    distinct = set(documents)
    size = -(-sum(map(len, distinct)) // PIECES) if len(distinct) < FEW else None
    return [
        Piece(text, number, place)
        for number, document in enumerate(documents)
        for place, text in enumerate(_cut(document, size) if size else [document])
    ]


def _cut(text: str, size: int) -> Iterator[str]:
    start = 0
    while len(text) - start > size:
        # In the second half of the piece only, or one early line end would leave a crumb.
        low, high = start + size // 2, start + size
        ends = (text.rfind(mark, low, high) + 1 for mark in "\n \t")
        stop = next((end for end in ends if end), high)
        yield text[start:stop]
        start = stop
    yield text[start:]


def stretches(size: int) -> list[int]:
    """Groups of ``size`` sequences of few documents: what is near in one text is alike."""
    return [i * PIECES // size for i in range(size)]


def join(
    pieces: Sequence[Piece], tokens: Sequence[Tensor], prefix: Tensor, suffix: Tensor
) -> tuple[Tensor, Tensor]:
    """One stream of tokens, (T,) int32, and the number of the text each is of, (T,) int64.

    Texts that are the same have one number. The special tokens between two are of the later one.

    Args:
        pieces: at least one. Documents are kept apart by special tokens, pieces that follow each
            other in a document are not.
        tokens: (t_i,) int32 of each piece, without special tokens.
        prefix, suffix: special tokens before and after a document.
    """
    numbers: dict[str, int] = {}
    stream, texts = [], []
    before: Piece | None = None
    for piece, own in zip(pieces, tokens, strict=True):
        added = [own]
        if before is None:
            added = [prefix, own]
        elif not piece.follows(before):
            added = [suffix, prefix, own]
        stream += added
        number = numbers.setdefault(piece.text, len(numbers))
        texts.append(torch.full((sum(map(len, added)),), number))
        before = piece
    return torch.cat(stream), torch.cat(texts)
