"""Every choice a user can make, validated when it is made."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from .errors import ConfigError

Paths = Sequence[str | PathLike[str]]

BLOCKS = ("auto", "global", "layers", "tensors")
OPTIMIZERS = ("lbfgs", "sgd", "adamw")
SCHEDULES = ("constant", "step", "linear", "cosine")
STARTS = ("auto", "mean", "last")
BATCH_NORM = ("auto", "reestimate", "average", "newest")
STORES = ("auto", "device", "host", "disk")
STORE_DTYPES = ("auto", "float32", "bfloat16", "int8", "int4", "int1")
PRECISIONS = ("fp32", "bf16")
GATHERS = ("auto", "layer", "model")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Choices that mean something to some optimizers only.
_FIRST_ORDER = ("sgd", "adamw")
_OF_OPTIMIZERS = {
    "max_evaluations": ("lbfgs",),
    "tolerance": ("lbfgs",),
    "lr": _FIRST_ORDER,
    "momentum": ("sgd",),
    "weight_decay": _FIRST_ORDER,
    "epochs": _FIRST_ORDER,
    "schedule": _FIRST_ORDER,
    "sharpness": _FIRST_ORDER,
}


# What a field's annotation stands for: the values it takes, and their name.
_TYPES: dict[str, tuple[type, str]] = {
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "str": (str, "text"),
    "bool": (bool, "True or False"),
    "None": (type(None), "None"),
}


def _require_types(config: Any) -> None:
    """Checks that every value is of its field's type: they come from Python code as well.

    Numbers of other libraries, such as numpy's, become Python's own, which can be written as JSON.
    """
    for each in dataclasses.fields(config):
        value, names = getattr(config, each.name), str(each.type).split(" | ")
        # True is a whole number to Python.
        if isinstance(value, bool) != ("bool" in names) or not any(
            isinstance(value, _TYPES[name][0]) for name in names
        ):
            raise ConfigError(
                f"{type(config).__name__}: {each.name} is of another type.",
                expected=" or ".join(_TYPES[name][1] for name in names),
                found=repr(value),
            )
        if isinstance(value, numbers.Real) and type(value) not in (bool, int, float):
            own = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(config, each.name, own)


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(
            f"{option} does not know {value!r}.", expected=", ".join(allowed), found=value
        )


def _at_least(option: str, value: float | None, least: float) -> None:
    if value is not None:
        # Not math.isfinite, which integers can be too large for.
        _in_range(option, least <= value < math.inf, f"a number of at least {least}", value)


def _in_range(option: str, holds: bool, expected: str, value: float) -> None:
    if not holds:
        raise ConfigError(f"{option} is out of range.", expected=expected, found=value)


def _is_number(text: str) -> bool:
    """Whether digits alone: ``isdigit`` knows ² too, which ``int`` does not."""
    return text.isascii() and text.isdecimal()


@dataclass(frozen=True)
class Selection:
    """Which checkpoints of a run take part.

    Attributes:
        last: only the last K of those left by the other options.
        every: every K-th, counted back from the newest, which always stays.
        from_step, to_step: training steps, both ends included.
    """

    last: int | None = None
    every: int | None = None
    from_step: int | None = None
    to_step: int | None = None

    def __post_init__(self) -> None:
        _require_types(self)
        _at_least("--last", self.last, 1)
        _at_least("--every", self.every, 1)


@dataclass(frozen=True)
class DataConfig:
    """How the task's data is divided and batched.

    Attributes:
        guard_fraction: share of the examples that picks the winner and fits nothing.
        seed: of the split and of everything else that is drawn.
        batch_size: examples a forward pass.
        sample: examples of the fit split to use at most; None grows the sample by itself.
    """

    guard_fraction: float = 0.25
    seed: int = 0
    batch_size: int = 32
    sample: int | None = None

    def __post_init__(self) -> None:
        _require_types(self)
        share = self.guard_fraction
        _in_range("--guard-fraction", 0.0 < share < 1.0, "a number between 0 and 1", share)
        _in_range("--seed", 0 <= self.seed < 2**63, "0 to 2⁶³ - 1", self.seed)
        _at_least("--batch-size", self.batch_size, 1)
        _at_least("--fit-examples", self.sample, 1)


@dataclass(frozen=True)
class FitConfig:
    """How the coefficients are trained.

    Attributes:
        blocks: what shares one set of coefficients; ``auto`` tries each tensor and each layer (with
            the paper's optimizers, the whole model alone).
        optimizer: ``lbfgs`` needs no learning rate; ``sgd`` and ``adamw`` are the paper's training.
        ridge: weight of ‖z‖²/2, in units of the loss per standard deviation squared; None chooses
            it on data that the fit did not see, in the order of magnitude that losses differ by,
            and weakens it as the sample grows.
        max_evaluations: of loss and gradient, for each stage and each size of a growing sample.
            Fits that choose a ridge take more, up to 12 each.
        tolerance: relative decrease of the loss under which the fit has converged.
        start: ``auto``, ``mean``, ``last`` or a training step.
        span: ``affine`` (around the mean, Σ α = 1) or the paper's uncentred ``linear`` span.
        subspace: ``checkpoints``, ``pca:R`` or ``random:R``.
        lr, momentum, weight_decay, epochs, schedule: of ``sgd`` and ``adamw``.
        label_smoothing: mixed into the loss by tasks that know it (``causal-lm``).
        sharpness: radius of sharpness-aware steps in coordinates, of ``sgd`` and ``adamw``; 0 for
            none.

    Raises:
        ConfigError: a value is out of range, or the optimizer makes no use of what was chosen.
    """

    blocks: str = "auto"
    optimizer: str = "lbfgs"
    ridge: float | None = None
    max_evaluations: int = 40
    tolerance: float = 1e-5
    start: str = "auto"
    span: str = "affine"
    subspace: str = "checkpoints"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    epochs: int = 10
    schedule: str = "cosine"
    label_smoothing: float = 0.0
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        _require_types(self)
        _one_of("--blocks", self.blocks, BLOCKS)
        _one_of("--optimizer", self.optimizer, OPTIMIZERS)
        _one_of("--schedule", self.schedule, SCHEDULES)
        _one_of("--span", self.span, ("affine", "linear"))
        _at_least("--ridge", self.ridge, 0.0)
        _at_least("--max-evaluations", self.max_evaluations, 1)
        _at_least("--tolerance", self.tolerance, 0.0)
        _in_range("--lr", 0.0 < self.lr < math.inf, "a number above 0", self.lr)
        momentum = self.momentum
        _in_range("--momentum", 0.0 <= momentum < 1.0, "a number from 0 to below 1", momentum)
        _at_least("--weight-decay", self.weight_decay, 0.0)
        _at_least("--epochs", self.epochs, 1)
        _at_least("--label-smoothing", self.label_smoothing, 0.0)
        _at_least("--sharpness", self.sharpness, 0.0)
        if self.start not in STARTS and not _is_number(self.start):
            raise ConfigError(
                "--start is not known.", expected="auto, mean, last or a step", found=self.start
            )
        parse_subspace(self.subspace)
        defaults = type(self)
        require_used(
            self.optimizer,
            (name for name in _OF_OPTIMIZERS if getattr(self, name) != getattr(defaults, name)),
        )


@dataclass(frozen=True)
class StoreConfig:
    """Where the offsets live and how wide they are."""

    kind: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        _require_types(self)
        _one_of("--store", self.kind, STORES)
        _one_of("--store-dtype", self.dtype, STORE_DTYPES)


@dataclass(frozen=True)
class GuardConfig:
    """How the winner is picked.

    Attributes:
        candidates: ``quick``, ``all`` or names separated by commas; ``twa-layers`` is all that is
            fitted by block.
        select: ``loss`` or ``metric:NAME`` (larger is better).
        require_improvement: fail unless the winner beats the best single checkpoint for certain.
        batch_norm: where running statistics of means come from; ``auto`` lets the guard choose. A
            single checkpoint keeps its own, unless ``auto`` finds others better.
    """

    candidates: str = "all"
    select: str = "loss"
    require_improvement: bool = False
    batch_norm: str = "auto"

    def __post_init__(self) -> None:
        _require_types(self)
        _one_of("--batch-norm", self.batch_norm, BATCH_NORM)
        if self.select != "loss" and not self.select.removeprefix("metric:"):
            raise ConfigError("--select names no metric.", expected="loss or metric:NAME")
        if self.select != "loss" and not self.select.startswith("metric:"):
            raise ConfigError(
                "--select is not known.", expected="loss or metric:NAME", found=self.select
            )


@dataclass(frozen=True)
class OutputConfig:
    """How the result is written.

    Attributes:
        dtype: of averaged tensors; None keeps each tensor's saved dtype.
        overwrite: replace an earlier merge in the same place (never anything else).
        fresh: forget the state of an interrupted run instead of continuing it.
    """

    dtype: str | None = None
    overwrite: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        _require_types(self)
        if self.dtype is not None:
            _one_of("--dtype", self.dtype, DTYPES)


@dataclass(frozen=True)
class EngineConfig:
    """What the fit computes on and in.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: of forward and backward passes.
        activation_checkpointing: recompute activations of repeated layers to save memory.
        gather: what a rank gathers of the other ranks' rows: one ``layer`` after the other in every
            pass, or the whole ``model`` once an evaluation, which sends less and takes more memory;
            ``auto`` takes the model in float32 on GPUs of which it fills no more than half.
    """

    device: str = "auto"
    precision: str = "fp32"
    activation_checkpointing: bool = False
    gather: str = "auto"

    def __post_init__(self) -> None:
        _require_types(self)
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--gather", self.gather, GATHERS)


def require_used(optimizer: str, chosen: Iterable[str]) -> None:
    """Checks that the optimizer makes use of the chosen fields of ``FitConfig``.

    Raises:
        ConfigError: it would ignore one.
    """
    for name in chosen:
        optimizers = _OF_OPTIMIZERS.get(name, OPTIMIZERS)
        if optimizer not in optimizers:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option} means nothing to --optimizer {optimizer}.",
                expected=f"{option} with --optimizer {' or '.join(optimizers)}",
                found=f"--optimizer {optimizer}",
                remedy=f"add --optimizer {'|'.join(optimizers)}, or leave {option} out",
            )


def as_paths(given: Any, what: str) -> list[str | PathLike[str]]:
    """One path, or several, as a list.

    Raises:
        ConfigError: something is no path, or there is none.
    """
    one = isinstance(given, (str, PathLike)) or not isinstance(given, Iterable)
    paths: list[Any] = [given] if one else list(given)
    if not all(isinstance(path, (str, PathLike)) for path in paths):
        raise ConfigError(
            f"The {what} are not given as paths.", expected="paths of folders or files", found=given
        )
    if not paths:
        raise ConfigError(f"No {what} were given.", expected="paths of folders or files")
    return paths


def parse_subspace(text: str) -> tuple[str, int | None]:
    """``checkpoints`` → (that, None); ``pca:R`` and ``random:R`` → (the word, R).

    Raises:
        ConfigError: anything else.
    """
    word, _, number = text.partition(":")
    if word == "checkpoints" and not number:
        return word, None
    if word in ("pca", "random") and _is_number(number) and int(number) > 0:
        return word, int(number)
    raise ConfigError(
        "--subspace is not known.", expected="checkpoints, pca:R or random:R", found=text
    )


def as_dict(config: Any) -> dict[str, Any]:
    """The choices of a config as plain values, for reports."""
    return dict(vars(config))
