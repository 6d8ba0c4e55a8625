"""Numbers of every dtype: to float64 and back, against torch and against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from twa_merge.dtypes import DTYPES, Dtype, narrow, widen
from twa_merge.tensors import as_tensor, dtype_of, torch_dtype

FLOATS = [d for d in DTYPES.values() if d.is_float]
NARROW = [d for d in FLOATS if d.itemsize < 4]


def every_number(dtype: Dtype) -> Tensor:
    """All numbers of a dtype of one or two bytes."""
    codes = np.arange(256**dtype.itemsize).astype(f"<u{dtype.itemsize}").view(dtype.array)
    return as_tensor(codes, dtype)


def as_array(tensor: Tensor) -> np.ndarray:
    """The same memory, as files hold it."""
    array = dtype_of(tensor.dtype).array
    return tensor.flatten().view(torch.uint8).numpy().view(array).reshape(tuple(tensor.shape))


def narrowed(numbers: np.ndarray, dtype: Dtype) -> Tensor:
    m = len(numbers)
    out = np.empty(m, dtype.array)
    narrow(numbers.copy(), dtype, out, np.empty(m, np.float32), np.empty(m))
    return as_tensor(out, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_dtypes_are_torchs(dtype: Dtype) -> None:
    theirs = torch_dtype(dtype)
    assert dtype_of(theirs) == dtype
    assert (dtype.itemsize, dtype.is_complex) == (theirs.itemsize, theirs.is_complex)
    assert dtype.is_float == theirs.is_floating_point
    if dtype.is_float:
        assert dtype.largest == torch.finfo(theirs).max
    tensor = torch.ones(2, 3, dtype=theirs)
    array = as_array(tensor)
    assert (array.shape, array.dtype) == ((2, 3), dtype.array)
    assert as_tensor(array, dtype).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_number_is_widened_exactly_and_comes_back(dtype: Dtype) -> None:
    numbers = every_number(dtype)
    wide = np.empty(len(numbers))
    widen(as_array(numbers), dtype, wide, np.empty(len(numbers), np.float32))
    assert np.array_equal(wide, numbers.double().numpy(), equal_nan=True)
    known = ~np.isnan(wide)
    again = narrowed(wide[known], dtype).double().numpy()
    assert np.array_equal(again, wide[known])
    assert np.array_equal(np.signbit(again), np.signbit(wide[known]))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_is_to_the_nearest_and_ties_go_to_even(dtype: Dtype) -> None:
    """Between all neighbours: the middle, what is next to it in float64, and anywhere."""
    numbers = every_number(dtype).double().numpy()
    steps = np.unique(numbers[np.isfinite(numbers)])
    low, high = steps[:-1], steps[1:]
    middle = (low + high) / 2
    places = {-1: np.nextafter(middle, low), 0: middle, 1: np.nextafter(middle, high)}
    share = np.random.default_rng(0).random(len(low))
    places[2] = low + share * (high - low)
    even = as_array(narrowed(low, dtype)).view(f"u{dtype.itemsize}") % 2 == 0
    for side, exact in places.items():
        upper = {-1: np.zeros(len(low), bool), 0: ~even, 1: np.ones(len(low), bool)}
        chosen = np.where(upper.get(side, exact > middle), high, low)
        assert np.array_equal(narrowed(exact, dtype).double().numpy(), chosen)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_too_large_is_not_finite(dtype: Dtype) -> None:
    if dtype.name == "float64":
        return
    signs = (1.0,) if dtype.name == "float8_e8m0fnu" else (1.0, -1.0)
    for sign in signs:
        large = sign * dtype.largest * np.array([1.0, 2.0, 1e4])
        assert narrowed(large, dtype).double().isfinite().tolist() == [True, False, False]
