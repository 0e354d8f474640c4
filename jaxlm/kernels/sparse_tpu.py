"""Attention over a BlockTable on TPU: its entry, what it refuses, and its custom_vjp around the kernels."""

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

from jaxlm.kernels.block_table import BlockTable, merge_rows, table_of
from jaxlm.kernels.call import Call
from jaxlm.kernels.masks import Mask
from jaxlm.kernels.sparse_tpu_kernels import MOST_KEYS, Static, Tiling, backward_kernel, forward_kernel
from jaxlm.kernels.tpu import LOG2E, heads_first, lane_rows, round_up, segment_arrays, shard

SMEM_BYTES = 1000 * 2**10  # of the 1024 KB that chips have from v4 on
FEATURES = {"q_segments", "k_segments", "k_valid", "softcap", "sinks"}


def sparse_tpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    mask: BlockTable | Mask,
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

    Rows of `full_rows` are a second call, whose table lists every block. A mask of whole blocks is made a table.
    """
    table = mask if isinstance(mask, BlockTable) else table_of(mask, q.shape[1], k.shape[1])
    if table is None:
        raise ValueError(f"{mask} is not one of whole blocks of {q.shape[1]} queries and {k.shape[1]} keys")
    table.validate(q.shape[1], k.shape[1], q.shape[2])
    arrays = {"q": q, "k": k, "v": v}
    if q_segments is not None or k_valid is not None:
        sizes = (q.shape[0], q.shape[1], k.shape[1])
        row_and_column = segment_arrays(q_segments, k_segments, k_valid, sizes, sizes[1:])
        arrays |= {"queries": row_and_column["q_segments"][:, 0], "keys": row_and_column["k_segments"][:, :, 0]}
    if sinks is not None:
        arrays["sinks"] = sinks
    static = Static(table.block, scale, softcap, interpret)
    full, blocks = np.flatnonzero(table.full()), jnp.asarray(table.blocks)
    blocks = blocks.at[:, full].set(-1) if len(full) else blocks
    both: Any = _attend(static, arrays | {"blocks": blocks})
    if len(full):
        tokens = (full[:, None] * table.block + np.arange(table.block)).ravel()
        every = jnp.arange(k.shape[1] // table.block, dtype=jnp.int32)
        every = jnp.broadcast_to(every, (1, len(full), len(every)))
        some = {name: arrays[name][:, tokens] for name in ("q", "queries") if name in arrays}
        rows: Any = _attend(static, arrays | some | {"blocks": every})
        both = tuple(whole.at[:, tokens].set(part) for whole, part in zip(both, rows, strict=True))
    return both if return_lse else both[0]


def refuses_sparse_tpu(call: Call) -> str | None:
    """Why this cannot run the call, or None."""
    if call.platform != "tpu":
        return f"needs a TPU, the platform is {call.platform!r}"
    (t, s), table = (call.q.shape[1], call.k.shape[1]), call.mask
    if not isinstance(table, BlockTable):
        table = table_of(table, t, s)
    if table is None:
        return f"runs block tables and masks of whole blocks, not {call.mask} of {t} queries and {s} keys"
    if missing := call.given - FEATURES:
        return f"has no {', '.join(sorted(missing))}"
    if call.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"computes in bfloat16 or float32, got {call.q.dtype}"
    block = table.block
    if (block % 128 and block not in (32, 64)) or block > MOST_KEYS:
        return f"needs blocks of 32, 64 or a multiple of 128 up to {MOST_KEYS}, got {block}"
    need, have = vmem_bytes(call.k, call.v, call.given), _vmem()
    if need > have:
        return f"keeps {call.k.shape[1]} keys and their gradients in VMEM: {need / 2**20:.0f} MB of {have / 2**20:.0f}"
    if (need := smem_bytes(table, t, s)) > SMEM_BYTES:
        return f"keeps the lists of a head in scalar memory: {need / 2**10:.0f} KB of {SMEM_BYTES / 2**10:.0f}"
    return None


def smem_bytes(table: BlockTable, t: int, s: int) -> int:
    """Scalar memory for the lists of one head and those of the next, of the larger of both calls."""
    rows, columns, full = t // table.block, s // table.block, int(table.full().sum())
    tilings = [Tiling.of(table.block, rows, columns, table.blocks.shape[2])]
    tilings += [Tiling.of(table.block, full, columns, columns)] if full else []
    return max(8 * x.tiles * (1 + x.entries + x.entries * x.group) for x in tilings)


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
def _attend(static: Static, arrays: dict[str, Array]) -> tuple[Array, Array]:
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


def _forward(static: Static, arrays, batch_axes=()):
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
    out, lse = _call(forward_kernel, "sparse_forward", static, tiling, operands, shapes, products=(1, 1))
    return out[:, :, :t].swapaxes(1, 2), lse[:, :, 0, :t].swapaxes(1, 2)


def _backward(static: Static, arrays, batch_axes=()):
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
    dq, dk, dv = _call(backward_kernel, "sparse_backward", static, tiling, operands, shapes, products=(3, 2))
    dk = (dk * static.scale).astype(k.dtype)
    return dq[:, :, :t].swapaxes(1, 2), dk.swapaxes(1, 2), dv.astype(v.dtype).swapaxes(1, 2)


def _operands(static: Static, arrays):
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


def _call(kernel, name, static: Static, tiling: Tiling, operands, shapes, *, products):
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
