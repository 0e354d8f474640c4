"""Which implementation a call of `attention` gets, why the others do not run it, and how many tiles its mask needs."""

import dataclasses
import inspect
from collections.abc import Iterable

import jax
import numpy as np

from jaxlm.kernels.attention import IMPLS, _check_shapes, attention, judge
from jaxlm.kernels.block_table import BlockTable, block_counts
from jaxlm.kernels.call import call_of
from jaxlm.kernels.masks import FULL, PARTIAL, SKIP, Mask
from jaxlm.kernels.plan import tile_kinds

_KEYWORDS = [p.name for p in inspect.signature(attention).parameters.values() if p.kind is p.KEYWORD_ONLY]
FEATURES = [name for name in _KEYWORDS if name not in ("scale", "impl", "return_lse")]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a mask falls into tiles: those that no kernel need visit, those that need the predicate, and the rest.

    Over all heads of a BlockTable that tells them apart, over one head otherwise.
    """

    block_q: int
    block_k: int
    skip: int
    partial: int
    full: int
    note: str = ""

    @property
    def share(self) -> float:
        """Visited tiles over all tiles: the share of dense work."""
        return (self.partial + self.full) / (self.skip + self.partial + self.full)

    def __str__(self) -> str:
        counts = f"{self.skip:,} SKIP, {self.partial:,} PARTIAL, {self.full:,} FULL"
        note = f" ({self.note})" if self.note else ""
        return f"{self.block_q} x {self.block_k}: {counts}; {self.share:.1%} of dense work{note}"


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """What `attention` would do; print it.

    reasons holds every implementation in order of preference, with why it does not run this call, or None if it could.
    chosen is None if the named one cannot, or none can.
    """

    call: str
    platform: str
    chosen: str | None
    named: bool
    reasons: dict[str, str | None]
    tiles: Tiles

    def __str__(self) -> str:
        able = "could, but another was named" if self.named else "could, but comes later"
        rows = [("runs", self.chosen or "nothing: NotImplementedError")]
        rows += [("not", f"{name}: {why or able}") for name, why in self.reasons.items() if name != self.chosen]
        rows += [("tiles", str(self.tiles))]
        return "\n".join([f"{self.call} on {self.platform}", *(f"  {name:<7}{text}" for name, text in rows)])


def explain_attention(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    mask: Mask | BlockTable,
    *,
    dtype,
    v_dim: int | None = None,
    platform: str | None = None,
    features: Iterable[str] = (),
    return_lse: bool = False,
    impl: str | None = None,
    block_q: int = 128,
    block_k: int = 128,
) -> Explanation:
    """Explains attention of q BTNH and k BSKH, of `dtype`, on `platform` (cpu, gpu, tpu; None: where it would run now).

    features are the keyword arguments of `attention` that will be given, by name; v_dim is v's head dim if not k's. A
    BlockTable is counted in tiles of its own key blocks and of block_q // block of its query blocks, at least one.
    ValueError for shapes that do not fit, a feature or an implementation that does not exist.
    """
    q = jax.ShapeDtypeStruct(q_shape, dtype)
    k = jax.ShapeDtypeStruct(k_shape, dtype)
    v = jax.ShapeDtypeStruct((*k_shape[:-1], v_dim or k_shape[-1]), dtype)
    _check_shapes(q, k, v)
    if unknown := [name for name in features if name not in FEATURES]:
        raise ValueError(f"attention has no {', '.join(unknown)}; it has {', '.join(FEATURES)}")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"unknown attention implementation {impl!r}; there are {', '.join(IMPLS)}")
    if isinstance(mask, BlockTable):
        mask.validate(q.shape[1], k.shape[1], q.shape[2])
    call = call_of(q, k, v, mask, features, return_lse, platform)
    reasons = judge(call)
    if impl is None:
        chosen = next((name for name, why in reasons.items() if why is None), None)
    else:  # a named one runs even where it declines to be the choice
        reasons |= {impl: IMPLS[impl].refuses(call)}
        chosen = impl if reasons[impl] is None else None
    given = f" with {', '.join(features)}" if features else ""
    text = f"attention {list(q_shape)} x {list(k_shape)} {q.dtype} under {_name(mask)}{given}"
    return Explanation(
        text, call.platform, chosen, impl is not None, reasons, _tiles(mask, q, k, features, block_q, block_k)
    )


def _tiles(mask: Mask | BlockTable, q, k, features: Iterable[str], block_q: int, block_k: int) -> Tiles:
    t, s = q.shape[1], k.shape[1]
    if isinstance(mask, BlockTable):
        return _table_tiles(mask, s // mask.block, max(1, block_q // mask.block))
    kinds = tile_kinds(mask, t, s, block_q, block_k)
    if moved := [name for name in ("q_pos", "k_pos") if name in features]:
        return Tiles(
            block_q, block_k, 0, kinds.size, 0, f"{' and '.join(moved)} may be anything, so no tile is left out"
        )
    count = lambda kind: int((kinds == kind).sum())
    return Tiles(block_q, block_k, count(SKIP), count(PARTIAL), count(FULL))


def _table_tiles(table: BlockTable, key_blocks: int, group: int) -> Tiles:
    """FULL are tiles whose every row lists the block once; where it is listed more or less often, it is PARTIAL."""
    counts = np.asarray(block_counts(table, key_blocks))
    counts = np.pad(counts, ((0, 0), (0, -counts.shape[1] % group), (0, 0)))
    counts = counts.reshape(counts.shape[0], -1, group, key_blocks)
    skip, full = (counts == 0).all(2), (counts == 1).all(2)
    heads = f"of {len(counts)} heads" if len(counts) > 1 else ""
    partial = skip.size - int(skip.sum()) - int(full.sum())
    return Tiles(group * table.block, table.block, int(skip.sum()), partial, int(full.sum()), heads)


def _name(mask: Mask | BlockTable) -> str:
    if isinstance(mask, BlockTable):
        return f"BlockTable(blocks={list(mask.blocks.shape)}, block={mask.block}, full_rows={mask.full_rows})"
    return str(mask)
