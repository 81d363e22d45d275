"""Philox4x32-10, which makes random words of a key and a counter alone, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Tensor:
    """Four random words for each counter.

    Args:
        counter: Four words of 32 bits in int64, as tensors that broadcast or numbers, at least one
            of them a tensor.
        key: Two words of 32 bits.

    Returns:
        int64 in [0, 2^32), [..., 4].

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & MASK, (k1 + _WEYL[1]) & MASK
    words = (word for word in (c0, c1, c2, c3) if isinstance(word, Tensor))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def _multiply(constant: int, word: Tensor | int) -> tuple[Tensor | int, Tensor | int]:
    """The upper and the lower 32 bits of a product of two words."""
    # what does not fit in a signed integer wraps around, which leaves the 64 bits as they are
    product = constant * word
    return product >> 32 & MASK, product & MASK
