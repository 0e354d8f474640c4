"""The backward pass of flash attention on TPU: one kernel for dq, dk and dv over a static tile plan.

A chunk of keys stays in VMEM together with its float32 dk and dv while the queries of all heads of its group pass by, so
every probability is computed once: five matrix products a tile where separate dq and dk, dv kernels need seven. Longer
sequences repeat the kernel over chunks and add up dq. Tiles are transposed [keys, queries]: the log-sum-exp and delta
of the queries are then rows, and only dq needs a transpose.
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

from jaxlm.kernels.masks import FULL, SKIP, Mask
from jaxlm.kernels.plan import tile_kinds

LOG2E = math.log2(math.e)
HIDDEN = -(2**31)  # the segment of keys that nobody sees


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
    (b, t, n, h), (s, kh) = q.shape, k.shape[1:3]
    blocks = blocks or choose_blocks(t, s, h, v.shape[-1])
    delta = jnp.einsum("BTND,BTND->BTN", dout, out, preferred_element_type=jnp.float32)
    shift = delta if dlse is None else delta - dlse
    dsinks = None
    if sinks is not None:
        taken = jnp.exp(sinks.astype(jnp.float32) - lse)
        dsinks = -(taken * shift).sum((0, 1)).astype(sinks.dtype)
    seen = lse > -jnp.inf
    tq, ts = _round_up(t, blocks.q), _round_up(s, blocks.chunk)
    arrays = {
        "q": _heads_first(q, tq),
        "k": _heads_first(k, ts),
        "v": _heads_first(v, ts),
        "do": _heads_first(dout.astype(v.dtype), tq),
        # Rows that see nothing, and the rows of padding, get the probability exp2(-inf) = 0.
        "lse": _rows(jnp.where(seen, lse * LOG2E, jnp.inf), tq, jnp.inf),
        "shift": _rows(jnp.where(seen, shift, 0), tq, 0),
    }
    if q_segments is not None or k_valid is not None:
        arrays |= _segments(q_segments, k_segments, k_valid, (b, t, s), (tq, ts))
    call = functools.partial(
        _run, mask=mask, t=t, s=s, scale=scale, softcap=softcap, blocks=blocks, interpret=interpret
    )
    dq, dk, dv = call(arrays)
    dq = dq[:, :, :t].swapaxes(1, 2).astype(q.dtype)
    dk, dv = (x[:, :, :s].swapaxes(1, 2) for x in (dk, dv))
    return dq, dk, dv, dsinks


def choose_blocks(t: int, s: int, h: int, dv: int) -> Blocks:
    """Tiles as large as the sequence allows, and a chunk of keys whose arrays fill about 12 MB of VMEM."""
    block_q = min(512, _round_up(t, 128))
    block_k = min(512, _round_up(s, 128))
    wide = max(_round_up(h, 128), _round_up(dv, 128))
    return Blocks(block_q, block_k, min(4096 * 128 // wide, _round_up(s, block_k)))


def _run(arrays, *, mask, t, s, scale, softcap, blocks, interpret):
    """The kernel over each chunk of keys: dq float32 summed over chunks, dk and dv joined."""
    (b, n, tq, h), (kh, ts) = arrays["q"].shape, arrays["k"].shape[1:3]
    plan = _plan(mask, t, s, blocks, "k_segments" in arrays)
    chunks = ts // blocks.chunk
    kernel = functools.partial(
        _call, arrays, plan=plan, s=s, mask=mask, scale=scale, softcap=softcap, blocks=blocks, interpret=interpret
    )
    if chunks == 1:
        return kernel(plan.columns[0], plan.bounds[0], np.zeros(1, np.int32), None)

    def step(dq, chunk):
        dq, dk, dv = kernel(*chunk, dq)
        return dq, (dk, dv)

    numbers = np.arange(chunks, dtype=np.int32)[:, None]
    dq, (dk, dv) = jax.lax.scan(step, jnp.zeros((b, n, tq, h), jnp.float32), (plan.columns, plan.bounds, numbers))
    return dq, *(jnp.moveaxis(x, 0, 2).reshape(b, kh, ts, x.shape[-1]) for x in (dk, dv))


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Per chunk of keys: the key tiles of each row of query tiles, FULL ones first.

    columns int32 [chunks, longest] are numbers of tiles within the chunk; bounds int32 [chunks, 3 * rows] the start,
    the end of the FULL ones and the end of each row's part of it.
    """

    columns: np.ndarray
    bounds: np.ndarray
    visited: int


@functools.lru_cache(maxsize=256)
def _plan(mask: Mask, t: int, s: int, blocks: Blocks, all_partial: bool) -> _Plan:
    kinds = tile_kinds(mask, t, s, blocks.q, blocks.k)
    width = blocks.chunk // blocks.k
    columns, bounds = [], []
    for first in range(0, kinds.shape[1], width):
        chunk, flat, ends = kinds[:, first : first + width], [], []
        for row in chunk:
            full = [] if all_partial else np.flatnonzero(row == FULL).tolist()
            partial = np.flatnonzero(row != SKIP) if all_partial else np.flatnonzero((row != SKIP) & (row != FULL))
            ends += [len(flat), len(flat) + len(full), len(flat) + len(full) + len(partial)]
            flat += full + partial.tolist()
        columns.append(flat)
        bounds.append(ends)
    longest = max(1, *map(len, columns))
    padded = np.array([flat + [0] * (longest - len(flat)) for flat in columns], np.int32)
    return _Plan(padded, np.array(bounds, np.int32), int((kinds != SKIP).sum()))


def _call(arrays, columns, bounds, chunk, dq, *, plan, s, mask, scale, softcap, blocks, interpret):
    (b, n, tq, h), kh, dv = arrays["q"].shape, arrays["k"].shape[1], arrays["v"].shape[-1]
    group, rows, size = n // kh, tq // blocks.q, blocks.chunk
    per_q = lambda b, k, g, i, *_: (b, k * group + g, i, 0)
    per_row = lambda b, k, g, i, *_: (b, k * group + g, 0, i)
    per_chunk = lambda b, k, g, i, columns, bounds, chunk: (b, k, chunk[0], 0)
    tile = lambda width: pl.BlockSpec((None, None, blocks.q, width), per_q)
    specs = {
        "q": tile(h),
        "k": pl.BlockSpec((None, None, size, h), per_chunk),
        "v": pl.BlockSpec((None, None, size, dv), per_chunk),
        "do": tile(dv),
        "lse": pl.BlockSpec((None, None, 1, blocks.q), per_row),
        "shift": pl.BlockSpec((None, None, 1, blocks.q), per_row),
        "q_segments": pl.BlockSpec((None, 1, blocks.q), lambda b, k, g, i, *_: (b, 0, i)),
        "k_segments": pl.BlockSpec((None, size, 1), lambda b, k, g, i, columns, bounds, chunk: (b, chunk[0], 0)),
        "dq": tile(h),
    }
    operands = arrays if dq is None else arrays | {"dq": dq}
    dtype = arrays["q"].dtype
    kernel = functools.partial(
        _kernel, names=tuple(operands), mask=mask, s=s, scale=scale, softcap=softcap, block_k=blocks.k
    )
    area = plan.visited * blocks.q * blocks.k * b * n
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
            num_scalar_prefetch=3,
            grid=(b, kh, group, rows),
            in_specs=[specs[name] for name in operands],
            out_specs=[tile(h), whole(h), whole(dv)],
            scratch_shapes=[
                pltpu.VMEM((blocks.q, h), jnp.float32),
                pltpu.VMEM((size, h), jnp.float32),
                pltpu.VMEM((size, dv), jnp.float32),
            ],
        ),
        out_shape=shapes,
        input_output_aliases={} if dq is None else {3 + len(arrays): 0},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=64 * 2**20
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * area * (3 * h + 2 * dv),
            transcendentals=area * (1 if softcap is None else 2),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        ),
        interpret=interpret,
        name="flash_backward",
    )(columns, bounds, chunk, *operands.values())


def _kernel(columns, bounds, chunk, *refs, names, mask, s, scale, softcap, block_k):
    """One tile of queries against its key tiles in the chunk."""
    operands, (dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum) = dict(zip(names, refs, strict=False)), refs[-6:]
    g, i = pl.program_id(2), pl.program_id(3)

    @pl.when((g == 0) & (i == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    visit = functools.partial(
        _visit, operands, (dq_sum, dk_sum, dv_sum), mask=mask, s=s, scale=scale, softcap=softcap, block_k=block_k
    )
    q0, k0 = i * operands["q"].shape[0], chunk[0] * operands["k"].shape[0]
    full, partial, end = (bounds[3 * i + x] for x in range(3))
    jax.lax.fori_loop(full, partial, lambda at, _: visit(columns[at], q0, k0, masked=False), None)
    jax.lax.fori_loop(partial, end, lambda at, _: visit(columns[at], q0, k0, masked=True), None)
    dq = dq_sum[...] * scale
    dq_ref[...] = (operands["dq"][...] + dq if "dq" in operands else dq).astype(dq_ref.dtype)

    @pl.when((g == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_sum[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _visit(operands, sums, column, q0, k0, *, mask, s, scale, softcap, block_k, masked):
    """Adds the gradients of one tile to the sums."""
    dq_sum, dk_sum, dv_sum = sums
    keys = pl.ds(pl.multiple_of(column * block_k, block_k), block_k)
    q, do, k, v = operands["q"][...], operands["do"][...], operands["k"][keys, :], operands["v"][keys, :]
    dot = functools.partial(
        jax.lax.dot_general, preferred_element_type=jnp.float32, precision=_precision(q.dtype)
    )
    nn, nt, tn = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
    products = dot(k, q, nt)  # [block_k, block_q]
    if softcap is None:
        p = jnp.exp2(products * (scale * LOG2E) - operands["lse"][...])
    else:
        squashed = jnp.tanh(products * (scale / softcap))
        p = jnp.exp2(squashed * (softcap * LOG2E) - operands["lse"][...])
    if masked:
        p = jnp.where(_visible(operands, column * block_k, q0, k0, mask, s, p.shape), p, 0)
    dv_sum[keys, :] += dot(p.astype(do.dtype), do, nn)
    ds = p * (dot(v, do, nt) - operands["shift"][...])
    if softcap is not None:
        ds = ds * (1 - squashed * squashed)
    ds = ds.astype(q.dtype)
    dk_sum[keys, :] += dot(ds, q, nn)
    dq_sum[...] += dot(ds, k, tn)


def _visible(operands, start, q0, k0, mask, s, shape):
    """Which queries see which keys, bool [block_k, block_q]."""
    k_pos = k0 + start + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
    q_pos = q0 + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    seen = mask(q_pos, k_pos) & (k_pos < s)
    if "k_segments" in operands:
        seen = seen & (operands["q_segments"][...] == operands["k_segments"][pl.ds(start, shape[0]), :])
    return seen


def _segments(q_segments, k_segments, k_valid, sizes, padded):
    """Segments as a row of queries [B, 1, T] and a column of keys [B, S, 1]; keys that are not valid are HIDDEN."""
    (b, t, s), (tq, ts) = sizes, padded
    q_segments = jnp.zeros((b, t), jnp.int32) if q_segments is None else q_segments
    k_segments = jnp.zeros((b, s), jnp.int32) if k_segments is None else k_segments
    k_segments = k_segments if k_valid is None else jnp.where(k_valid, k_segments, HIDDEN)
    row = jnp.pad(jnp.broadcast_to(q_segments, (b, t)), ((0, 0), (0, tq - t)))
    column = jnp.pad(jnp.broadcast_to(k_segments, (b, s)), ((0, 0), (0, ts - s)), constant_values=HIDDEN)
    return {"q_segments": row[:, None].astype(jnp.int32), "k_segments": column[:, :, None].astype(jnp.int32)}


def _heads_first(x, length):
    """BTNH to BNTH, zeros up to the length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _rows(x, length, fill):
    """[B, T, N] to [B, N, 1, T]: a row of lanes."""
    padded = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)), constant_values=fill)
    return padded.swapaxes(1, 2)[:, :, None].astype(jnp.float32)


def _precision(dtype):
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _round_up(x: int, step: int) -> int:
    return -(-x // step) * step
