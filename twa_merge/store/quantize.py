"""Offsets in 8, 4 and 1 bit: really packed, one scale a group.

A group is 128 consecutive numbers of one row of one offset; the last of a row is filled up with
zeros. Its bytes are

- int8: number j in byte j;
- int4: number 16 k + j in nibble k of the 32-bit word j, as q + 8; those of the highest nibble,
  where the word has its sign, as they are;
- int1: number 16 k + j in bit k of byte j, set where it is not negative;

so that unpacking gives runs of 16 consecutive numbers, without any shuffling between lanes: a mask
and a conversion to floating point, which may leave the bits where they are.

int8 and int4 are symmetric, scaled by the group's largest magnitude. One bit keeps the sign alone;
the scale is the group's root mean square, so that every group, and with it every offset, keeps the
norm it had (the renormalisation of Trainable Weight Averaging, arXiv 2205.13104). That is the
design's choice, not the best one measured: with the mean magnitude, which is closest in the
least-squares sense, coefficients fitted to a random quadratic (8 offsets, 20 problems) lost 42 % of
the gain instead of 57 % (4 bits lost 0.8 %, 8 bits less than 0.001 %).

A scale is a float32 number for 128 others: a quarter of a bit each. bfloat16 for 64 costs as much
and is more accurate (relative error of normal numbers at 4 bits 0.108 against 0.117, at 8 bits
0.0060 against 0.0065; 0.161 against 0.194 at 4 bits with heavy tails), but 16-bit numbers in the
kernels made what torch.compile writes for a CPU several times slower. float16 loses offsets around
1e-9 altogether.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128

PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Bytes of a group, and the dtype they are stored in.
GROUP_BYTES = {"int8": 128, "int4": 64, "int1": 16}
CONTAINER = {"int8": torch.int8, "int4": torch.int32, "int1": torch.uint8}
# Where the 8 numbers of a word or byte stand: the bits of each, the factor that brings them down,
# and what is then stored for zero. int1 counts in twos, from −1.
PLANES: dict[str, tuple[tuple[int, float, float], ...]] = {
    "int4": (*((15 << 4 * k, 16.0**-k, 8.0) for k in range(7)), (-1 << 28, 16.0**-7, 0.0)),
    "int1": tuple((1 << k, 2.0 ** (1 - k), 1.0) for k in range(8)),
}
LANES = 16
_TINY = torch.finfo(torch.float32).tiny


def planes(dtype: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """``PLANES`` of a width as three tensors (8, 1); None where a byte is one number."""
    if dtype not in PLANES:
        return None
    masks, factors, zeros = zip(*PLANES[dtype], strict=True)
    return (
        torch.tensor(masks, dtype=torch.int32, device=device)[:, None],
        torch.tensor(factors, dtype=torch.float32, device=device)[:, None],
        torch.tensor(zeros, dtype=torch.float32, device=device)[:, None],
    )


def pack(groups: Tensor, dtype: str, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantises whole groups.

    Args:
        groups: (..., 128) float32; past the end of a row filled up with zeros.
        dtype: ``int8``, ``int4`` or ``int1``.
        real: how many numbers of every group are the row's, to be broadcast to (...,); all
            without it.

    Returns:
        (..., 128 or 16) in the container's dtype, and the scales (...,) float32.
    """
    if dtype == "int1":
        # Squares of what is far from one leave the range of float32.
        largest = groups.abs().amax(-1)
        scale = (groups / largest.clamp(min=_TINY)[..., None]).square_().mean(-1)
        if real is not None:
            scale *= GROUP / real
        scale = scale.sqrt_().mul_(largest)
        bits = (groups >= 0).view(torch.uint8).unflatten(-1, (8, LANES))
        places = torch.arange(8, dtype=torch.uint8, device=groups.device)[:, None]
        return (bits << places).sum(-2, dtype=torch.uint8), scale
    steps = 127.0 if dtype == "int8" else 7.0
    scale = groups.abs().amax(-1).div_(steps)
    # A group of zeros has the scale 0; its numbers must become 0, not 0 / 0.
    q = (groups / scale.clamp(min=_TINY)[..., None]).round_()
    if dtype == "int8":
        return q.to(torch.int8), scale
    nibbles = q.to(torch.int32).unflatten(-1, (8, LANES))
    nibbles[..., :7, :] += 8
    places = torch.arange(0, 32, 4, dtype=torch.int32, device=groups.device)[:, None]
    return (nibbles << places).sum(-2, dtype=torch.int32), scale


def unpack(packed: Tensor, scale: Tensor, dtype: str, out: Tensor) -> Tensor:
    """The numbers again: writes ``out`` (..., 128), float32 or float64, and returns it.

    Args:
        packed: as ``pack`` returns them; ``scale``: (...,) float32.
    """
    places = planes(dtype, out.device)
    if places is None:
        out.copy_(packed)
    else:
        # Eager kernels are half as fast with a last dimension to be spread.
        masks, factors, zeros = (x.expand(-1, LANES).contiguous() for x in places)
        numbers = out.unflatten(-1, (8, LANES))
        numbers.copy_(packed[..., None, :] & masks).mul_(factors).sub_(zeros)
    return out.mul_(scale[..., None])
