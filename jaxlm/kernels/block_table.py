"""Block tables: block-sparse attention whose blocks are data, differ by head, and may repeat.

A table is given to `attention` in place of a mask, as an argument of a jitted function or one layer of a scan. A mask
says whether a key is seen, a table how often: BigBird in evaluation lists its first block several times, and each
listing adds to the softmax.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int

from jaxlm.kernels.masks import FULL, PARTIAL, Mask
from jaxlm.kernels.plan import tile_kinds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockTable:
    """Which key blocks each block of queries sees.

    blocks int32 [N or 1, query blocks, slots] holds key blocks, -1 for an empty slot; a block listed m times counts m
    times in the softmax. Queries and keys come in blocks of `block` tokens. The query blocks in full_rows (negative
    ones from the end) see every key once, whatever their row of `blocks` says.
    """

    blocks: Any  # an Array; transformations also put placeholders here
    block: int = dataclasses.field(metadata={"static": True})
    full_rows: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    def validate(self, t: int, s: int, heads: int) -> None:
        """Raises ValueError, with the values, unless the table fits t queries, s keys and that many query heads.

        Entries are checked where they are known: not while tracing.
        """
        if self.block < 1 or t % self.block or s % self.block:
            raise ValueError(
                f"a BlockTable with block={self.block} needs multiples of it, got {t=} queries and {s=} keys"
            )
        rows, columns, shape = t // self.block, s // self.block, self.blocks.shape
        if len(shape) != 3 or shape[0] not in (1, heads) or shape[1] != rows or not shape[2]:
            want = f"[{heads} or 1, {rows}, slots]"
            raise ValueError(f"a BlockTable for {heads} heads and {rows} query blocks needs {want}, got {shape}")
        if self.blocks.dtype != jnp.int32:
            raise ValueError(f"a BlockTable needs int32 blocks, got {self.blocks.dtype}")
        if outside := [row for row in self.full_rows if not -rows <= row < rows]:
            raise ValueError(f"full_rows {outside} are not among {rows} query blocks")
        if not isinstance(self.blocks, Tracer):
            known = np.asarray(self.blocks)  # numpy, because under jit even an operation on a constant is traced
            low, high = known.min(), known.max()
            if low < -1 or high >= columns:
                raise ValueError(f"a BlockTable for {columns} key blocks holds {low if low < -1 else high}")

    def full(self) -> np.ndarray:
        """bool [query blocks]: the rows that see every key once."""
        full = np.zeros(self.blocks.shape[1], bool)
        full[list(self.full_rows)] = True
        return full


@functools.lru_cache(maxsize=256)
def table_of(mask: Mask, t: int, s: int) -> BlockTable | None:
    """The same as a table, in numpy, of a mask made of BlockLayouts; None where it is not one of whole blocks."""
    block = mask.table_block
    if not block or t % block or s % block:
        return None
    kinds = tile_kinds(mask, t, s, block, block)
    if (kinds == PARTIAL).any():
        return None
    full = (kinds == FULL).all(1)
    rows = [np.flatnonzero(row) for row in np.where(full[:, None], 0, kinds)]
    blocks = np.full((1, len(rows), max(1, *map(len, rows))), -1, np.int32)
    for row, columns in zip(blocks[0], rows, strict=True):
        row[: len(columns)] = columns
    return BlockTable(blocks, block, tuple(np.flatnonzero(full).tolist()))


def block_counts(table: BlockTable, key_blocks: int) -> Int[Array, "N QB KB"]:
    """How often each query block lists each key block."""
    listed = (table.blocks[..., None] == jnp.arange(key_blocks)).sum(2, dtype=jnp.int32)
    return jnp.where(table.full()[:, None], 1, listed)


def multiplicity(table: BlockTable, t: int, s: int) -> Float[Array, "N T S"]:
    """How often each key counts in the softmax of each query: weights of exp(logit), dense. N is 1 if heads agree."""
    table.validate(t, s, table.blocks.shape[0])
    counts = block_counts(table, s // table.block).astype(jnp.float32)
    return counts.repeat(table.block, 1).repeat(table.block, 2)


def merge_rows(
    table: BlockTable, group: int, key_blocks: int
) -> tuple[Int[Array, "N groups slots"], Int[Array, "N groups slots {group}"]]:
    """What a query tile of `group` blocks visits: its distinct key blocks, and how often each of its rows lists each.

    The blocks are ascending, with -1 past their end, where every count is 0. The rows of `full_rows` count as their
    entries say; a last group that is not whole is filled with rows that list nothing.
    """
    rows = jnp.pad(table.blocks, ((0, 0), (0, -table.blocks.shape[1] % group), (0, 0)), constant_values=-1)
    rows = rows.reshape(rows.shape[0], -1, group, rows.shape[2])
    listed = jnp.sort(jnp.where(rows < 0, key_blocks, rows).reshape(*rows.shape[:2], -1))
    new = jnp.diff(listed, prepend=-1) > 0
    merged = jnp.sort(jnp.where(new, listed, key_blocks))[..., :key_blocks]
    merged = jnp.where(merged == key_blocks, -1, merged)
    counts = (merged[..., None, None] == rows[:, :, None]).sum(-1, dtype=jnp.int32)
    return merged, jnp.where(merged[..., None] < 0, 0, counts)


def visited_share(table: BlockTable, key_blocks: int, group: int = 1) -> float:
    """The share of dense work in tiles of `group` query blocks by one key block: 1 if every key block is visited."""
    counts = np.asarray(block_counts(table, key_blocks))
    rows = np.pad(counts, ((0, 0), (0, -counts.shape[1] % group), (0, 0)))
    return float((rows.reshape(rows.shape[0], -1, group, key_blocks) > 0).any(2).mean())
