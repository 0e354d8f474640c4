"""Attention of a few tokens over a long cache on TPU.

The cache is read once, in the layout it lies in. Its rows are pairs of key and key head, and one product of a block of
them with all query heads of all tokens gives every logit: those of other key heads are masked. That is redundant work
for the matrix unit, which would otherwise idle, and no transpose of the cache. Blocks that no token sees are not read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from jaxlm.kernels.attention import reference
from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.call import Call, precision, visible
from jaxlm.kernels.masks import Mask
from jaxlm.kernels.tpu import LOG2E, NN, NT, VMEM_BYTES, round_up, shard

LOWEST = float(np.finfo(np.float32).min) / 2  # a finite running maximum keeps rows that see nothing at 0
CACHE_ROWS = 4096  # of a block: keys times key heads
MOST_TOKENS, MOST_ROWS = 16, 256
REFUSED = {"bias", "alibi", "dropout"}


@dataclasses.dataclass(frozen=True)
class _Static:
    mask: Mask
    scale: float
    softcap: float | None
    interpret: Any


def decode_tpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    *,
    scale: float,
    return_lse: bool = False,
    q_pos: Int[Array, "#B T"] | None = None,
    k_pos: Int[Array, "#B S"] | None = None,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
    k_valid: Bool[Array, "#B S"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    interpret: Any = False,
) -> Float[Array, "B T N Dv"] | tuple[Float[Array, "B T N Dv"], Float[Array, "B T N"]]:
    """Attention of T queries, a few, over S keys; the gradient is the reference's."""
    hiding = {"q_segments": q_segments, "k_segments": k_segments, "k_valid": k_valid}
    positions = {
        "q_pos": jnp.arange(q.shape[1])[None] if q_pos is None else q_pos,
        "k_pos": jnp.arange(k.shape[1])[None] if k_pos is None else k_pos,
    }
    given = positions | {name: value for name, value in hiding.items() if value is not None}
    arrays = {name: jnp.broadcast_to(x, (q.shape[0], x.shape[1])) for name, x in given.items()}
    arrays |= {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
    both: Any = _attend(_Static(mask, scale, softcap, interpret), arrays)
    return both if return_lse else both[0]


def refuses_decode_tpu(call: Call) -> str | None:
    """Why this cannot run the call, or None."""
    if call.platform != "tpu":
        return f"needs a TPU, the platform is {call.platform!r}"
    if isinstance(call.mask, BlockTable):
        return "has no block tables"
    if refused := call.given & REFUSED:
        return f"has no {', '.join(sorted(refused))}"
    if call.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"computes in bfloat16 or float32, got {call.q.dtype}"
    t, n = call.q.shape[1:3]
    if t > MOST_TOKENS or t * n > MOST_ROWS:
        return f"decodes up to {MOST_TOKENS} tokens and {MOST_ROWS} tokens times heads, got {t} tokens of {n} heads"
    return None


def declines_decode_tpu(call: Call) -> str | None:
    """Why it is not the choice where none is named, or None."""
    t, s = call.q.shape[1], call.k.shape[1]
    return f"is for many more keys than queries, got {s} and {t}" if s < 8 * t else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, arrays: dict[str, Array]) -> tuple[Array, Array]:
    return shard(functools.partial(_forward, static), arrays, ("q", "lse"))


def _attend_fwd(static, arrays):
    both: Any = _attend(static, arrays)
    return both, arrays


def _attend_bwd(static, arrays, gradients):
    floating = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {name: x for name, x in arrays.items() if name not in floating}

    def run(floating):
        given = rest | floating
        q, k, v = (given.pop(name) for name in "qkv")
        return reference(q, k, v, static.mask, scale=static.scale, softcap=static.softcap, return_lse=True, **given)

    (grads,) = jax.vjp(run, floating)[1](gradients)
    return (grads | {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in rest.items()},)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(static: _Static, arrays, batch_axes=()):
    """out and the log-sum-exp, with the sinks, of arrays on one device."""
    given = dict(arrays)
    q, k, v, sinks = (given.pop(name, None) for name in ("q", "k", "v", "sinks"))
    (b, t, n, _), dv = q.shape, v.shape[-1]
    out, lse = _splits(static, q, k, v, visible(static.mask, **given))  # [B, splits, T * N, Dv], [B, splits, T * N]
    sink = jnp.full((n,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    every = jnp.concatenate([lse, jnp.broadcast_to(jnp.tile(sink, t), (b, 1, t * n))], 1)
    top = jnp.maximum(every.max(1, keepdims=True), LOWEST)
    shares = jnp.exp(every - top)
    total = shares.sum(1, keepdims=True)
    weights = (shares / jnp.where(total == 0, 1, total))[:, :-1]
    out = (out * weights[..., None]).sum(1).reshape(b, t, n, dv).astype(q.dtype)
    return out, (jnp.log(total) + top)[:, 0].reshape(b, t, n)


def _splits(static: _Static, q, k, v, seen):
    """out float32 [B, splits, T * N, Dv] and natural log-sum-exp [B, splits, T * N] of each part of the keys.

    seen bool [B or 1, T, S]. Two parts where there is only one sequence: chips with two cores then use both.
    """
    (b, t, n, h), (s, kh) = q.shape, k.shape[1:3]
    rows = round_up(t * n, 16)
    # A block of all keys, or one whose rows are whole lanes.
    block = max(128, CACHE_ROWS // kh // 128 * 128)
    block = s if block >= s else block
    count = -(-s // block)
    splits = 2 if b == 1 and count > 1 else 1
    seen = jnp.pad(jnp.broadcast_to(seen, (b, t, s)), ((0, 0), (0, 0), (0, count * block - s)))
    some = seen.any(1).reshape(b, count, block).any(2)
    visited = jnp.argsort(~some, axis=1, stable=True).astype(jnp.int32)
    used = some.sum(1, dtype=jnp.int32)
    hidden = jnp.where(_repeated(seen, kh), 0, -jnp.inf).astype(jnp.float32)

    # Joining keys and their heads outside of the kernel moves nothing if the heads fill whole tiles; else it would copy
    # the cache, and the kernel does it to a block in VMEM.
    if kh == 1 or kh % 8 == 0:
        k, v = (x.reshape(b, s * kh, x.shape[-1]) for x in (k, v))

    q = jnp.pad(q.reshape(b, t * n, h), ((0, 0), (0, rows - t * n), (0, 0)))
    out, lse = _call(static, (visited.reshape(-1), used, q, k, v, hidden), (n, kh, s), (block, count, splits))
    return out[:, :, : t * n], lse[:, :, : t * n, 0]


def _call(static: _Static, operands, sizes, cut):
    """The kernel over a cache cut into `count` blocks of `block` keys and `splits` parts of blocks."""
    (n, kh, s), (block, count, splits), (_, _, q, k, v, hidden) = sizes, cut, operands
    (b, rows, h), dv, t = q.shape, v.shape[-1], hidden.shape[1]

    def at(b, split, j, visited, used):
        # Past the end the last block is named again, so that nothing is fetched.
        return visited[b * count + jnp.clip(j * splits + split, 0, jnp.maximum(used[b] - 1, 0))]

    def cache(width):
        if k.ndim == 3:  # keys and their heads joined
            return pl.BlockSpec((None, block * kh, width), lambda b, *i: (b, at(b, *i), 0))
        return pl.BlockSpec((None, block, kh, width), lambda b, *i: (b, at(b, *i), 0, 0))

    part = lambda width: pl.BlockSpec((None, None, rows, width), lambda b, split, *_: (b, split, 0, 0))
    scratch = lambda width: pltpu.VMEM((rows, width), jnp.float32)
    moved = 2 * b * t * n * (h + dv) * 4 + b * s * kh * (h + dv) * k.dtype.itemsize + b * t * s * kh * 4
    return pl.pallas_call(
        functools.partial(_kernel, static=static, sizes=sizes, splits=splits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, splits, -(-count // splits)),
            in_specs=[
                pl.BlockSpec((None, rows, h), lambda b, *_: (b, 0, 0)),
                cache(h),
                cache(dv),
                pl.BlockSpec((None, t, block * kh), lambda b, *i: (b, 0, at(b, *i))),
            ],
            out_specs=[part(dv), part(128)],
            scratch_shapes=[scratch(block * kh), scratch(128), scratch(128), scratch(dv)],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, splits, rows, width), jnp.float32) for width in (dv, 128)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * rows * s * kh * (h + dv), transcendentals=b * rows * s * kh, bytes_accessed=moved
        ),
        interpret=static.interpret,
        name="decode",
    )(*operands)


def _repeated(seen, times):
    """Every element of the last axis so often. A product with ones does what would move single lanes."""
    if seen.shape[-1] % 128:
        return seen.repeat(times, -1)
    ones = np.repeat(np.eye(128, dtype=np.float32), times, 1)
    parts = seen.reshape(*seen.shape[:-1], -1, 128).astype(jnp.bfloat16)
    return (parts @ jnp.asarray(ones, jnp.bfloat16)).reshape(*seen.shape[:-1], -1) > 0


def _kernel(visited, used, q, k, v, hidden, out, lse, others, top, total, sums, *, static: _Static, sizes, splits):
    """One block of the cache; rows are tokens times query heads, columns keys times key heads."""
    (n, kh, s), b, split, j = sizes, pl.program_id(0), pl.program_id(1), pl.program_id(2)
    at, shape = j * splits + split, others.shape
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision(q.dtype))

    @pl.when(j == 0)
    def _():
        head = jax.lax.broadcasted_iota(jnp.int32, shape, 0) % n // (n // kh)
        others[...] = jnp.where(jax.lax.broadcasted_iota(jnp.int32, shape, 1) % kh == head, 0, -jnp.inf)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    @pl.when(at < used[b])
    def _():
        products = dot(q[...], k[...].reshape(-1, k.shape[-1]), NT)
        if static.softcap is None:
            logits = products * (static.scale * LOG2E)
        else:
            logits = jnp.tanh(products * (static.scale / static.softcap)) * (static.softcap * LOG2E)
        row = jax.lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0)
        unseen = hidden[0:1, :]
        for token in range(1, hidden.shape[0]):
            unseen = jnp.where(row >= token * n, hidden[token : token + 1, :], unseen)
        # Selected, not added: what lies past the end of the cache may be NaN.
        logits = jnp.where(others[...] + unseen == 0, logits, -jnp.inf)
        old = top[:, :1]
        new = jnp.maximum(old, logits.max(1, keepdims=True))
        p, kept = jnp.exp2(logits - new), jnp.exp2(old - new)
        values = v[...].reshape(-1, v.shape[-1])
        if s * kh % shape[1]:
            key = (
                jax.lax.broadcasted_iota(jnp.int32, (shape[1], 1), 0)
                + visited[b * (-(-s * kh // shape[1])) + at] * shape[1]
            )
            values = jnp.where(key < s * kh, values, 0)
        sums[...] = sums[...] * kept + dot(p.astype(v.dtype), values, NN)
        total[...] = jnp.broadcast_to(total[:, :1] * kept + p.sum(1, keepdims=True), total.shape)
        top[...] = jnp.broadcast_to(new, top.shape)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        nothing = total[...] == 0
        whole = jnp.where(nothing, 1, total[...])
        out[...] = sums[...] / whole[:, :1]
        lse[...] = jnp.where(nothing, -jnp.inf, (top[...] + jnp.log2(whole)) / LOG2E)
