"""The dtypes of saved tensors, and their numbers as float64 and back.

numpy has no bfloat16 and no 8-bit floats: their arrays hold the raw bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Dtype:
    """A dtype by its name in torch.

    Attributes:
        code: its name in a safetensors header; None where that format has no such dtype.
        array: numpy's dtype for arrays of it, of the same size.
    """

    name: str
    code: str | None
    array: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        return self.array.itemsize

    @property
    def is_float(self) -> bool:
        """Whether it is a real floating-point dtype."""
        return "float" in self.name

    @property
    def is_complex(self) -> bool:
        return self.name.startswith("complex")

    @property
    def largest(self) -> float:
        """The largest finite number of a float dtype."""
        if self.name == "bfloat16":
            return float.fromhex("0x1.fep127")
        if self.name in _EIGHT_BIT:
            return float(np.nanmax(np.where(np.isinf(values := _values(self.name)), 0, values)))
        return float(np.finfo(self.array).max)

    def real(self) -> Dtype:
        """The dtype of the two parts of a complex one."""
        return named({"complex64": "float32", "complex128": "float64"}[self.name])

    def __str__(self) -> str:
        return self.name


# Exponent bits, mantissa bits, bias, and whether there is one NaN only, in the place of minus zero.
_EIGHT_BIT = {
    "float8_e4m3fn": (4, 3, 7, False),
    "float8_e5m2": (5, 2, 15, False),
    "float8_e4m3fnuz": (4, 3, 8, True),
    "float8_e5m2fnuz": (5, 2, 16, True),
    "float8_e8m0fnu": (8, 0, 127, False),
}

# By name; the order is that in which messages list them.
DTYPES = {
    name: Dtype(name, code, np.dtype(array))
    for name, code, array in (
        ("float64", "F64", "<f8"),
        ("float32", "F32", "<f4"),
        ("float16", "F16", "<f2"),
        ("bfloat16", "BF16", "<u2"),
        ("float8_e4m3fn", "F8_E4M3", "u1"),
        ("float8_e5m2", "F8_E5M2", "u1"),
        ("float8_e4m3fnuz", "F8_E4M3FNUZ", "u1"),
        ("float8_e5m2fnuz", "F8_E5M2FNUZ", "u1"),
        ("float8_e8m0fnu", "F8_E8M0", "u1"),
        ("complex64", "C64", "<c8"),
        ("complex128", None, "<c16"),
        ("int64", "I64", "<i8"),
        ("int32", "I32", "<i4"),
        ("int16", "I16", "<i2"),
        ("int8", "I8", "i1"),
        ("uint64", "U64", "<u8"),
        ("uint32", "U32", "<u4"),
        ("uint16", "U16", "<u2"),
        ("uint8", "U8", "u1"),
        ("bool", "BOOL", "?"),
    )
}
BY_CODE = {dtype.code: dtype for dtype in DTYPES.values() if dtype.code}


def named(name: str) -> Dtype:
    """The dtype of that name; KeyError for one that is not known here."""
    return DTYPES[name]


# Whoever asks what became of numbers that are not finite looks at the result.
@np.errstate(all="ignore")
def widen(rows: Array, dtype: Dtype, out: Float64, single: NDArray[np.float32]) -> None:
    """The numbers of ``rows`` (m,) of a float dtype as float64, exactly, in ``out`` (m,).

    Args:
        single: (m,) float32, overwritten.
    """
    if dtype.name == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        bits = single.view(np.uint32)
        np.copyto(bits, rows)
        np.left_shift(bits, 16, out=bits)
        rows = single
    elif dtype.name in _EIGHT_BIT:
        np.take(_values(dtype.name), rows, out=out, mode="clip")
        return
    np.copyto(out, rows)


@np.errstate(all="ignore")
def narrow(
    total: Float64, dtype: Dtype, out: Array, single: NDArray[np.float32], spare: Float64
) -> None:
    """``total`` (m,), without NaN, rounded once to a float dtype: to the nearest, ties to even.

    What is too large becomes an infinity, or a NaN in dtypes without one.

    Args:
        total, single, spare: (m,), overwritten.
        out: (m,) of ``dtype.array``.
    """
    if dtype.name == "bfloat16":
        _narrow_bfloat16(total, out, single, spare)
    elif dtype.name in _EIGHT_BIT:
        _narrow_eight_bit(total, dtype.name, out)
    else:
        np.copyto(out, total, casting="same_kind")


# Bits of a float64 that a bfloat16 has no place for.
_DROPPED = 45
_SMALLEST_NORMAL = 2.0**-126


def _narrow_bfloat16(
    total: Float64, out: Array, single: NDArray[np.float32], spare: Float64
) -> None:
    wide, odd = total.view(np.uint64), spare.view(np.uint64)
    bits, shifted = single.view(np.uint32), spare.view(np.uint32)[: len(total)]
    # Through float32 a number could be rounded twice. Half of what is dropped is added instead,
    # or a little less where what stays is even.
    np.right_shift(wide, _DROPPED, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(odd, (1 << _DROPPED - 1) - 1, out=odd)
    np.add(wide, odd, out=odd)
    np.bitwise_and(odd, -1 << _DROPPED & (1 << 64) - 1, out=odd)
    np.copyto(single, spare, casting="same_kind")
    # Numbers too small for that have fewer places. Zero, less one, is the largest integer.
    np.left_shift(bits, 1, out=shifted)
    np.subtract(shifted, 1, out=shifted)
    if shifted.min() < (1 << 24) - 1:
        small = np.abs(total) < _SMALLEST_NORMAL
        single[small] = np.rint(total[small] * 2.0**133) * 2.0**-133
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="same_kind")


def _narrow_eight_bit(total: Float64, name: str, out: Array) -> None:
    *_, unsigned_zero = _EIGHT_BIT[name]
    values = _values(name)[:128] if name != "float8_e8m0fnu" else _values(name)
    finite = values[: int(np.isfinite(values).sum())]
    # The number that would come next, if there were one.
    beyond = 2 * finite[-1] - finite[-2]
    middles = (finite + np.append(finite[1:], beyond)) / 2
    size = np.abs(total)
    index = np.searchsorted(middles, size)
    tie = size == middles[np.minimum(index, len(middles) - 1)]
    index += tie & (index % 2 == 1)
    code = index.astype(np.uint8)
    negative = np.signbit(total)
    if name == "float8_e8m0fnu":
        code[negative] = 255
    else:
        code[negative & ((code > 0) | (not unsigned_zero))] |= 0x80
    np.copyto(out, code)


@functools.lru_cache
def _values(name: str) -> Float64:
    """What each byte of an 8-bit float dtype means, (256,)."""
    exponent_bits, mantissa_bits, bias, unsigned_zero = _EIGHT_BIT[name]
    code = np.arange(256)
    if name == "float8_e8m0fnu":
        return np.where(code < 255, 2.0 ** (code - bias), np.nan)
    exponent = (code >> mantissa_bits) % 2**exponent_bits
    fraction = code % 2**mantissa_bits / 2**mantissa_bits
    size = np.where(
        exponent > 0, (1 + fraction) * 2.0 ** (exponent - bias), fraction * 2.0 ** (1 - bias)
    )
    values = np.where(code < 128, size, -size)
    if unsigned_zero:
        values[128] = np.nan
    elif name == "float8_e5m2":
        top = exponent == 31
        values[top] = np.where(fraction[top] > 0, np.nan, values[top] * np.inf)
    else:
        values[code % 128 == 127] = np.nan
    return values
