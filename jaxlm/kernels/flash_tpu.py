"""Flash attention on TPU: the forward kernel over a static tile plan, and its custom_vjp.

A step of the grid is one tile of keys against several heads' tiles of queries. Tiles are transposed [keys, queries], so
that the statistics of the softmax are rows, which broadcast and reduce over sublanes for free, and the probabilities
enter the second product as they are; only the finished output is transposed. Steps are a software pipeline: the step
multiplies the queries with the keys of tile t, exponentiates tile t - 1 and multiplies the probabilities of tile t - 2
with its values. These three depend on nothing within the step, so the matrix units never wait for the exponentials; the
pipeline runs on over rows of tiles and heads, and is filled and drained once.
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
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from jaxlm.kernels import flash_tpu_bwd
from jaxlm.kernels.call import Call, precision
from jaxlm.kernels.masks import PARTIAL, SKIP, Mask
from jaxlm.kernels.plan import tile_kinds

LOG2E = math.log2(math.e)
LOWEST = -1e30  # the maximum of nothing: finite, so that a row without visible keys gives 0 and not NaN
HIDDEN = -(2**31)  # the segment of keys that nobody sees
NN, NT = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))  # which axes a product sums over
FEATURES = frozenset({"q_segments", "k_segments", "k_valid", "softcap", "sinks"})
BATCH_AXES, HEAD_AXES = ("data", "fsdp", "expert"), ("tensor",)  # mesh axes that split batch and heads
VMEM_BYTES = 16 * 2**20  # the whole of the smallest chip's
LAG = 2  # steps between a tile's first product and its second


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes: queries and keys a tile, and query heads a step."""

    q: int
    k: int
    heads: int


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernels are compiled for besides shapes."""

    mask: Mask
    scale: float
    softcap: float | None
    interpret: Any
    blocks: Blocks | None


def flash_tpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    *,
    scale: float,
    return_lse: bool = False,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
    k_valid: Bool[Array, "#B S"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    interpret: Any = False,
    blocks: Blocks | None = None,
) -> Any:
    """Attention as `attention` defines it: out BTND in q's dtype and, if asked, lse float32 BTN; differentiable.

    Runs under the mesh in force: batch over its axes data, fsdp and expert, heads over tensor; a size that they do not
    divide is a ValueError. interpret is for tests: True or pltpu.InterpretParams.
    """
    b = q.shape[0]
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale else (jnp.zeros_like(q), 1.0)
    arrays = {"q": q, "k": k, "v": v}
    if q_segments is not None or k_valid is not None:
        keys = jnp.zeros((b, k.shape[1]), jnp.int32) if k_segments is None else k_segments
        keys = keys if k_valid is None else jnp.where(k_valid, keys, HIDDEN)
        queries = jnp.zeros((b, q.shape[1]), jnp.int32) if q_segments is None else q_segments
        arrays |= {name: jnp.broadcast_to(x, (b, x.shape[1])) for name, x in (("queries", queries), ("keys", keys))}
    if sinks is not None:
        arrays["sinks"] = sinks.astype(jnp.float32)
    both: Any = _attend(arrays, Static(mask, float(scale), softcap, interpret, blocks))
    return both if return_lse else both[0]


def refuses_flash_tpu(call: Call) -> str | None:
    """Why this kernel cannot compute the call, or None."""
    if call.platform != "tpu":
        return f"needs a TPU, the platform is {call.platform!r}"
    if not isinstance(call.mask, Mask):
        return "takes a Mask, not a BlockTable"
    if unknown := call.given - FEATURES:
        return f"has no {', '.join(sorted(unknown))}"
    dtypes = {x.dtype for x in (call.q, call.k, call.v)}
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"computes in bfloat16 or float32 throughout, got {', '.join(sorted(map(str, dtypes)))}"
    widths = call.q.shape[-1], call.v.shape[-1]
    if any(width % 8 or not 64 <= width <= 256 for width in widths):
        return f"needs head dims that are multiples of 8 from 64 to 256, got {widths[0]} and {widths[1]}"
    if call.mask.has_table:
        return f"needs a predicate of plain arithmetic, and {call.mask} looks up a table (pass a BlockTable)"
    return None


# The gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _attend(arrays: dict[str, Array], static: Static) -> tuple[Array, Array]:
    return shard(functools.partial(_forward, static=static), arrays, ("q", "lse"))


def _attend_forward(arrays, static):
    both: Any = _attend(arrays, static)
    return both, (arrays, *both)


def _attend_backward(static, saved, gradients):
    arrays, out, lse = saved
    operands = arrays | {"out": out, "lse": lse, "dout": gradients[0], "dlse": gradients[1]}
    names = ("q", "k", "v", *(["sinks"] if "sinks" in arrays else []))
    grads = shard(functools.partial(_backward, static=static), operands, names)
    zeros = {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in arrays.items() if name in ("queries", "keys")}
    return (dict(zip(names, grads, strict=True)) | zeros,)


_attend.defvjp(_attend_forward, _attend_backward)


def _backward(arrays, batch_axes, *, static):
    dq, dk, dv, dsinks = flash_tpu_bwd.backward(
        mask=static.mask,
        **{name: arrays[name] for name in ("q", "k", "v", "out", "lse", "dout", "dlse")},
        scale=static.scale,
        softcap=static.softcap,
        q_segments=arrays.get("queries"),
        k_segments=arrays.get("keys"),
        k_valid=None if "keys" not in arrays else arrays["keys"] != HIDDEN,
        sinks=arrays.get("sinks"),
        interpret=static.interpret,
    )
    if dsinks is None:
        return dq, dk, dv
    return dq, dk, dv, jax.lax.psum(dsinks, batch_axes) if batch_axes else dsinks


# Which part of the batch and of the heads runs where


def shard(function, arrays: dict[str, Array], results: tuple[str, ...], by_head: tuple[str, ...] = ()) -> Any:
    """function(arrays, batch axes) over the mesh in force: Mosaic kernels cannot be partitioned automatically.

    Axes are told by rank: BTNH, BTN, BT, N. Of the arrays in by_head the first axis is query heads, or 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [] if mesh.empty else [a for a in mesh.axis_names if a not in mesh.manual_axes and mesh.shape[a] > 1]
    if not free:
        return function(arrays, ())
    batch = tuple(a for a in BATCH_AXES if a in free)
    heads = tuple(a for a in HEAD_AXES if a in free)
    for what, size, axes in (
        ("examples", arrays["q"].shape[0], batch),
        ("query heads", arrays["q"].shape[2], heads),
        ("key-value heads", arrays["k"].shape[2], heads),
    ):
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways:
            raise ValueError(f"{what} {size} do not split over the mesh axes {axes} of {ways} devices")
    specs = {4: P(batch or None, None, heads or None), 3: P(batch or None, None, heads or None), 2: P(batch or None)}
    specs |= {1: P(heads or None)}
    rank = {name: x.ndim for name, x in arrays.items()} | {"lse": 3}
    own = {name: P(heads or None) if arrays[name].shape[0] > 1 else P() for name in by_head}
    return jax.shard_map(
        functools.partial(function, batch_axes=batch),
        mesh=mesh,
        in_specs=({name: specs[x.ndim] for name, x in arrays.items()} | own,),
        out_specs=tuple(specs[rank[name]] for name in results),
        axis_names=frozenset(mesh.axis_names) - frozenset(mesh.manual_axes),
        check_vma=False,
    )(arrays)


# The tiles


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The tiles that are visited, as one flat list without padding, row by row of query tiles.

    row, column and flags are int32 [visited]; flags has the bits MASKED, FIRST and LAST of its row. A row that sees
    nothing has one PARTIAL tile, since its output must be written.
    """

    row: np.ndarray
    column: np.ndarray
    flags: np.ndarray


MASKED, FIRST, LAST = 1, 2, 4


@functools.lru_cache(maxsize=256)
def flat_plan(mask: Mask, t: int, s: int, block_q: int, block_k: int) -> Pairs:
    """The tiles to visit for t queries, a multiple of block_q, and s keys."""
    kinds = tile_kinds(mask, t, s, block_q, block_k)
    kinds[(kinds == SKIP).all(1), 0] = PARTIAL
    row, column = np.nonzero(kinds)
    edge = np.append(np.flatnonzero(np.diff(row, prepend=-1)), len(row))
    flags = np.where(kinds[row, column] == PARTIAL, MASKED, 0)
    flags[edge[:-1]] |= FIRST
    flags[edge[1:] - 1] |= LAST
    return Pairs(*(x.astype(np.int32) for x in (row, column, flags)))


COLUMNS = 2048  # queries of all heads of a step: what fits VMEM
SHAPES = ((1024, 512), (512, 512), (256, 256), (128, 128), (2048, 512))  # queries and keys a tile, the best first


@functools.lru_cache(maxsize=256)
def choose_blocks(mask: Mask, t: int, s: int, n: int, group: int, itemsize: int) -> Blocks:
    """The blocks that take the least time for this mask."""
    columns = COLUMNS // 2 if itemsize > 2 else COLUMNS
    cost = {}
    for q, k in SHAPES:
        q, k = min(q, _round_up(t, 128), columns), min(k, _round_up(s, 128))
        heads = max(h for h in range(1, n + 1) if n % h == 0 and h * q <= columns and (h % group) * (group % h) == 0)
        pairs = flat_plan(mask, _round_up(t, q), s, q, k)
        masked = int((pairs.flags & MASKED).sum())
        # Bundles on a v6e with head dims of 128: a step of 2048 x 512 takes 2290, 2048 x 256 1470, 1024 x 256 820; the
        # predicate adds 40 %.
        bundles = len(pairs.row) * (heads * q * k / 540 + 330) + masked * heads * q * k / 1300
        cost.setdefault(Blocks(q, k, heads), bundles * n / heads)
    return min(cost, key=lambda blocks: cost[blocks])


# The kernel


def _forward(arrays, batch_axes=(), *, static: Static):
    """out BTND, lse BTN of arrays on one device."""
    q, k, v = arrays["q"], arrays["k"], arrays["v"]
    (b, t, n, h), (s, kh, dv) = q.shape, v.shape[1:]
    blocks = static.blocks or choose_blocks(static.mask, t, s, n, n // kh, q.dtype.itemsize)
    tq, ts = _round_up(t, blocks.q), _round_up(s, blocks.k)
    operands = {
        "q": _pad(q, tq, 0).swapaxes(1, 2).reshape(b * n, tq, h),
        "k": _pad(k, ts, 0).swapaxes(1, 2).reshape(b * kh, ts, h),
        "v": _pad(v, ts, 0).transpose(0, 2, 3, 1).reshape(b * kh, dv, ts),
    }
    if "keys" in arrays:
        operands["queries"] = _pad(arrays["queries"], tq, 0).astype(jnp.int32)[:, None]
        operands["keys"] = _pad(arrays["keys"], ts, HIDDEN).astype(jnp.int32)[:, :, None]
    out, lse = _call(operands, arrays.get("sinks"), (n, kh, s), static, blocks)
    out = out.reshape(b, n, tq, dv)[:, :, :t].swapaxes(1, 2)
    return out, lse.reshape(b, n, tq)[:, :, :t].swapaxes(1, 2)


def _call(operands, sinks, sizes, static: Static, blocks: Blocks):
    (n, kh, s), (bn, tq, h), dv = sizes, operands["q"].shape, operands["v"].shape[1]
    dtype, group = operands["q"].dtype, n // kh
    pairs = flat_plan(static.mask, tq, s, blocks.q, blocks.k)
    count, parts = len(pairs.row), bn // blocks.heads
    cores = 2 - parts % 2  # a chip with two cores shares the first axis of the grid out among them
    tiles = parts // cores * count
    columns = blocks.heads * blocks.q

    def at(lag, index):
        """An index map: index(part, row, column), of the tile that the stage `lag` steps late works on."""

        def index_map(core, step, row, column, *_):
            tile = jnp.clip(step - lag, 0, tiles - 1)
            part = jax.lax.div(tile, jnp.int32(count))
            pair = tile - part * count
            return index(core * (parts // cores) + part, row[pair], column[pair])

        return index_map

    share, per_batch = max(1, group // blocks.heads), n // blocks.heads
    kv = max(1, blocks.heads // group)
    specs = {
        "q": pl.BlockSpec((blocks.heads, blocks.q, h), at(0, lambda part, row, column: (part, row, 0))),
        "k": pl.BlockSpec((kv, blocks.k, h), at(0, lambda part, row, column: (_div(part, share), column, 0))),
        "v": pl.BlockSpec((kv, dv, blocks.k), at(LAG, lambda part, row, column: (_div(part, share), 0, column))),
        "queries": pl.BlockSpec((None, 1, blocks.q), at(0, lambda part, row, _: (_div(part, per_batch), 0, row))),
        "keys": pl.BlockSpec((None, blocks.k, 1), at(0, lambda part, _, column: (_div(part, per_batch), column, 0))),
    }
    kinds = {bool(flag) for flag in pairs.flags & MASKED}
    kernel = functools.partial(
        _kernel, names=tuple(operands), has_sinks=sinks is not None, kinds=kinds, s=s, count=count, tiles=tiles,
        group=group, per_batch=per_batch, parts=parts // cores, static=static,
    )  # fmt: skip
    scalars = [jnp.asarray(x) for x in (pairs.row, pairs.column, pairs.flags)] + ([] if sinks is None else [sinks])
    area = bn * count * blocks.q * blocks.k
    shapes = [jax.ShapeDtypeStruct((bn, tq, dv), dtype), jax.ShapeDtypeStruct((bn, 1, tq), jnp.float32)]
    row = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, tiles + LAG),
            in_specs=[specs[name] for name in operands],
            out_specs=[
                pl.BlockSpec((blocks.heads, blocks.q, dv), at(LAG, lambda part, row, column: (part, row, 0))),
                pl.BlockSpec((blocks.heads, 1, blocks.q), at(LAG, lambda part, row, column: (part, 0, row))),
            ],
            scratch_shapes=[
                row((blocks.k, columns)), pltpu.VMEM((blocks.k, columns), dtype), row((dv, columns)), row((8, columns)),
                row((1, columns)), row((8, columns)), row((1, columns)), row((1, columns)), row((8, columns)),
            ],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
            disable_bounds_checks=True,  # the plan is inside the arrays; the interpreter checks it
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * area * (h + dv),
            transcendentals=area * (1 if static.softcap is None else 2),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in [*operands.values(), *shapes]),
        ),
        interpret=static.interpret,
        name="flash_forward",
    )(*scalars, *operands.values())  # fmt: skip


def _kernel(row, column, flags, *refs, names, has_sinks, kinds, s, count, tiles, group, per_batch, parts, static):
    """One step: see the module's docstring."""
    sinks, refs = (refs[0], refs[1:]) if has_sinks else (None, refs)
    operands = dict(zip(names, refs, strict=False))
    out, lse, *scratch = refs[len(names) :]
    state = State(*scratch)
    core, step = pl.program_id(0), pl.program_id(1)
    pair_of = lambda lag: jax.lax.rem(jnp.clip(step - lag, 0, tiles - 1), jnp.int32(count))

    @pl.when(step == 0)
    def _():
        state.clear()

    def stages(mask):
        factor = (static.scale if static.softcap is None else static.softcap) * LOG2E
        first = flags[pair_of(1)] & FIRST != 0
        for strip in _strips(operands["q"].shape, group):
            state.accumulate(strip, operands["v"])
            state.exponentiate(strip, first, factor)
            state.multiply(strip, operands, (row[pair_of(0)], column[pair_of(0)]), mask, s, static)

    if len(kinds) == 1:
        stages(static.mask if kinds == {True} else None)
    else:
        masked = flags[pair_of(0)] & MASKED != 0
        pl.when(masked)(lambda: stages(static.mask))
        pl.when(~masked)(lambda: stages(None))

    @pl.when((step < LAG) | (flags[pair_of(LAG)] & LAST != 0))
    def _():
        factor = (static.scale if static.softcap is None else static.softcap) * LOG2E
        part = core * parts + jax.lax.div(jnp.clip(step - LAG, 0, tiles - 1), jnp.int32(count))
        head = jax.lax.rem(part, jnp.int32(per_batch)) * out.shape[0]
        for strip in _strips(operands["q"].shape, group):
            state.finish(strip, out, lse, None if sinks is None else sinks[head + strip.head], factor)


@dataclasses.dataclass(frozen=True)
class Strip:
    """A part of the columns of a step that the stages work on at once: queries [start, stop) of one head."""

    head: int
    kv: int
    start: int
    stop: int
    columns: slice


def _strips(shape, group) -> list[Strip]:
    heads, block_q, _ = shape
    width = min(256, block_q) if block_q % 256 == 0 else 128
    return [
        Strip(head, head // group, q0, q0 + width, slice(head * block_q + q0, head * block_q + q0 + width))
        for head in range(heads)
        for q0 in range(0, block_q, width)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What one step hands to the next, in VMEM, by column: a query of a head.

    logits and probs [keys, columns] of the last tile and of the one before, top [8, columns] the maxima of logits by
    sublane. peak [1, columns] and total [8, columns], the running maximum and (by sublane) sum, after the tile of
    probs; shrink [1, columns], the factor by which it reduced what was summed before. done_* are peak and total one
    tile earlier, which belong to sums [Dv, columns].
    """

    logits: Any
    probs: Any
    sums: Any
    top: Any
    peak: Any
    total: Any
    shrink: Any
    done_peak: Any
    done_total: Any

    def clear(self):
        """So that the first steps, which work on no tile yet, make zeros."""
        for name in ("logits", "top"):
            ref = getattr(self, name)
            ref[...] = jnp.full_like(ref, -jnp.inf)
        for name in ("probs", "sums", "total", "shrink"):
            ref = getattr(self, name)
            ref[...] = jnp.zeros_like(ref)
        self.peak[...] = jnp.full_like(self.peak, LOWEST)

    def multiply(self, strip, operands, tile, mask, s, static):
        """The first product: logits of a new tile, [keys, queries]."""
        q, k = operands["q"][strip.head, strip.start : strip.stop, :], operands["k"][strip.kv]
        x = _dot(k, q, NT)
        if static.softcap is not None:
            x = jnp.tanh(x * (static.scale / static.softcap))
        seen = _seen(strip, operands, tile, mask, s, x.shape)
        x = x if seen is None else jnp.where(seen, x, -jnp.inf)
        self.logits[:, strip.columns] = x
        self.top[:, strip.columns] = x.reshape(-1, 8, x.shape[1]).max(0)

    def exponentiate(self, strip, first, factor):
        """The softmax of the last tile, with the maximum of all tiles of its row so far."""
        at = strip.columns
        old, total = self.peak[:, at], self.total[:, at]
        self.done_peak[:, at], self.done_total[:, at] = old, total
        old = jnp.where(first, LOWEST, old)
        peak = jnp.maximum(old, self.top[:, at].max(0, keepdims=True))
        shrink = jnp.exp2((old - peak) * factor)
        p = jnp.exp2(self.logits[:, at] * factor - peak * factor)
        self.probs[:, at] = p.astype(self.probs.dtype)
        self.total[:, at] = jnp.where(first, 0, total) * shrink + p.reshape(-1, 8, p.shape[1]).sum(0)
        self.peak[:, at], self.shrink[:, at] = peak, shrink

    def accumulate(self, strip, v):
        """The second product: of the probabilities of the tile before the last."""
        at = strip.columns
        self.sums[:, at] = self.sums[:, at] * self.shrink[:, at] + _dot(v[strip.kv], self.probs[:, at], NN)

    def finish(self, strip, out, lse, sink, factor):
        """Writes the output of a row of tiles, and leaves zeros for the next."""
        at = strip.columns
        peak, total = self.done_peak[:, at] * factor, self.done_total[:, at].sum(0, keepdims=True)
        sums = self.sums[:, at]
        if sink is not None:
            top = jnp.maximum(peak, sink * LOG2E)
            total = total * jnp.exp2(peak - top) + jnp.exp2(sink * LOG2E - top)
            sums, peak = sums * jnp.exp2(peak - top), top
        empty = total == 0
        total = jnp.where(empty, 1, total)
        out[strip.head, strip.start : strip.stop, :] = (sums * (1 / total)).T.astype(out.dtype)
        lse[strip.head, :, strip.start : strip.stop] = jnp.where(empty, -jnp.inf, (peak + jnp.log2(total)) / LOG2E)
        self.sums[:, at] = jnp.zeros_like(sums)


def _seen(strip, operands, tile, mask, s, shape):
    """Which keys are seen by which queries, bool [keys, queries], or None for all of them."""
    seen = None
    if mask is not None:
        q0, k0 = tile[0] * operands["q"].shape[1] + strip.start, tile[1] * shape[0]
        k_pos = k0 + jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        q_pos = q0 + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
        seen = mask(q_pos, k_pos)
        if s % shape[0]:
            seen = seen & (k_pos < s)
    if "keys" in operands:
        same = operands["queries"][:, strip.start : strip.stop] == operands["keys"][...]
        seen = same if seen is None else seen & same
    return seen


def _dot(a, b, axes):
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32, precision=precision(a.dtype))


def _div(a, b: int):
    return a if b == 1 else jax.lax.div(a, jnp.int32(b))


def _pad(x, length: int, value):
    """x with its second axis padded to the length."""
    width = [(0, 0)] * x.ndim
    width[1] = (0, length - x.shape[1])
    return jnp.pad(x, width, constant_values=value) if length > x.shape[1] else x


def _round_up(x: int, step: int) -> int:
    return -(-x // step) * step
