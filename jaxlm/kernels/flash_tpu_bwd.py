"""The backward pass of flash attention on TPU: one kernel for dq, dk and dv over a static tile plan.

A chunk of keys stays in VMEM together with its float32 dk and dv while the queries of all heads of its group pass by:
every probability is computed once, so a tile needs five matrix products where separate kernels for dq and for dk and dv
need seven. Longer sequences repeat the kernel over chunks and add up dq. Tiles are transposed [keys, queries]: the
log-sum-exp and delta of the queries are then rows, and only dq needs a transpose.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from jaxlm.kernels.call import precision
from jaxlm.kernels.masks import FULL, PARTIAL, SKIP, Mask
from jaxlm.kernels.plan import tile_kinds
from jaxlm.kernels.tpu import LOG2E, NN, NT, TN, VMEM_BYTES, heads_first, lane_rows, round_up, segment_arrays


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes: queries and keys a tile, keys that stay in VMEM."""

    q: int
    k: int
    chunk: int


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    out: Float[Array, "B T N Dv"],
    lse: Float[Array, "B T N"],
    dout: Float[Array, "B T N Dv"],
    dlse: Float[Array, "B T N"] | None,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None = None,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
    k_valid: Bool[Array, "#B S"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """dq, dk, dv in the dtypes of q, k, v and dsinks (or None) of attention whose results were out and lse.

    lse is the natural log-sum-exp of each query's logits, -inf where it saw nothing; dlse its gradient.
    """
    (b, t, _, h), s = q.shape, k.shape[1]
    segmented = q_segments is not None or k_valid is not None
    widths = round_up(h, 128) + round_up(v.shape[-1], 128)
    blocks = blocks or choose_blocks(mask, t, s, widths, q.dtype.itemsize, segmented)
    delta = jnp.einsum("BTND,BTND->BTN", dout, out, preferred_element_type=jnp.float32)
    shift = delta if dlse is None else delta - dlse
    dsinks = None
    if sinks is not None:
        taken = jnp.exp(sinks.astype(jnp.float32) - lse)
        dsinks = -(taken * shift).sum((0, 1)).astype(sinks.dtype)
    seen = lse > -jnp.inf
    tq, ts = round_up(t, blocks.q), round_up(s, blocks.chunk)
    arrays = {
        "q": heads_first(q, tq),
        "k": heads_first(k, ts),
        "v": heads_first(v, ts),
        "do": heads_first(dout.astype(v.dtype), tq),
        # Rows that see nothing, and the rows of padding, get the probability exp2(-inf) = 0.
        "lse": lane_rows(jnp.where(seen, lse * LOG2E, jnp.inf), tq, jnp.inf),
        "shift": lane_rows(jnp.where(seen, shift, 0), tq, 0),
    }
    if segmented:
        arrays |= segment_arrays(q_segments, k_segments, k_valid, (b, t, s), (tq, ts))
    call = functools.partial(
        _run, mask=mask, t=t, s=s, scale=scale, softcap=softcap, blocks=blocks, interpret=interpret
    )
    dq, dk, dv = call(arrays)
    dq = dq[:, :, :t].swapaxes(1, 2).astype(q.dtype)
    dk, dv = (x[:, :, :s].swapaxes(1, 2) for x in (dk, dv))
    return dq, dk, dv, dsinks


# Tiles to choose from, and the bundles of one on a v6e per 2048 x 2048 of visited work.
TILES = {(512, 512): 23552, (1024, 512): 21568}
CHUNK_BYTES = 12 * 2**20  # the most of VMEM_BYTES for a chunk of keys
LEAST_KEYS = 1024  # of a chunk, where another tile leaves it room


@functools.lru_cache(maxsize=256)
def choose_blocks(mask: Mask, t: int, s: int, widths: int, itemsize: int, segmented: bool) -> Blocks:
    """The tiles with the least work for this mask, and a chunk of keys that fits VMEM.

    widths is the head dims of keys and values together, as padded to lanes.
    """
    tiles = TILES if itemsize == 2 else {(256, 256): 1}  # a float32 product is made of several, which spill
    tiles = {(min(q, round_up(t, 128)), min(k, round_up(s, 128))): cost for (q, k), cost in tiles.items()}
    work = {(q, k): cost * q * k * int((tile_kinds(mask, t, s, q, k) != SKIP).sum()) for (q, k), cost in tiles.items()}
    chunks = {(q, k): _chunk(s, q, k, widths, itemsize, segmented) for q, k in tiles}
    # Few keys a chunk are many passes over the queries.
    q, k = min(work, key=lambda tile: (chunks[tile] < min(s, LEAST_KEYS), work[tile], tile))
    return Blocks(q, k, chunks[q, k])


def _chunk(s: int, q: int, k: int, widths: int, itemsize: int, segmented: bool) -> int:
    """How many keys fit VMEM beside a tile of queries: all of them, or several tiles of k.

    What is read and written has two buffers. A tile's dq is written in the dtype of q if all keys are in one chunk, and
    else added up in float32, read and written. The products of a tile take room too: on v4 two of logits and one of dq.
    """
    key_bytes = widths * (4 * itemsize + 4) + (1024 if segmented else 0)

    def room(dq_bytes):
        queries, products = q * widths * (2 * itemsize + dq_bytes + 2), q * (8 * k + 2 * widths)
        return min(CHUNK_BYTES, VMEM_BYTES - queries - products - 2**18) // key_bytes

    if round_up(s, k) <= room(itemsize):
        return round_up(s, k)
    chunks = -(-s // max(k, room(8) // k * k))
    return round_up(-(-s // chunks), k)


def _run(arrays, *, mask, t, s, scale, softcap, blocks, interpret):
    """The kernel over each chunk of keys: dq summed over chunks in float32, dk and dv joined."""
    (b, n, tq, h), (kh, ts) = arrays["q"].shape, arrays["k"].shape[1:3]
    plan = _plan(mask, t, s, blocks)
    kernel: Any = functools.partial(
        _call, arrays, plan=plan, s=s, mask=mask, scale=scale, softcap=softcap, blocks=blocks, interpret=interpret
    )
    chunks = len(plan.chunk)
    if chunks == 1:
        return kernel(*(x[0] for x in plan.scalars), None)

    def step(dq, scalars):
        dq, dk, dv = kernel(*scalars, dq)
        return dq, (dk, dv)

    dq, (dk, dv) = jax.lax.scan(step, jnp.zeros((b, n, tq, h), jnp.float32), plan.scalars)
    return dq, *(jnp.moveaxis(x, 0, 2).reshape(b, kh, ts, x.shape[-1]) for x in (dk, dv))


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Per chunk of keys: the tiles of queries that see some of it, and their key tiles, FULL ones first.

    chunk int32 [chunks, 2] is its number and how many of the rows count; rows int32 [chunks, most] the tiles of
    queries, the last one repeated; bounds int32 [chunks, 3 * most] for each row the start, the end of the FULL ones and
    the end of its part of columns; columns int32 [chunks, longest] the numbers of key tiles within the chunk.
    """

    chunk: np.ndarray
    rows: np.ndarray
    bounds: np.ndarray
    columns: np.ndarray
    visited: int

    @property
    def scalars(self) -> tuple[np.ndarray, ...]:
        return self.chunk, self.rows, self.bounds, self.columns


@functools.lru_cache(maxsize=256)
def _plan(mask: Mask, t: int, s: int, blocks: Blocks) -> _Plan:
    kinds = tile_kinds(mask, t, s, blocks.q, blocks.k)
    width = blocks.chunk // blocks.k
    chunk, rows, bounds, columns = [], [], [], []
    for number, first in enumerate(range(0, kinds.shape[1], width)):
        part = kinds[:, first : first + width]
        # A single chunk writes dq where others add to it, so it visits every row.
        some = np.flatnonzero((part != SKIP).any(1)).tolist() if kinds.shape[1] > width else list(range(len(part)))
        flat, ends = [], []
        for row in some:
            full, partial = (np.flatnonzero(part[row] == kind).tolist() for kind in (FULL, PARTIAL))
            ends += [len(flat), len(flat) + len(full), len(flat) + len(full) + len(partial)]
            flat += full + partial
        chunk.append([number, len(some)])
        rows.append(some)
        bounds.append(ends)
        columns.append(flat)
    visited = int((kinds != SKIP).sum())
    return _Plan(np.array(chunk, np.int32), _rectangle(rows), _rectangle(bounds), _rectangle(columns), visited)


def _rectangle(lists: list[list[int]]) -> np.ndarray:
    """int32 [lists, longest], at least one wide; a list's last element fills up the rest."""
    longest = max(1, *map(len, lists))
    return np.array([x + (x[-1:] or [0]) * (longest - len(x)) for x in lists], np.int32)


def _call(arrays, chunk, rows, bounds, columns, dq, *, plan, s, mask, scale, softcap, blocks, interpret):
    (b, n, tq, h), kh, dv = arrays["q"].shape, arrays["k"].shape[1], arrays["v"].shape[-1]
    group, size = n // kh, blocks.chunk
    per_q = lambda b, k, g, i, chunk, rows, *_: (b, k * group + g, rows[i], 0)
    per_row = lambda b, k, g, i, chunk, rows, *_: (b, k * group + g, 0, rows[i])
    per_chunk = lambda b, k, g, i, chunk, *_: (b, k, chunk[0], 0)
    tile = lambda width: pl.BlockSpec((None, None, blocks.q, width), per_q)
    specs = {
        "q": tile(h),
        "k": pl.BlockSpec((None, None, size, h), per_chunk),
        "v": pl.BlockSpec((None, None, size, dv), per_chunk),
        "do": tile(dv),
        "lse": pl.BlockSpec((None, None, 1, blocks.q), per_row),
        "shift": pl.BlockSpec((None, None, 1, blocks.q), per_row),
        "q_segments": pl.BlockSpec((None, 1, blocks.q), lambda b, k, g, i, chunk, rows, *_: (b, 0, rows[i])),
        "k_segments": pl.BlockSpec((None, size, 1), lambda b, k, g, i, chunk, *_: (b, chunk[0], 0)),
        "dq": tile(h),
    }
    operands = arrays if dq is None else arrays | {"dq": dq}
    dtype = arrays["q"].dtype
    kernel = functools.partial(
        _kernel, names=tuple(operands), mask=mask, s=s, scale=scale, softcap=softcap, block_k=blocks.k
    )
    area = plan.visited * blocks.q * blocks.k * b * n // len(plan.chunk)
    shapes = [
        jax.ShapeDtypeStruct((b, n, tq, h), dtype if dq is None else jnp.float32),
        jax.ShapeDtypeStruct((b, kh, size, h), dtype),
        jax.ShapeDtypeStruct((b, kh, size, dv), arrays["v"].dtype),
    ]
    moved = [*operands.values(), *shapes]
    whole = lambda width: pl.BlockSpec((None, None, size, width), lambda b, k, *_: (b, k, 0, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(b, kh, group, len(rows)),
            in_specs=[specs[name] for name in operands],
            out_specs=[tile(h), whole(h), whole(dv)],
            scratch_shapes=[
                pltpu.VMEM((blocks.q, h), jnp.float32),
                pltpu.VMEM((size, h), jnp.float32),
                pltpu.VMEM((size, dv), jnp.float32),
            ],
        ),
        out_shape=shapes,
        input_output_aliases={} if dq is None else {4 + len(arrays): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * area * (3 * h + 2 * dv),
            transcendentals=area * (1 if softcap is None else 2),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        ),
        interpret=interpret,
        name="flash_backward",
    )(chunk, rows, bounds, columns, *operands.values())


def _kernel(chunk, rows, bounds, columns, *refs, names, mask, s, scale, softcap, block_k):
    """One tile of queries against its key tiles in the chunk."""
    operands, (dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum) = dict(zip(names, refs, strict=False)), refs[-6:]
    g, i = pl.program_id(2), pl.program_id(3)

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when((i < chunk[1]) | (i == 0))
    def _():
        dq_sum[...] = jnp.zeros_like(dq_sum)
        q0, k0 = rows[i] * operands["q"].shape[0], chunk[0] * operands["k"].shape[0]
        visit = functools.partial(
            _visit, operands, (dq_sum, dk_sum, dv_sum), q0, k0, s=s, scale=scale, softcap=softcap, block_k=block_k
        )
        full, partial, end = (bounds[3 * i + x] for x in range(3))
        jax.lax.fori_loop(full, partial, lambda at, _: visit(columns[at], mask=None), None)
        jax.lax.fori_loop(partial, end, lambda at, _: visit(columns[at], mask=mask), None)
        dq = dq_sum[...] * scale
        dq_ref[...] = (operands["dq"][...] + dq if "dq" in operands else dq).astype(dq_ref.dtype)

    @pl.when((g == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_sum[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _visit(operands, sums, q0, k0, column, *, mask, s, scale, softcap, block_k):
    """Adds the gradients of one tile to the sums; without a mask all of it is seen, up to segments."""
    dq_sum, dk_sum, dv_sum = sums
    keys = pl.ds(pl.multiple_of(column * block_k, block_k), block_k)
    q, do, k, v = operands["q"][...], operands["do"][...], operands["k"][keys, :], operands["v"][keys, :]
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision(q.dtype))
    products, squashed = dot(k, q, NT), None  # [block_k, block_q]
    if softcap is None:
        p = jnp.exp2(products * (scale * LOG2E) - operands["lse"][...])
    else:
        squashed = jnp.tanh(products * (scale / softcap))
        p = jnp.exp2(squashed * (softcap * LOG2E) - operands["lse"][...])
    seen = _seen(operands, keys, q0, k0 + column * block_k, mask, s, p.shape)
    p = p if seen is None else jnp.where(seen, p, 0)
    dv_sum[keys, :] += dot(p.astype(do.dtype), do, NN)
    ds = p * (dot(v, do, NT) - operands["shift"][...])
    if squashed is not None:
        ds = ds * (1 - squashed * squashed)
    ds = ds.astype(q.dtype)
    dk_sum[keys, :] += dot(ds, q, NN)
    dq_sum[...] += dot(ds, k, TN)


def _seen(operands, keys, q0, k0, mask, s, shape):
    """Which queries see which keys, bool [block_k, block_q], or None for all of them."""
    seen = None
    if mask is not None:
        k_pos = k0 + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        q_pos = q0 + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
        seen = mask(q_pos, k_pos) & (k_pos < s)
    if "k_segments" in operands:
        same = operands["q_segments"][...] == operands["k_segments"][keys, :]
        seen = same if seen is None else seen & same
    return seen
