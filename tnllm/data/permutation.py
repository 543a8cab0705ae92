"""Randomness without state: a 64-bit hash, and a permutation of any size made from it.

splitmix64(7)                                   # an int, or each element of a uint64 array
permute(index, size=1000, key=splitmix64(7))    # where a random permutation of range(1000) sends `index`
"""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

_MASK = (1 << 64) - 1
Bits = TypeVar("Bits", int, np.ndarray)


def splitmix64(bits: Bits) -> Bits:
    """Scramble 64 bits: of an int, or of each element of a uint64 array (Steele, Lea and Flood, 2014)."""
    # Arrays wrap around by themselves.
    wrap: Callable[[Any], Any] = _MASK.__and__ if isinstance(bits, int) else lambda array: array
    bits = wrap(bits + 0x9E3779B97F4A7C15)
    bits = wrap((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9)
    bits = wrap((bits ^ (bits >> 27)) * 0x94D049BB133111EB)
    return bits ^ (bits >> 31)


def permute(index: int, size: int, key: int) -> int:
    """Where the pseudo-random permutation of range(size) that `key` chooses sends `index`.

    A four-round Feistel network over the next even power of two, repeated until the result is below `size` (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    assert 0 <= index < size, (index, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (splitmix64(key ^ (turn << 56) ^ right) & mask)
        index = left << half | right
        if index < size:
            return index
