"""Random signs: bits of a hash of a key and a place, in integers throughout."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

# Signs that one hash gives.
WORD = 64

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN, _MIX1, _MIX2 = (
    constant - (1 << 64)
    for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def key_of(seed: int, direction: int, name: str) -> int:
    """64 bits out of all that tells one sequence of signs from another."""
    text = f"{seed}\n{direction}\n{name}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def words_of(keys: Tensor, first: int, count: int) -> Tensor:
    """Numbers first … first + count − 1 of SplitMix64 from each key (R,): (R, count) int64."""
    steps = torch.arange(first + 1, first + count + 1, device=keys.device)
    x = keys[:, None] + steps * _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX1
    x = (x ^ _shifted(x, 27)) * _MIX2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifts right as if int64 had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@functools.lru_cache(maxsize=8)
def table_of_signs(device: torch.device) -> Tensor:
    """Byte → its eight bits as signs, the lowest first, (256, 8) float32."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (2 * bits - 1).to(device, torch.float32)
