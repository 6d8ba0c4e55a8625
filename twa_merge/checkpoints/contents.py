"""What the weights of a checkpoint tell of it: whether they can be averaged, and whose they are."""

from __future__ import annotations

import numpy as np

from ..errors import CheckpointError
from ..json_files import read_json
from .base import Checkpoint
from .folders import folder_of

# Numbers of a tensor, from its start and from its end, that tell it from another one.
_COMPARED = 512


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two hold the same weights, by their shapes and parts of their numbers.

    Raises:
        CheckpointError: they cannot be read.
    """
    if one.tensors != other.tensors:
        return False
    for name, info in one.tensors.items():
        count = min(info.numel, _COMPARED)
        for first in {0, info.numel - count}:
            parts = [np.empty(count, info.dtype.array) for _ in range(2)]
            one.reader.read(name, first, parts[0])
            other.reader.read(name, first, parts[1])
            if parts[0].tobytes() != parts[1].tobytes():
                return False
    return True


def require_unquantised(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where packed integers and their scales stand for the weights.

    The mean of the scales, or of both, is no scale of the mean.
    """
    packed = next(
        (
            name
            for name, info in checkpoint.tensors.items()
            if len(info.shape) > 1 and (info.dtype.itemsize == 1 or not info.dtype.is_float)
        ),
        None,
    )
    config = folder_of(checkpoint) / "config.json"
    if packed is None:
        return
    configuration = read_json(config)
    if isinstance(configuration, dict) and configuration.get("quantization_config"):
        raise CheckpointError(
            "The weights are quantised, so that they cannot be averaged.",
            checkpoint=checkpoint.path,
            tensor=packed,
            expected="weights as they were trained",
            found=f"{checkpoint.tensors[packed].dtype.name}, and a quantization_config",
            remedy="merge the checkpoints before they are quantised, and quantise the result",
        )
