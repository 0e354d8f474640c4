"""Which tiles of a mask a kernel visits: computed with numpy when tracing, from the mask's three-valued `tile`."""

import dataclasses
import functools

import numpy as np

from jaxlm.kernels.masks import FULL, PARTIAL, SKIP, Mask


@dataclasses.dataclass(frozen=True, eq=False)
class TilePlan:
    """The tiles to visit in each row of tiles; a row is a tile of queries, or of keys in a transposed plan.

    index int32 [rows, width] holds the columns to visit in ascending order; kind int32 [rows, width] is FULL, PARTIAL
    or, past the end of a row, SKIP, where index repeats the row's last column so that nothing new is fetched.
    """

    index: np.ndarray
    kind: np.ndarray
    columns: int

    @property
    def visited(self) -> int:
        return int((self.kind != SKIP).sum())

    @property
    def share(self) -> float:
        """Visited tiles over all tiles."""
        return self.visited / (len(self.index) * self.columns)

    @property
    def has_partial(self) -> bool:
        return bool((self.kind == PARTIAL).any())


@functools.lru_cache(maxsize=256)
def tile_plan(mask: Mask, t: int, s: int, block_q: int, block_k: int, transposed: bool = False) -> TilePlan:
    """The tiles of t queries x s keys at default positions; ragged last tiles are never FULL.

    transposed gives the rows of key tiles, each with the query tiles that see it: what dk and dv are summed over.
    """
    kinds = tile_kinds(mask, t, s, block_q, block_k)
    kinds = kinds.T if transposed else kinds
    width = max(1, int((kinds != SKIP).sum(1).max()))
    order = np.argsort(kinds == SKIP, axis=1, kind="stable")[:, :width]
    kind = np.take_along_axis(kinds, order, 1)
    last = np.maximum((kind != SKIP).sum(1) - 1, 0)
    index = np.where(kind == SKIP, np.take_along_axis(order, last[:, None], 1), order)
    return TilePlan(index.astype(np.int32), kind.astype(np.int32), kinds.shape[1])


def tile_kinds(mask: Mask, t: int, s: int, block_q: int, block_k: int) -> np.ndarray:
    """SKIP, PARTIAL or FULL for every tile, int32 [query tiles, key tiles]."""
    q0, k0 = np.arange(0, t, block_q)[:, None], np.arange(0, s, block_k)[None, :]
    q1, k1 = q0 + block_q, k0 + block_k
    kinds = mask.tile(q0, np.minimum(q1, t), k0, np.minimum(k1, s))
    ragged = (q1 > t) | (k1 > s)
    return np.where((kinds == FULL) & ragged, PARTIAL, kinds).astype(np.int32)
