"""A few queries over a long cache: the keys are split, each split has a softmax of its own, and these are joined.

Splits without a visible key (the empty end of a cache, what a window has left behind) are not visited, whatever hides
them: which ones those are is found out before the loop. The cache is read where it lies, neither padded nor transposed
as a whole. It has a gradient, that of the chunked implementation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.call import Call, precision, vary_alike, varying_zero, visible
from jaxlm.kernels.tiles import LEAST
from jaxlm.kernels.xla import split_smooth, xla

QUERIES = 16  # at most
SPLIT = 512  # keys
# B * S * K from which it is the choice on a CPU, measured with scripts/bench_attention.py: over a cache filled to a
# quarter it takes 0.2 to 0.5 of the reference's time, over a full one 0.5 to 1.5.
KEYS = 10_000


def decode(q, k, v, mask, *, scale, return_lse=False, split=SPLIT, **features):
    """Up to 16 queries, by splits of the keys; everything but dropout and block tables."""
    softcap = features.pop("softcap", None)
    smooth, rest = split_smooth(vary_alike({"q": q, "k": k, "v": v, **features}))
    out, lse = _attend((mask, float(scale), softcap, min(split, k.shape[1])), smooth, rest)
    return (out, lse) if return_lse else out


def refuses_decode(call: Call) -> str | None:
    """Many queries, dropout, block tables."""
    if call.q.shape[1] > QUERIES:
        return f"takes at most {QUERIES} queries, got {call.q.shape[1]}"
    if isinstance(call.mask, BlockTable):
        return "has no block tables"
    if "dropout" in call.given:
        return "has no dropout"
    return None


def declines_decode(call: Call) -> str | None:
    """Short caches, and platforms where a loop over splits leaves most of the chip idle."""
    if call.platform != "cpu":
        return f"loops over splits of the keys, which pays on a CPU, not on {call.platform!r}"
    (b, s, heads, _), least = call.k.shape, 2 * SPLIT
    return None if b * s * heads >= KEYS and s >= least else f"pays from {least} slots and {KEYS} keys (B * S * K) on"


def _results(static, smooth: dict, rest: dict) -> tuple[Array, Array]:
    mask, scale, softcap, size = static
    q, k, v = smooth["q"], smooth["k"], smooth["v"]
    (b, t, n, h), (s, kh), dv = q.shape, k.shape[1:3], v.shape[3]
    splits, group = -(-s // size), n // kh
    product = functools.partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    queries = q.reshape(b, t, kh, group, h).transpose(0, 2, 3, 1, 4).reshape(b, kh, group * t, h)
    heads = lambda x: x.reshape(*x.shape[:-3], *((kh, group) if x.shape[-3] == n else (1, 1)), *x.shape[-2:])
    q_pos, k_pos = rest.get("q_pos", jnp.arange(t)[None]), rest.get("k_pos", jnp.arange(s)[None])
    segments = {name: rest[name] for name in ("q_segments", "k_segments", "k_valid") if name in rest}
    seen = visible(mask, q_pos, k_pos, **segments)  # [B or 1, T, S]
    used = jnp.pad(seen.any((0, 1)), (0, splits * size - s)).reshape(splits, size).any(1)
    order = jnp.argsort(~used, stable=True)

    def step(at, parts):
        acc, top, total = parts
        # The last split starts early enough to be whole, and hides what the one before it has had.
        first, i = order[at] * size, order[at]
        start = jnp.minimum(first, s - size)
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, size, axis) if x.shape[axis] > 1 else x
        logits = product("BKMH,BSKH->BKMS", queries, cut(k, 1)).reshape(b, kh, group, t, size) * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if "bias" in smooth:
            logits = logits + heads(cut(smooth["bias"], 3))
        if "alibi" in smooth:
            distance = cut(k_pos, 1)[:, None, :] - q_pos[:, :, None]
            logits = logits + heads(smooth["alibi"][:, None, None] * distance[:, None])
        here = cut(seen, 2) & (start + jnp.arange(size) >= first)
        logits = jnp.where(here[:, None, None], logits, -jnp.inf)
        highest = jnp.maximum(logits.max(-1), LEAST)
        p = jnp.exp(logits - highest[..., None])
        part = product("BKMS,BSKD->BKMD", p.reshape(b, kh, group * t, size).astype(v.dtype), cut(v, 1))
        return acc.at[i].set(part.reshape(acc.shape[1:])), top.at[i].set(highest), total.at[i].set(p.sum(-1))

    rows = (splits, b, kh, group, t)
    zero = varying_zero(smooth)
    empty = (jnp.zeros((*rows, dv), jnp.float32) + zero, jnp.full(rows, LEAST) + zero, jnp.zeros(rows) + zero)
    acc, top, total = jax.lax.fori_loop(0, used.sum(), step, empty)
    sinks = smooth["sinks"].astype(jnp.float32).reshape(kh, group, 1) if "sinks" in smooth else -jnp.inf
    highest = jnp.maximum(top.max(0), sinks)
    weight = jnp.exp(top - highest)
    total = (total * weight).sum(0) + jnp.exp(sinks - highest)
    some = total > 0
    out = (acc * weight[..., None]).sum(0) / jnp.where(some, total, 1)[..., None]
    lse = jnp.where(some, jnp.log(jnp.where(some, total, 1)) + highest, -jnp.inf)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, dv).astype(q.dtype), lse.transpose(0, 3, 1, 2).reshape(b, t, n)


def _forward(static, smooth: dict, rest: dict):
    return _results(static, smooth, rest), (smooth, rest)


def _backward(static, saved, cotangents):
    (mask, scale, softcap, _), (smooth, rest) = static, saved
    given = rest | ({} if softcap is None else {"softcap": softcap})
    chunked = lambda x: xla(mask=mask, scale=scale, return_lse=True, **x, **given)
    return *jax.vjp(chunked, smooth)[1](cotangents), None


_attend: Any = jax.custom_vjp(_results, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
