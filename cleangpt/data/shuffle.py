"""The order of samples: a pseudo-random permutation that is computed, never stored (design rule 2).

A Feistel network (Luby and Rackoff 1988, "How to construct pseudorandom permutations") is a bijection on the numbers
of a fixed count of bits whatever its round function; walking its cycle until the value falls below n (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", section 3) makes it a bijection on range(n). The bits are chosen
so that fewer than two evaluations are expected. Any position costs the same, and the memory is that of the answer.
On few bits its permutations are mostly even, or mostly odd, so a range of up to `FEW` numbers is sorted by random keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ROUNDS, FEW = 8, 64
WORD = 2**64 - 1


def permute(positions: NDArray[np.integer], n: int, key: int, back: bool = False) -> NDArray[np.int64]:
    """The image of each position under a keyed permutation of `range(n)`.

    Args:
        positions: any shape, each from 0 to n - 1.
        n: size of the range, 1 to 2**62.
        key: chooses the permutation, 0 to 2**64 - 1.
        back: apply the inverse permutation instead.
    """
    if not 1 <= n <= 2**62:
        raise ValueError(f"n is {n}; allowed: 1 to 2**62")
    values = np.asarray(positions, dtype=np.int64).astype(np.uint64)
    if values.size and values.max() >= n:
        raise ValueError(f"a position is {np.asarray(positions).max()} of {n}")
    if n <= FEW:
        order = np.array(sorted(range(n), key=lambda number: mix(key, number)), np.int64)
        return (np.argsort(order) if back else order)[values]
    flat = _feistel(values.reshape(-1), n, key, back)
    while (outside := np.flatnonzero(flat >= n)).size:
        flat[outside] = _feistel(flat[outside], n, key, back)
    return flat.reshape(values.shape).astype(np.int64)


def mix(*numbers: int) -> int:
    """A well-mixed 64-bit number from several; used to derive keys (finaliser of splitmix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & WORD
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Order:
    """An endless order of samples, a fresh permutation every epoch; a position is the number of samples before it."""

    num_samples: int
    seed: int

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch and the sample at each position, both `(batch,)`."""
        epochs = positions // self.num_samples
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            within = positions[inside] - epoch * self.num_samples
            samples[inside] = permute(within, self.num_samples, mix(self.seed, int(epoch)))
        return epochs, samples

    def positions(self, samples: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The position of each of the samples `(samples,)` in an epoch."""
        return epoch * self.num_samples + permute(samples, self.num_samples, mix(self.seed, epoch), back=True)

    def offset(self, epoch: int, seq_len: int) -> int:
        """By how many tokens, 0 to seq_len - 1, the windows of an epoch are shifted."""
        return mix(self.seed, epoch, seq_len) % seq_len


def _feistel(values: NDArray[np.uint64], n: int, key: int, back: bool) -> NDArray[np.uint64]:
    bits = max(1, (n - 1).bit_length())
    low_bits = np.uint64(bits - bits // 2)
    low_mask, high_mask = (np.uint64((1 << width) - 1) for width in (bits - bits // 2, bits // 2))
    high, low = values >> low_bits, values & low_mask
    keys = _round_keys(key)
    rounds = list(zip(keys[::2], keys[1::2], strict=True))
    for even, odd in () if back else rounds:
        low = low ^ (splitmix(high + even) & low_mask)
        high = high ^ (splitmix(low + odd) & high_mask)
    for even, odd in reversed(rounds) if back else ():
        high = high ^ (splitmix(low + odd) & high_mask)
        low = low ^ (splitmix(high + even) & low_mask)
    result: NDArray[np.uint64] = (high << low_bits) | low
    return result


@lru_cache(maxsize=64)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(mix(key, number)) for number in range(ROUNDS))


def splitmix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Well-mixed numbers, each from one number."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return result
