"""Attention masks as static predicates over positions, never arrays.

A mask answers two questions: `mask(q, k)`, may position q attend to position k (elementwise over broadcastable integer
arrays); and `mask.tile(q0, q1, k0, k1)`, is the tile [q0, q1) x [k0, k1) SKIP, PARTIAL or FULL (elementwise too, over
numpy integers). `tile` is three-valued (Kleene) logic, so & is min, | is max and ~ is 2 - x: sound for every
combination, and it never looks at an element.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SKIP, PARTIAL, FULL = 0, 1, 2


class Mask:
    """Base of all masks; subclasses are frozen dataclasses, so a mask is a static, hashable argument."""

    def __call__(self, q, k) -> Any:
        raise NotImplementedError

    def tile(self, q0, q1, k0, k1) -> Any:
        raise NotImplementedError

    @property
    def table_block(self) -> int:
        """The block of the tables that the predicate looks up, which a Pallas kernel cannot capture; 0 for none."""
        return 0

    @property
    def relative(self) -> bool:
        """Whether the predicate is one of q - k alone."""
        return False

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
        return np.minimum(self.a.tile(q0, q1, k0, k1), self.b.tile(q0, q1, k0, k1))

    @property
    def table_block(self):
        return math.gcd(self.a.table_block, self.b.table_block)

    @property
    def relative(self):
        return self.a.relative and self.b.relative


@dataclasses.dataclass(frozen=True)
class Or(Mask):
    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) | self.b(q, k)

    def tile(self, q0, q1, k0, k1):
        return np.maximum(self.a.tile(q0, q1, k0, k1), self.b.tile(q0, q1, k0, k1))

    @property
    def table_block(self):
        return math.gcd(self.a.table_block, self.b.table_block)

    @property
    def relative(self):
        return self.a.relative and self.b.relative


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    a: Mask

    def __call__(self, q, k):
        return ~self.a(q, k)

    def tile(self, q0, q1, k0, k1):
        return FULL - self.a.tile(q0, q1, k0, k1)

    @property
    def table_block(self):
        return self.a.table_block

    @property
    def relative(self):
        return self.a.relative


@dataclasses.dataclass(frozen=True)
class Moved(Mask):
    """A mask of q + by and k: that between queries that begin `by` positions later and keys."""

    a: Mask
    by: int

    def __call__(self, q, k):
        return self.a(q + self.by, k)

    def tile(self, q0, q1, k0, k1):
        return self.a.tile(q0 + self.by, q1 + self.by, k0, k1)

    @property
    def table_block(self):
        return self.a.table_block

    @property
    def relative(self):
        return self.a.relative


@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Every query sees every key."""

    def __call__(self, q, k):
        return (q == q) & (k == k)

    def tile(self, q0, q1, k0, k1):
        return _kind(skip=False, full=(np.asarray(q0) < q1) & (np.asarray(k0) < k1))

    @property
    def relative(self):
        return True


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
        return _kind(skip=(farthest < lo) | (nearest > hi), full=(lo <= nearest) & (farthest <= hi))

    @property
    def relative(self):
        return True


@dataclasses.dataclass(frozen=True)
class KeysBefore(Mask):
    """k < n: the prefix of a prefix-LM, global keys."""

    n: int

    def __call__(self, q, k):
        return (k < self.n) & (q == q)

    def tile(self, q0, q1, k0, k1):
        return _kind(skip=(k0 >= self.n) & (q0 == q0), full=k1 <= self.n)


@dataclasses.dataclass(frozen=True)
class QueriesBefore(Mask):
    """q < n: global queries."""

    n: int

    def __call__(self, q, k):
        return (q < self.n) & (k == k)

    def tile(self, q0, q1, k0, k1):
        return _kind(skip=(q0 >= self.n) & (k0 == k0), full=q1 <= self.n)


@dataclasses.dataclass(frozen=True)
class SameChunk(Mask):
    """q // size == k // size: positions in consecutive chunks that do not see each other."""

    size: int

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"chunk size={self.size} must be at least 1")

    def __call__(self, q, k):
        return q // self.size == k // self.size

    def tile(self, q0, q1, k0, k1):
        first_q, last_q = q0 // self.size, (q1 - 1) // self.size
        first_k, last_k = k0 // self.size, (k1 - 1) // self.size
        one = (first_q == last_q) & (first_k == last_k) & (first_q == first_k)
        return _kind(skip=(last_q < first_k) | (last_k < first_q), full=one)


@dataclasses.dataclass(frozen=True)
class Every(Mask):
    """q - k is a multiple of n: dilation."""

    n: int

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"stride n={self.n} must be at least 1")

    def __call__(self, q, k):
        return (q - k) % self.n == 0

    def tile(self, q0, q1, k0, k1):
        nearest, farthest = q0 - (k1 - 1), (q1 - 1) - k0
        multiple = farthest // self.n * self.n  # the largest one in reach
        return _kind(skip=multiple < nearest, full=(multiple >= nearest) & ((nearest == farthest) | (self.n == 1)))

    @property
    def relative(self):
        return True


@dataclasses.dataclass(frozen=True)
class BlockLayout(Mask):
    """Query block i (block x i onwards) sees the key blocks rows[i]; queries and keys outside of all rows see nothing.

    As a mask it counts a key once; BlockTable counts repeats, differs by head and may be a traced argument.
    """

    block: int
    rows: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1")
        for i, row in enumerate(self.rows):
            if len(set(row)) < len(row) or any(j < 0 for j in row):
                raise ValueError(f"row {i} of a BlockLayout needs distinct key blocks from 0 up, got {row}")

    def __call__(self, q, k):
        xp = jnp if isinstance(q, jax.Array) or isinstance(k, jax.Array) else np
        table = xp.asarray(self._table)
        i, j = q // self.block, k // self.block
        inside = (i >= 0) & (i < table.shape[0]) & (j >= 0) & (j < table.shape[1])
        return table[xp.clip(i, 0, table.shape[0] - 1), xp.clip(j, 0, table.shape[1] - 1)] & inside

    def tile(self, q0, q1, k0, k1):
        rows, columns = self._table.shape
        i0, i1, j0, j1 = q0 // self.block, -(-q1 // self.block), k0 // self.block, -(-k1 // self.block)
        a, b = np.clip(i0, 0, rows), np.clip(i1, 0, rows)
        c, d = np.clip(j0, 0, columns), np.clip(j1, 0, columns)
        seen = self._sums[b, d] - self._sums[a, d] - self._sums[b, c] + self._sums[a, c]
        return _kind(skip=seen == 0, full=seen == (i1 - i0) * (j1 - j0))

    @property
    def table_block(self):
        return self.block

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """bool [query blocks, key blocks], never empty."""
        columns = 1 + max((j for row in self.rows for j in row), default=0)
        table = np.zeros((max(len(self.rows), 1), columns), bool)
        for i, row in enumerate(self.rows):
            table[i, list(row)] = True
        return table

    @functools.cached_property
    def _sums(self) -> np.ndarray:
        """Visible blocks before each row and column, so that a rectangle of any size is counted by four look-ups."""
        return np.pad(self._table.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))


EVERYTHING = Full()
CAUSAL = Band(lo=0)


def window(size: int) -> Mask:
    """Causal, seeing `size` keys, itself included (transformers' `sliding_window`)."""
    if size < 1:
        raise ValueError(f"window {size=} must be at least 1")
    return Band(lo=0, hi=size - 1)


def prefix_lm(n: int) -> Mask:
    """Causal, with the first n positions visible to everyone."""
    return CAUSAL | KeysBefore(n)


def chunked_local(size: int) -> Mask:
    """Causal inside chunks of `size` positions (Llama 4's `attention_chunk_size`)."""
    return CAUSAL & SameChunk(size)


def longformer(window: int, n_global: int = 0) -> Mask:
    """Both directions, window / 2 keys to each side, and the first n_global tokens see and are seen by all.

    The pattern of Beltagy et al. 2020 (arXiv 2004.05150), whose second projections for global tokens are the model's.
    """
    if window < 2 or window % 2:
        raise ValueError(f"longformer {window=} must be even and at least 2")
    return Band(-(window // 2), window // 2) | KeysBefore(n_global) | QueriesBefore(n_global)


def strided(stride: int) -> Mask:
    """Causal: the last `stride` keys, and of those before every stride-th (Child et al. 2019, arXiv 1904.10509)."""
    return CAUSAL & (Band(hi=stride - 1) | Every(stride))


def dense(mask: Mask, t: int, s: int) -> np.ndarray:
    """The mask as bool [t, s], for tests and for looking at it."""
    return np.asarray(mask(np.arange(t)[:, None], np.arange(s)[None, :]))


def _kind(skip, full):
    return np.where(skip, SKIP, np.where(full, FULL, PARTIAL))
