"""Between arrays as files hold them and torch's tensors, without a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .dtypes import DTYPES, Array, Dtype

if TYPE_CHECKING:
    # What holds them reads them with the help of this module.
    from .checkpoints.base import Checkpoint


def torch_dtype(dtype: Dtype) -> torch.dtype:
    found = getattr(torch, dtype.name)
    assert isinstance(found, torch.dtype)
    return found


def dtype_of(dtype: torch.dtype) -> Dtype:
    """Any of torch's dtypes, those that no file is written in included."""
    name = str(dtype).removeprefix("torch.")
    return DTYPES.get(name) or Dtype(name, None, np.dtype(f"u{dtype.itemsize}"))


def as_tensor(array: Array, dtype: Dtype) -> Tensor:
    """The same memory as a tensor. ``array`` is of ``dtype.array`` and can be written to."""
    tensor = torch.from_numpy(array)
    wanted = torch_dtype(dtype)
    return tensor if tensor.dtype == wanted else tensor.view(wanted)


def tensor_rows(
    checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None
) -> Tensor:
    """Rows [start, stop) of dimension 0 in the saved dtype, all of them if not said otherwise.

    A new tensor of shape (stop - start, *shape[1:]); a 0-d tensor is its own single row.
    """
    info = checkpoint.tensors[name]
    rows = checkpoint.rows(name, start, info.rows if stop is None else stop)
    return as_tensor(rows, info.dtype)
