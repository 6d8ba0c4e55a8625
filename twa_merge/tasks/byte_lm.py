"""A small language model on bytes, and text for it that every machine has."""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..errors import TaskError

# What other people installed, tests of the interpreter, and tables that are no text.
_SKIPPED = {
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"),
    *("encodings", "pydoc_data"),
}
_ENOUGH_BYTES = 1_000_000


@dataclass(frozen=True)
class ByteConfig:
    """Size of a ``ByteTransformer``; the defaults have 0.4 million parameters."""

    width: int = 96
    layers: int = 3
    heads: int = 3
    context: int = 128


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: ByteConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) → the same."""
        batch, time, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, time, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))))


class ByteTransformer(nn.Module):
    """A GPT whose tokens are bytes: learned positions, pre-norm layers, an untied head."""

    def __init__(self, config: ByteConfig = ByteConfig()) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(256, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Bytes (batch, time), integer → logits of each next byte (batch, time, 256)."""
        hidden = self.embedding(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))

    def reset(self, seed: int) -> None:
        """Starting weights of a training run, drawn from ``seed`` alone."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                # The two projections into the residual stream shrink with its number of terms.
                shrink = (2 * self.config.layers) ** -0.5 if "_out." in name else 1.0
                nn.init.normal_(parameter, std=shrink * 0.04, generator=generator)


class Sequences(Dataset[Tensor]):
    """Stretches of ``length`` bytes, cut without overlap from documents.

    Args:
        documents: texts; what is left at the end of each is dropped.
        length: bytes a stretch.
        limit: take this many at most, drawn from all by ``seed``.

    Attributes:
        bytes: (sequences, length) uint8.
        documents: index of the document of each sequence.
    """

    def __init__(
        self, documents: Sequence[bytes], length: int, *, limit: int | None = None, seed: int = 0
    ) -> None:
        cuts = [
            (number, start)
            for number, text in enumerate(documents)
            for start in range(0, len(text) - length + 1, length)
        ]
        if not cuts:
            raise TaskError(
                "There is too little text.", expected=f"a text of at least {length} bytes"
            )
        if limit is not None and limit < len(cuts):
            cuts = sorted(random.Random(seed).sample(cuts, limit))
        self.documents = [number for number, _ in cuts]
        joined = bytearray().join(documents[n][start : start + length] for n, start in cuts)
        self.bytes = torch.frombuffer(joined, dtype=torch.uint8).view(len(cuts), length)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Tensor:
        return self.bytes[index]


class ByteTask:
    """Next-byte prediction as a ``twa_merge.Task``; one example is one sequence.

    Args:
        held_out: documents that the run was not trained on; coefficients are trained on them.
        test: documents that are only reported on.
        config: of the model that the checkpoints hold.
        sequences: held-out sequences to use at most, drawn by ``seed``.
        test_sequences: the same for ``test``.
    """

    no_split_modules = ("Layer",)

    def __init__(
        self,
        held_out: Sequence[bytes],
        test: Sequence[bytes] | None = None,
        *,
        config: ByteConfig = ByteConfig(),
        sequences: int | None = None,
        test_sequences: int | None = None,
        seed: int = 0,
    ) -> None:
        self.config = config
        # A sequence holds one byte more than the context: the last one is only ever predicted.
        length = config.context + 1
        self._held_out = Sequences(held_out, length, limit=sequences, seed=seed)
        self._test = test and Sequences(test, length, limit=test_sequences, seed=seed)

    def build_model(self) -> nn.Module:
        return ByteTransformer(self.config)

    def dataset(self) -> Sequences:
        return self._held_out

    def test_dataset(self) -> Sequences | None:
        return self._test or None

    def groups(self) -> list[int]:
        return self._held_out.documents

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Mean over each sequence's bytes, in nats: (batch, length) uint8 → (batch,)."""
        return sequence_loss(model, batch)


def sequence_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Nats per byte of each sequence: (batch, length) uint8 → (batch,) float."""
    batch = batch.long()
    logits = model(batch[:, :-1])
    losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).mean(1)


@dataclass(frozen=True)
class Text:
    """Documents in three disjoint parts."""

    train: tuple[bytes, ...]
    held_out: tuple[bytes, ...]
    test: tuple[bytes, ...]


def standard_library_text(
    seed: int = 0, *, held_out: float = 0.1, test: float = 0.1, folder: Path | None = None
) -> Text:
    """The Python standard library's own source, divided by file.

    Files of identical content count as one document, so that no text is in two parts. The same
    interpreter and seed give the same division.

    Args:
        held_out, test: shares of the bytes.
        folder: where to look instead of in the running interpreter's library.

    Raises:
        TaskError: this Python came without (enough of) its source.
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    documents = list({hashlib.sha256(d).digest(): d for d in _sources(folder)}.values())
    total = sum(map(len, documents))
    if total < _ENOUGH_BYTES:
        raise TaskError(
            "There is too little Python source in this interpreter's standard library.",
            expected=f"at least {_ENOUGH_BYTES:,} bytes of .py files in {folder}",
            found=f"{total:,} bytes",
            remedy="use a Python that has its library as plain files, such as one from python.org",
        )
    random.Random(seed).shuffle(documents)
    parts: list[list[bytes]] = []
    for share in (test, held_out):
        part: list[bytes] = []
        while sum(map(len, part)) < share * total:
            part.append(documents.pop())
        parts.append(part)
    return Text(train=tuple(documents), held_out=tuple(parts[1]), test=tuple(parts[0]))


def _sources(folder: Path) -> Iterator[bytes]:
    for place, folders, files in os.walk(folder):
        # Walked into in this order; site-packages may hold more files than all the rest.
        folders[:] = sorted(set(folders) - _SKIPPED)
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(place, name).read_bytes()
