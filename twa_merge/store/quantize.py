"""Offsets in 8, 4 and 1 bit: really packed, one scale a group.

A group is 128 consecutive numbers of one row of one offset; the last of a row is filled up with
zeros. Its bytes are

- int8: number j in byte j;
- int4: numbers j and j + 64 in the low and high half of byte j, each as q + 8;
- int1: number 16 k + j in bit k of byte j, set where it is not negative;

so that unpacking gives runs of consecutive numbers, without any shuffling between lanes.

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
CONTAINER = {"int8": torch.int8, "int4": torch.uint8, "int1": torch.uint8}
# Where the numbers of a byte stand: the bits of each, and the factor that makes them what is
# stored. int1 counts in twos, from −1.
PLANES: dict[str, tuple[tuple[int, float], ...]] = {
    "int4": ((15, 1.0), (15 << 4, 1 / 16)),
    "int1": tuple((1 << k, 2.0 ** (1 - k)) for k in range(8)),
}
# What is stored for zero.
ZERO = {"int4": 8.0, "int1": 1.0}


def pack(groups: Tensor, dtype: str, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantises whole groups.

    Args:
        groups: (..., 128) float32; past the end of a row filled up with zeros.
        dtype: ``int8``, ``int4`` or ``int1``.
        real: how many numbers of every group are the row's, to be broadcast to (...,); all
            without it.

    Returns:
        (..., bytes of a group) in the container's dtype, and the scales (...,) float32.
    """
    if dtype == "int1":
        scale = groups.square().mean(-1)
        if real is not None:
            scale *= GROUP / real
        scale = scale.sqrt_()
        bits = (groups >= 0).view(torch.uint8).unflatten(-1, (8, 16))
        places = torch.arange(8, dtype=torch.uint8, device=groups.device)[:, None]
        return (bits << places).sum(-2, dtype=torch.uint8), scale
    largest = 127.0 if dtype == "int8" else 7.0
    scale = groups.abs().amax(-1).div_(largest)
    # A group of zeros has the scale 0; its numbers must become 0, not 0 / 0.
    q = (groups / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_()
    if dtype == "int8":
        return q.to(torch.int8), scale
    nibbles = q.add_(ZERO[dtype]).to(torch.uint8)
    return nibbles[..., :64] | (nibbles[..., 64:] << 4), scale


def unpack(packed: Tensor, scale: Tensor, dtype: str, out: Tensor) -> Tensor:
    """The numbers again: writes ``out`` (..., 128) float32 and returns it.

    Args:
        packed: (..., bytes of a group), as ``pack`` returns them; ``scale``: (...,) float32.
    """
    if dtype == "int8":
        out.copy_(packed)
    elif dtype == "int4":
        out[..., :64].copy_(packed & 15)
        out[..., 64:].copy_(packed >> 4)
        out.sub_(ZERO[dtype])
    else:
        # The bit as it stands in its byte, as a number, divided by what it stands for.
        values = 2 ** torch.arange(8, dtype=torch.uint8, device=out.device)[:, None]
        out.unflatten(-1, (8, 16)).copy_(packed[..., None, :] & values).mul_(2.0 / values).sub_(1.0)
    return out.mul_(scale[..., None])
