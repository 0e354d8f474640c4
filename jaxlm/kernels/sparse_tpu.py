"""Attention over a BlockTable on TPU, forward and backward.

Keys and values of a head stay in VMEM, so that a listed block costs a load and no transfer, and the gradients of keys
and values are added where they belong. A tile of 128 queries visits the union of its rows' lists, `width` key blocks at
a time; the logarithm of how often each of its rows lists a block joins the logits, -inf where it does not. Tiles are
transposed, [keys, queries], as in the dense backward pass.
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

from jaxlm.kernels.block_table import BlockTable, merge_rows
from jaxlm.kernels.call import Call, precision
from jaxlm.kernels.flash_tpu import shard
from jaxlm.kernels.flash_tpu_bwd import LOG2E, NN, NT, TN, heads_first, lane_rows, round_up, segment_arrays

LOWEST = float(np.finfo(np.float32).min) / 2  # a finite running maximum keeps rows that see nothing at 0
MOST_KEYS = 1024  # of one pass over a tile
TILES_A_STEP = 8
FEATURES = {"q_segments", "k_segments", "k_valid", "softcap", "sinks"}


@dataclasses.dataclass(frozen=True)
class _Static:
    """What the kernels are compiled for."""

    block: int
    scale: float
    softcap: float | None
    interpret: Any


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a table of query blocks x slots is visited.

    A tile has `group` query blocks; a pass over it takes `width` key blocks, of `entries` in its list; `together` tiles
    run interleaved, `step` tiles in a step of the grid, `tiles` in all.
    """

    group: int
    width: int
    entries: int
    together: int
    step: int
    tiles: int
    likely: int  # key blocks that a tile visits, if half of what a row lists is new to the tile

    @classmethod
    def of(cls, block: int, query_blocks: int, key_blocks: int, slots: int) -> "Tiling":
        group = max(1, 128 // block)
        likely = min(slots + (group - 1) * slots // 2, key_blocks)
        width = max(1, min(likely, MOST_KEYS // block))
        tiles = -(-query_blocks // group)
        together = 4 if tiles >= 4 else 2 if tiles >= 2 else 1  # a power of two
        step = round_up(-(-tiles // -(-tiles // TILES_A_STEP)), together)
        entries = round_up(min(group * slots, key_blocks), width)
        return cls(group, width, entries, together, step, round_up(tiles, step), round_up(likely, width))


def sparse_tpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    mask: BlockTable,
    *,
    scale: float,
    return_lse: bool = False,
    softcap: float | None = None,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
    k_valid: Bool[Array, "#B S"] | None = None,
    sinks: Float[Array, " N"] | None = None,
    interpret: Any = False,
) -> Float[Array, "B T N Dv"] | tuple[Float[Array, "B T N Dv"], Float[Array, "B T N"]]:
    """Attention in which query blocks see the key blocks that the table lists, each as often as it is listed.

    Rows of `full_rows` are a second call, whose table lists every block.
    """
    mask.validate(q.shape[1], k.shape[1], q.shape[2])
    arrays = {"q": q, "k": k, "v": v}
    if q_segments is not None or k_valid is not None:
        sizes = (q.shape[0], q.shape[1], k.shape[1])
        row_and_column = segment_arrays(q_segments, k_segments, k_valid, sizes, sizes[1:])
        arrays |= {"queries": row_and_column["q_segments"][:, 0], "keys": row_and_column["k_segments"][:, :, 0]}
    if sinks is not None:
        arrays["sinks"] = sinks
    static = _Static(mask.block, scale, softcap, interpret)
    full = np.flatnonzero(mask.full())
    blocks = mask.blocks.at[:, full].set(-1) if len(full) else mask.blocks
    both: Any = _attend(static, arrays | {"blocks": blocks})
    if len(full):
        tokens = (full[:, None] * mask.block + np.arange(mask.block)).ravel()
        every = jnp.arange(k.shape[1] // mask.block, dtype=jnp.int32)
        every = jnp.broadcast_to(every, (1, len(full), len(every)))
        some = {name: arrays[name][:, tokens] for name in ("q", "queries") if name in arrays}
        rows: Any = _attend(static, arrays | some | {"blocks": every})
        both = tuple(whole.at[:, tokens].set(part) for whole, part in zip(both, rows, strict=True))
    return both if return_lse else both[0]


def refuses_sparse_tpu(call: Call) -> str | None:
    """Why this cannot run the call, or None."""
    if call.platform != "tpu":
        return f"needs a TPU, the platform is {call.platform!r}"
    if not isinstance(call.mask, BlockTable):
        return f"runs block tables, not {call.mask}"
    if missing := call.given - FEATURES:
        return f"has no {', '.join(sorted(missing))}"
    if call.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"computes in bfloat16 or float32, got {call.q.dtype}"
    block = call.mask.block
    if (block % 128 and block not in (32, 64)) or block > MOST_KEYS:
        return f"needs blocks of 32, 64 or a multiple of 128 up to {MOST_KEYS}, got {block}"
    need, have = vmem_bytes(call.k, call.v, call.given), _vmem()
    if need > have:
        return f"keeps {call.k.shape[1]} keys and their gradients in VMEM: {need / 2**20:.0f} MB of {have / 2**20:.0f}"
    return None


def vmem_bytes(k, v, given=frozenset()) -> int:
    """VMEM that the backward pass needs: keys, values, their float32 gradients, segments, and 8 MB for queries."""
    widths, size = round_up(k.shape[-1], 128) + round_up(v.shape[-1], 128), np.dtype(k.dtype).itemsize
    key_bytes = widths * (size + 4) + (512 if given & {"q_segments", "k_valid"} else 0)
    return k.shape[1] * key_bytes + 8 * 2**20


def _vmem() -> int:
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except (ValueError, NotImplementedError, AttributeError):
        return 16 * 2**20  # the smallest


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, arrays: dict[str, Array]) -> tuple[Array, Array]:
    """out and the log-sum-exp of q, k, v under `blocks` and, where given, segments (queries, keys) and sinks."""
    return shard(functools.partial(_forward, static), arrays, ("q", "lse"), by_head=("blocks",))


def _attend_fwd(static, arrays):
    both: Any = _attend(static, arrays)
    return both, (arrays, *both)


def _attend_bwd(static, saved, gradients):
    arrays, out, lse = saved
    dout, dlse = gradients
    delta = jnp.einsum("BTND,BTND->BTN", dout, out, preferred_element_type=jnp.float32)
    seen = lse > -jnp.inf
    shift = jnp.where(seen, delta - dlse, 0)
    rows = {"dout": dout, "lse": jnp.where(seen, lse * LOG2E, jnp.inf), "shift": shift}
    dq, dk, dv = shard(functools.partial(_backward, static), arrays | rows, ("q", "k", "v"), by_head=("blocks",))
    grads = {"q": dq, "k": dk, "v": dv}
    if "sinks" in arrays:
        sinks = arrays["sinks"]
        grads["sinks"] = -(jnp.exp(sinks.astype(jnp.float32) - lse) * shift).sum((0, 1)).astype(sinks.dtype)
    whole = {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in arrays.items() if name not in grads}
    return (grads | whole,)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _lists(blocks, tiling: Tiling, block: int, key_blocks: int):
    """The lists as scalars: int32 [N or 1, 1, tiles * (1 + entries)] and float32 [N or 1, 1, tiles * entries * group].

    Of each tile the number of passes, then its key blocks; and for each of those log2 of its count in each row.
    """
    heads = blocks.shape[0]
    rows = jnp.pad(blocks, ((0, 0), (0, tiling.tiles * tiling.group - blocks.shape[1]), (0, 0)), constant_values=-1)
    merged, counts = merge_rows(BlockTable(rows, block), tiling.group, key_blocks)
    passes = -(-(merged >= 0).sum(-1, keepdims=True) // tiling.width)
    fill = tiling.entries - merged.shape[2]
    merged = jnp.pad(jnp.maximum(merged, 0), ((0, 0), (0, 0), (0, fill)))
    counts = jnp.pad(counts, ((0, 0), (0, 0), (0, fill), (0, 0)))
    scalars = jnp.concatenate([passes, merged], 2).astype(jnp.int32)
    return scalars.reshape(heads, 1, -1), jnp.log2(counts.astype(jnp.float32)).reshape(heads, 1, -1)


def _forward(static: _Static, arrays, batch_axes=()):
    """out and the log-sum-exp, BTND and BTN."""
    (b, t, n, _), dv = arrays["q"].shape, arrays["v"].shape[-1]
    tiling, operands = _operands(static, arrays)
    length = operands["q"].shape[2]
    if "sinks" in arrays:
        operands["sinks"] = (arrays["sinks"].astype(jnp.float32) * LOG2E).reshape(n, 1, 1)
    shapes = {
        "out": jax.ShapeDtypeStruct((b, n, length, dv), arrays["q"].dtype),
        "lse": jax.ShapeDtypeStruct((b, n, 1, length), jnp.float32),
    }
    out, lse = _call(_forward_kernel, "sparse_forward", static, tiling, operands, shapes, products=(1, 1))
    return out[:, :, :t].swapaxes(1, 2), lse[:, :, 0, :t].swapaxes(1, 2)


def _backward(static: _Static, arrays, batch_axes=()):
    """dq, dk and dv."""
    q, k, v = (arrays[name] for name in "qkv")
    (b, t, n, h), (s, kh, dv) = q.shape, v.shape[1:]
    tiling, operands = _operands(static, arrays)
    length = operands["q"].shape[2]
    operands |= {
        "do": heads_first(arrays["dout"].astype(v.dtype), length),
        "lse": lane_rows(arrays["lse"], length, jnp.inf),
        "shift": lane_rows(arrays["shift"], length, 0),
    }
    shapes = {
        "dq": jax.ShapeDtypeStruct((b, n, length, h), q.dtype),
        "dk": jax.ShapeDtypeStruct((b, kh, s, h), jnp.float32),
        "dv": jax.ShapeDtypeStruct((b, kh, s, dv), jnp.float32),
    }
    dq, dk, dv = _call(_backward_kernel, "sparse_backward", static, tiling, operands, shapes, products=(3, 2))
    dk = (dk * static.scale).astype(k.dtype)
    return dq[:, :, :t].swapaxes(1, 2), dk.swapaxes(1, 2), dv.astype(v.dtype).swapaxes(1, 2)


def _operands(static: _Static, arrays):
    q, k, v, blocks = (arrays[name] for name in ("q", "k", "v", "blocks"))
    s, block = k.shape[1], static.block
    tiling = Tiling.of(block, blocks.shape[1], s // block, blocks.shape[2])
    length = tiling.tiles * tiling.group * block
    lists, logs = _lists(blocks, tiling, block, s // block)
    operands = {"lists": lists, "logs": logs, "q": heads_first(q, length)}
    operands |= {"k": heads_first(k, s), "v": heads_first(v, s)}
    if "keys" in arrays:
        queries = arrays["queries"]
        operands["q_segments"] = jnp.pad(queries, ((0, 0), (0, length - queries.shape[1])))[:, None]
        operands["k_segments"] = arrays["keys"][:, :, None]
    return tiling, operands


def _call(kernel, name, static: _Static, tiling: Tiling, operands, shapes, *, products):
    """The kernel over a grid of batch, key heads, query heads of one key head, and steps of tiles.

    products counts the matrix products of a tile whose third axis is H, and those where it is Dv.
    """
    (b, n, _, h), (kh, s, dv) = operands["q"].shape, operands["v"].shape[1:]
    group, size = n // kh, tiling.step * tiling.group * static.block
    head = lambda k, g: k * group + g
    once = pl.Buffered(1)

    def spec(name, shape):
        match name:
            case "lists" | "logs":
                at = (lambda b, k, g, i: (head(k, g), 0, 0)) if shape[0] > 1 else (lambda b, k, g, i: (0, 0, 0))
                return pl.BlockSpec((None, *shape[1:]), at, memory_space=pltpu.SMEM)
            case "sinks":
                return pl.BlockSpec((None, 1, 1), lambda b, k, g, i: (head(k, g), 0, 0), memory_space=pltpu.SMEM)
            case "q_segments":
                return pl.BlockSpec((None, 1, size), lambda b, k, g, i: (b, 0, i))
            case "k_segments":
                return pl.BlockSpec((None, s, 1), lambda b, k, g, i: (b, 0, 0), pipeline_mode=once)
            case "k" | "v" | "dk" | "dv":
                return pl.BlockSpec((None, None, s, shape[3]), lambda b, k, g, i: (b, k, 0, 0), pipeline_mode=once)
            case "lse" | "shift":
                return pl.BlockSpec((None, None, 1, size), lambda b, k, g, i: (b, head(k, g), 0, i))
        return pl.BlockSpec((None, None, size, shape[3]), lambda b, k, g, i: (b, head(k, g), i, 0))

    area = b * n * tiling.tiles * tiling.group * tiling.likely * static.block**2
    moved = [*operands.values(), *shapes.values()]
    need = vmem_bytes(operands["k"].swapaxes(1, 2), operands["v"].swapaxes(1, 2), operands.keys())
    return pl.pallas_call(
        functools.partial(kernel, names=(*operands, *shapes), static=static, tiling=tiling),
        grid=(b, kh, group, tiling.tiles // tiling.step),
        in_specs=[spec(name, x.shape) for name, x in operands.items()],
        out_specs=[spec(name, x.shape) for name, x in shapes.items()],
        out_shape=list(shapes.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(need, 16 * 2**20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * area * (products[0] * h + products[1] * dv),
            transcendentals=area * (1 if static.softcap is None else 2),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
        ),
        interpret=static.interpret,
        name=name,
    )(*operands.values())


def _forward_kernel(*refs, names, static: _Static, tiling: Tiling):
    """A step of tiles: out and their log-sum-exp."""
    x = dict(zip(names, refs, strict=True))
    dv, first = x["v"].shape[1], pl.program_id(3) * tiling.step

    def together(at, _):
        tiles = [_Tile(x, static, tiling, first, at * tiling.together + i) for i in range(tiling.together)]
        top = jnp.full((1, tiles[0].rows), LOWEST if "sinks" not in x else x["sinks"][0, 0], jnp.float32)
        total = jnp.full_like(top, 0 if "sinks" not in x else 1)
        states = [(top, total, jnp.zeros((dv, tile.rows), jnp.float32)) for tile in tiles]
        states = _passes(tiles, _forward_pass, states)
        for tile, (top, total, out) in zip(tiles, states, strict=True):
            total_or_1 = jnp.where(total == 0, 1, total)
            x["out"][tile.at, :] = (out / total_or_1).T.astype(x["out"].dtype)
            x["lse"][:, tile.at] = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total_or_1)) / LOG2E)

    jax.lax.fori_loop(0, tiling.step // tiling.together, together, None)


def _forward_pass(tiles: list["_Tile"], number, states):
    """Adds `width` key blocks to each running maximum, sum and output, the latter transposed [Dv, rows].

    Step by step over the tiles: while one waits for the matrix unit the others compute.
    """
    seen = [tile.logits(number) for tile in tiles]
    tops = [jnp.maximum(top, x[0].max(0, keepdims=True)) for x, (top, _, _) in zip(seen, states, strict=True)]
    weights = [jnp.exp2(x[0] - top) for x, top in zip(seen, tops, strict=True)]
    kept = [jnp.exp2(old - top) for (old, _, _), top in zip(states, tops, strict=True)]
    new = []
    for i, (tile, (_, total, out)) in enumerate(zip(tiles, states, strict=True)):
        v, p = seen[i][2][1], weights[i]
        out = out * kept[i] + tile.dot(v, p.astype(v.dtype), TN)
        new.append((tops[i], total * kept[i] + p.sum(0, keepdims=True), out))
    return new


def _backward_kernel(*refs, names, static: _Static, tiling: Tiling):
    """A step of tiles: their dq, and what they add to dk and dv."""
    x = dict(zip(names, refs, strict=True))
    first, pair = pl.program_id(3) * tiling.step, min(2, tiling.together)

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        x["dk"][...] = jnp.zeros_like(x["dk"])
        x["dv"][...] = jnp.zeros_like(x["dv"])

    def together(at, _):
        tiles = [_Tile(x, static, tiling, first, at * pair + i) for i in range(pair)]
        sums = _passes(tiles, _backward_pass, [jnp.zeros(tile.q.shape, jnp.float32) for tile in tiles])
        for tile, dq in zip(tiles, sums, strict=True):
            x["dq"][tile.at, :] = (dq * static.scale).astype(x["dq"].dtype)

    jax.lax.fori_loop(0, tiling.step // pair, together, None)


def _backward_pass(tiles: list["_Tile"], number, sums):
    """Adds the gradients of `width` key blocks: step by step over the tiles, as the forward pass."""
    seen, x = [tile.logits(number) for tile in tiles], tiles[0].x
    p = [jnp.exp2(s[0] - x["lse"][:, tile.at]) for tile, s in zip(tiles, seen, strict=True)]
    ds = [_logit_gradients(*each) for each in zip(tiles, seen, p, strict=True)]
    new = []
    for tile, (_, _, (k, _, slices)), dlogits, weights, dq in zip(tiles, seen, ds, p, sums, strict=True):
        do, block = x["do"][tile.at, :], tile.static.block
        dk, dv = tile.dot(dlogits, tile.q, NN), tile.dot(weights.astype(do.dtype), do, NN)
        for i, keys in enumerate(slices):
            x["dk"][keys, :] += dk[i * block : (i + 1) * block]
            x["dv"][keys, :] += dv[i * block : (i + 1) * block]
        new.append(dq + tile.dot(dlogits, k, TN))
    return new


def _logit_gradients(tile: "_Tile", seen, p):
    _, squashed, (k, v, _) = seen
    ds = p * (tile.dot(v, tile.x["do"][tile.at, :], NT) - tile.x["shift"][:, tile.at])
    return (ds if squashed is None else ds * (1 - squashed * squashed)).astype(k.dtype)


def _passes(tiles: list["_Tile"], one, states):
    """The passes over tiles that run interleaved: the first without a loop, since most lists need no other."""
    states, tiling = one(tiles, 0, states), tiles[0].tiling
    if tiling.entries == tiling.width:
        return states
    most = functools.reduce(jnp.maximum, [tile.passes for tile in tiles])
    return jax.lax.fori_loop(1, most, functools.partial(one, tiles), states)


class _Tile:
    """Some query blocks of one head, in a kernel."""

    def __init__(self, x, static: _Static, tiling: Tiling, first, local):
        self.x, self.static, self.tiling = x, static, tiling
        self.rows = tiling.group * static.block
        self.at = pl.ds(pl.multiple_of(local * self.rows, self.rows), self.rows)
        self.q = x["q"][self.at, :]
        tile = first + local
        self.list_start, self.log_start = tile * (1 + tiling.entries), tile * tiling.entries * tiling.group
        self.passes = x["lists"][0, self.list_start]
        self.dot = functools.partial(
            jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision(self.q.dtype)
        )

    def logits(self, number):
        """Of one pass: logits in base 2 [keys, rows], softcap's tanh or None, and keys, values and where they lie."""
        static, width, block = self.static, self.tiling.width, self.static.block
        first = number * width
        columns = [self.x["lists"][0, self.list_start + 1 + first + i] for i in range(width)]
        slices = [pl.ds(pl.multiple_of(column * block, block), block) for column in columns]
        k, v = (jnp.concatenate([self.x[name][keys, :] for keys in slices], 0) for name in "kv")
        products, squashed = self.dot(k, self.q, NT), None
        if static.softcap is None:
            logits = products * (static.scale * LOG2E)
        else:
            squashed = jnp.tanh(products * (static.scale / static.softcap))
            logits = squashed * (static.softcap * LOG2E)
        parts = [logits[i * block : (i + 1) * block] + self._log_counts(first + i) for i in range(width)]
        if "k_segments" in self.x:
            segments = self.x["q_segments"][:, self.at]
            same = [segments == self.x["k_segments"][keys, :] for keys in slices]
            parts = [jnp.where(seen, part, -jnp.inf) for seen, part in zip(same, parts, strict=True)]
        return jnp.concatenate(parts, 0), squashed, (k, v, slices)

    def _log_counts(self, entry):
        """log2 of how often each query lists the block of this entry, [1, rows]."""
        group, block = self.tiling.group, self.static.block
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.rows), 1)
        counts = [self.x["logs"][0, self.log_start + entry * group + i] for i in range(group)]
        row = jnp.full((1, self.rows), counts[0], jnp.float32)
        for i in range(1, group):
            row = jnp.where(lane >= i * block, counts[i], row)
        return row
