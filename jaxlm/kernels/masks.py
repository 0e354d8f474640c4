"""Attention masks as static predicates over positions, never arrays.

A mask answers two questions: `mask(q, k)`, may position q attend to position k (elementwise over broadcastable integer
arrays); and `mask.tile(q0, q1, k0, k1)`, is the tile [q0, q1) x [k0, k1) SKIP, PARTIAL or FULL. `tile` is three-valued
(Kleene) logic, so & is min, | is max and ~ is 2 - x: sound for every combination, and it never looks at an element.
"""

import dataclasses
from typing import Any

import numpy as np

SKIP, PARTIAL, FULL = 0, 1, 2


class Mask:
    """Base of all masks; subclasses are frozen dataclasses, so a mask is a static, hashable argument."""

    def __call__(self, q, k) -> Any:
        raise NotImplementedError

    def tile(self, q0: int, q1: int, k0: int, k1: int) -> int:
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclasses.dataclass(frozen=True)
class And(Mask):
    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) & self.b(q, k)

    def tile(self, q0, q1, k0, k1):
        return min(self.a.tile(q0, q1, k0, k1), self.b.tile(q0, q1, k0, k1))


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) | self.b(q, k)

    def tile(self, q0, q1, k0, k1):
        return max(self.a.tile(q0, q1, k0, k1), self.b.tile(q0, q1, k0, k1))


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    a: Mask

    def __call__(self, q, k):
        return ~self.a(q, k)

    def tile(self, q0, q1, k0, k1):
        return FULL - self.a.tile(q0, q1, k0, k1)


@dataclasses.dataclass(frozen=True)
class Band(Mask):
    """lo <= q - k <= hi, None for no bound. Causal is Band(0, None), a causal window of w keys Band(0, w - 1)."""

    lo: int | None = None
    hi: int | None = None

    def __call__(self, q, k):
        distance = q - k
        ok = distance == distance
        if self.lo is not None:
            ok = ok & (distance >= self.lo)
        if self.hi is not None:
            ok = ok & (distance <= self.hi)
        return ok

    def tile(self, q0, q1, k0, k1):
        nearest, farthest = q0 - (k1 - 1), (q1 - 1) - k0
        lo = nearest if self.lo is None else self.lo
        hi = farthest if self.hi is None else self.hi
        if farthest < lo or nearest > hi:
            return SKIP
        return FULL if lo <= nearest and farthest <= hi else PARTIAL


@dataclasses.dataclass(frozen=True)
class KeysBefore(Mask):
    """k < n: the prefix of a prefix-LM, global keys."""

    n: int

    def __call__(self, q, k):
        return (k < self.n) & (q == q)

    def tile(self, q0, q1, k0, k1):
        return FULL if k1 <= self.n else SKIP if k0 >= self.n else PARTIAL


@dataclasses.dataclass(frozen=True)
class QueriesBefore(Mask):
    """q < n: global queries."""

    n: int

    def __call__(self, q, k):
        return (q < self.n) & (k == k)

    def tile(self, q0, q1, k0, k1):
        return FULL if q1 <= self.n else SKIP if q0 >= self.n else PARTIAL


EVERYTHING = Band()
CAUSAL = Band(lo=0)


def window(size: int) -> Mask:
    """Causal, seeing `size` keys, itself included (transformers' `sliding_window`)."""
    if size < 1:
        raise ValueError(f"window {size=} must be at least 1")
    return Band(lo=0, hi=size - 1)


def prefix_lm(n: int) -> Mask:
    """Causal, with the first n positions visible to everyone."""
    return CAUSAL | KeysBefore(n)


def dense(mask: Mask, t: int, s: int) -> np.ndarray:
    """The mask as bool [t, s], for tests and for looking at it."""
    return np.asarray(mask(np.arange(t)[:, None], np.arange(s)[None, :]))
