"""The task ``causal-lm``: a Hugging Face causal language model and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import TaskError
from ..task import split_groups
from .documents import read_documents
from .packing import FEW, Packed, Piece, cut_few, join, stretches
from .pretrained import build, load_config, load_tokenizer, places, renamings

_DEFAULT_LENGTH = 1024
# Logits that are widened to float32 at a time: 256 MiB of them.
_CHUNK = 1 << 26


class CausalLM:
    """Next-token prediction on packed text; a `Task` (see ``twa_merge.task``).

    An example is a sequence of ``max_length`` tokens, its loss the mean negative log-likelihood in
    nats of every token but the first. Documents are joined by the end-of-text token, if there is
    one, and by whatever the tokenizer itself puts around a text.

    Attributes:
        config: the model's configuration.
        tokenizer: the model's tokenizer.
        max_length: tokens a sequence.
    """

    def __init__(
        self,
        data: str | Path,
        checkpoint: Path | None,
        model: str | None = None,
        max_length: int | None = None,
        *,
        tokenizer: str | None = None,
        text_field: str = "text",
        label_smoothing: float = 0.0,
        trust_remote_code: bool = False,
    ) -> None:
        """Reads configuration, tokenizer and text, so that what is missing is known at once.

        Args:
            data: ``.txt`` (one document a file), ``.jsonl``, ``.parquet`` (one a row), a folder or
                a glob of them.
            checkpoint: folder, or weights file in it, whose configuration and tokenizer are used;
                the folder above it is searched as well.
            model: folder or Hub name that both come from instead.
            max_length: tokens a sequence; the model's maximum, but at most 1024, by default.
            tokenizer: folder or Hub name that the tokenizer comes from instead.
            text_field: column of ``.jsonl`` and ``.parquet`` that holds the text.
            label_smoothing: mixed into the loss where it is differentiated, and only there:
                losses that are reported or compared are those of the true tokens.
            trust_remote_code: run model code that comes with the checkpoint.

        Raises:
            TaskError: a package, the configuration, the tokenizer or the text is missing or wrong.
        """
        if not 0.0 <= label_smoothing < 1.0:
            raise TaskError(
                "--label-smoothing is out of range.",
                expected="a number from 0 up to, but not including, 1",
                found=label_smoothing,
            )
        self.label_smoothing = label_smoothing
        self.trust_remote_code = trust_remote_code
        near = places(checkpoint)
        self.config = load_config(model, near, trust_remote_code)
        self.max_length = self._length(max_length)
        self.tokenizer = load_tokenizer(tokenizer or model, near, trust_remote_code)
        self._documents = read_documents(data, text_field)

    def build_model(self) -> nn.Module:
        """The architecture in float32, in evaluation mode, tied weights tied.

        Parameters are uninitialised; buffers have their values. Works under a context that
        creates parameters (and only those) on the meta device.

        Raises:
            TaskError: there is no causal language model for this configuration.
        """
        return build(self.config, self.trust_remote_code)

    def model_names(self, model: nn.Module, names: Sequence[str]) -> dict[str, str]:
        """Checkpoint tensor → what transformers renames it to as it loads it, where it does."""
        return renamings(model, names)

    def dataset(self) -> Packed:
        """All of the text.

        Raises:
            TaskError: it is too short, or does not fit the model's vocabulary.
        """
        pieces = [Piece(text, number) for number, text in enumerate(self._documents)]
        packed = self._pack(pieces, self._tokenize(pieces))
        if len(set(self._documents)) < FEW:
            packed.groups = stretches(len(packed))
        return packed

    def split(self, guard_fraction: float, seed: int) -> tuple[Packed, Packed]:
        """Two disjoint parts of the text, by document; identical documents stay together.

        Where there are few documents, the long ones are cut into contiguous pieces first.

        Args:
            guard_fraction: share of the tokens that goes to the guard part.
            seed: of the order in which documents are drawn.

        Raises:
            TaskError: the text is too short for two parts, or does not fit the vocabulary.
        """
        pieces = cut_few(self._documents)
        tokens = self._tokenize(pieces)
        sides = split_groups([p.text for p in pieces], guard_fraction, seed, [*map(len, tokens)])
        if not all(sides):
            raise TaskError(
                "There is too little data to be split.",
                expected="two different documents or pieces of one",
                found="the same text again and again",
                remedy="give more data",
            )
        fit, guard = ([pieces[i] for i in side] for side in sides)
        fit_tokens, guard_tokens = ([tokens[i] for i in side] for side in sides)
        return self._pack(fit, fit_tokens), self._pack(guard, guard_tokens)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean negative log-likelihood a token in nats, shape (batch,), float32."""
        return self._mean_losses(*_predictions(model, batch))

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``accuracy``: share of the tokens that the model ranks first, shape (batch,), float32."""
        return _accuracy(*_predictions(model, batch))

    def loss_and_metrics(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``loss`` and ``metrics`` from one forward pass."""
        logits, targets = _predictions(model, batch)
        return self._mean_losses(logits, targets), _accuracy(logits, targets)

    def _mean_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.0
        flat = token_losses(logits.flatten(0, 1), targets.flatten(), smoothing)
        return flat.view(targets.shape).mean(1)

    def _length(self, wanted: int | None) -> int:
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        length = wanted or min(limit or _DEFAULT_LENGTH, _DEFAULT_LENGTH)
        if length < 2 or (limit and length > limit):
            raise TaskError(
                "--max-length is out of range.",
                expected=f"from 2 to {limit}, the model's maximum" if limit else "at least 2",
                found=length,
            )
        return length

    def _tokenize(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Tokens of each piece, (t_i,) int32, without special tokens."""
        tokens = []
        for start in range(0, len(pieces), 256):
            texts = [piece.text for piece in pieces[start : start + 256]]
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
            tokens += [torch.tensor(ids, dtype=torch.int32) for ids in encoded["input_ids"]]
        return tokens

    def _pack(self, pieces: Sequence[Piece], tokens: Sequence[Tensor]) -> Packed:
        stream, texts = join(pieces, tokens, *self._separators())
        size = self.config.get_text_config().vocab_size
        if len(stream) < 2:
            raise TaskError(
                "The data is too short for one sequence.",
                expected="at least 2 tokens in every part of it",
                found=len(stream),
                remedy="give more data",
            )
        if int(stream.max()) >= size:
            raise TaskError(
                "The tokenizer does not fit the model.",
                expected=f"token ids below {size}, the model's vocabulary",
                found=int(stream.max()),
                remedy="give the model's own tokenizer: --tokenizer FOLDER or a Hub name",
            )
        return Packed(stream, self.max_length, texts)

    def _separators(self) -> tuple[Tensor, Tensor]:
        """What stands before and after a document: (p,) and (s,) int32."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        starts = range(len(whole) - len(plain) + 1)
        at = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
        prefix, suffix = whole[:at], whole[at + len(plain) :]
        end = self.tokenizer.eos_token_id
        if end is not None and suffix[-1:] != [end]:
            suffix = [*suffix, end]
        return torch.tensor(prefix, dtype=torch.int32), torch.tensor(suffix, dtype=torch.int32)


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each token, (N,) float32, from (N, V) logits of any float dtype."""
    rows = max(1, _CHUNK // logits.shape[1])
    if len(targets) <= rows:
        return _losses(logits.float(), targets, smoothing)
    return _ChunkedLosses.apply(logits, targets, smoothing, rows)


class _ChunkedLosses(torch.autograd.Function):
    """Cross-entropy that keeps the logits and nothing else of their size for the backward pass.

    Autograd would keep the float32 logits and their log-softmax. Recomputing the latter chunk by
    chunk costs little: it is the product with the vocabulary before it that takes the time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, smoothing: float, rows: int) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.options = (smoothing, rows)
        chunks = zip(logits.split(rows), targets.split(rows), strict=True)
        return torch.cat([_losses(x.float(), t, smoothing) for x, t in chunks])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits, targets = ctx.saved_tensors
        smoothing, rows = ctx.options
        result = torch.empty_like(logits)
        chunks = (x.split(rows) for x in (logits, targets, grad, result))
        for x, t, g, out in zip(*chunks, strict=True):
            with torch.enable_grad():
                wide = x.detach().float().requires_grad_()
                losses = _losses(wide, t, smoothing)
            out.copy_(torch.autograd.grad(losses, wide, g)[0])
        return result, None, None, None


def _losses(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


def _predictions(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (batch, length - 1, vocabulary) and the tokens that come next, (batch, length - 1)."""
    ids = batch["input_ids"]
    return model(input_ids=ids[:, :-1]).logits, ids[:, 1:]


def _accuracy(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"accuracy": (logits.argmax(-1) == targets).float().mean(1)}
