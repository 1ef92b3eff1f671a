"""Every random number of the project: a pure function of (seed, purpose, position).

Philox (Salmon et al. 2011) is counter-based: the key (seed, purpose) names a stream, the counter a place in it.
One purpose, one stream: noise that shared a stream with the posterior draw would equal it.
Only raw 64-bit words and NumPy's float32 normals are used; golden values in the tests pin both.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a stream is for.  The numbers are part of every run's identity: never change or reuse one."""

    SHARD_ORDER = 1
    BLOCK_ORDER = 2
    POSTERIOR = 3
    NOISE = 4
    TIMESTEP = 5
    CONDITION_DROPOUT = 6
    SAMPLE = 7
    INITIAL_WEIGHTS = 8
    LINE_START = 9
    CROP = 10
    FLIP = 11
    SUBSTITUTE = 12
    TIMESTEP_ALONE = 13
    LIKELIHOOD_POSTERIOR = 14
    LIKELIHOOD_TIMESTEPS = 15
    LIKELIHOOD_NOISE = 16
    LIKELIHOOD_PROBE = 17
    TRANSFORM = 18
    EVIDENCE_POSTERIOR = 19
    EVIDENCE_FIT = 20
    VALIDATION_TIMESTEP = 21
    VALIDATION_NOISE = 22


def stream(seed: int, purpose: Purpose, place: int, *, fine: int = 0, finer: int = 0) -> np.random.Philox:
    """The stream's generator at a place.  Word 0 of the counter is left to count within the place.

    All numbers in [0, 2^64).
    """
    # As uint64 arrays: a list of Python integers from 2^63 on would be rounded to float64 on its way.
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, finer, fine, place], dtype=np.uint64))


def permutation(n: int, seed: int, purpose: Purpose, place: int, *, fine: int = 0, finer: int = 0) -> NDArray[np.int64]:
    """A uniform permutation of range(n), int64 [n]: the order that sorts n random 64-bit words."""
    words = stream(seed, purpose, place, fine=fine, finer=finer).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


def uniform(seed: int, purpose: Purpose, place: int) -> float:
    """One number in [0, 1) with 53 random bits."""
    return float(int(stream(seed, purpose, place).random_raw()) >> 11) * 2.0**-53


def uniforms(seed: int, purpose: Purpose, place: int, count: int) -> NDArray[np.float64]:
    """Independent numbers in [0, 1) with 53 random bits, float64 [count]."""
    return (stream(seed, purpose, place).random_raw(count) >> np.uint64(11)) * np.float64(2.0**-53)


def normal(
    seed: int, purpose: Purpose, place: int, shape: tuple[int, ...], *, fine: int = 0, finer: int = 0
) -> NDArray[np.float32]:
    """Independent N(0, 1) numbers, float32 of the given shape."""
    generator = np.random.Generator(stream(seed, purpose, place, fine=fine, finer=finer))
    return generator.standard_normal(shape, dtype=np.float32)


def signs(seed: int, purpose: Purpose, place: int, shape: tuple[int, ...], *, fine: int = 0) -> NDArray[np.float32]:
    """Independent signs, -1 or 1 with equal probability, float32 of the given shape."""
    words = stream(seed, purpose, place, fine=fine).random_raw(int(np.prod(shape)))
    return ((words >> np.uint64(63)).astype(np.float32) * 2 - 1).reshape(shape)


def integer_seed(seed: int, purpose: Purpose, place: int) -> int:
    """A 63-bit seed for a generator that is not ours (a torch.Generator)."""
    return int(stream(seed, purpose, place).random_raw()) >> 1
