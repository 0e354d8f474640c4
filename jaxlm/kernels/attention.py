"""The one entry to attention, its reference implementation, and the choice between implementations.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, G = N // K, H head dim. q is BTNH, k and v are BSKH.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from jaxlm.kernels.masks import Band, Full, Mask

log = logging.getLogger(__name__)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    *,
    q_pos: Int[Array, "#B T"] | None = None,
    k_pos: Int[Array, "#B S"] | None = None,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
    k_valid: Bool[Array, "#B S"] | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout: tuple[float, Key[Array, ""]] | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N Dv"] | tuple[Float[Array, "B T N Dv"], Float[Array, "B T N"]]:
    """softmax(scale * q k^T) v under a mask, in q's dtype; and the log-sum-exp in float32, if asked.

    q_pos and k_pos are positions, by default 0..T-1 and 0..S-1; a key at position -1 is an empty slot. Segments confine
    attention to equal numbers; k_valid hides keys; sinks are extra logits without a value; dropout is (rate, key). A
    query that sees no key returns zeros. impl names an implementation, which then runs or raises NotImplementedError;
    None takes the first that can.
    """
    _check_shapes(q, k, v)
    named = {
        "q_pos": q_pos,
        "k_pos": k_pos,
        "q_segments": q_segments,
        "k_segments": k_segments,
        "k_valid": k_valid,
        "bias": bias,
        "softcap": softcap,
        "sinks": sinks,
        "dropout": dropout,
    }
    given = {name: value for name, value in named.items() if value is not None}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = _choose(impl, q, v, mask, frozenset(given), return_lse)
    return IMPLS[chosen](q, k, v, mask, scale=scale, return_lse=return_lse, **given)


def reference(
    q, k, v, mask, *, scale, q_pos=None, k_pos=None, q_segments=None, k_segments=None, k_valid=None, bias=None,
    softcap=None, sinks=None, dropout=None, return_lse=False,
):  # fmt: skip
    """Every feature, logits materialised: what all other implementations are compared with."""
    (b, t, n, h), (s, kh) = q.shape, k.shape[1:3]
    precise = precision(q.dtype)
    logits = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q.reshape(b, t, kh, n // kh, h), k, precision=precise, preferred_element_type=jnp.float32
    )
    logits = logits.reshape(b, n, t, s) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    seen = _visible(mask, t, s, q_pos, k_pos, q_segments, k_segments, k_valid)[:, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    sink = jnp.full((n, 1, 1), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)[:, None, None]
    # A finite maximum keeps a row without any visible key at exp(-inf) = 0 instead of NaN.
    top = jnp.maximum(jnp.maximum(logits.max(-1, keepdims=True), sink), jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(top)
    p = jnp.exp(logits - top)
    total = p.sum(-1, keepdims=True) + jnp.exp(sink - top)
    p = p / jnp.where(total == 0, 1, total)
    if dropout is not None:
        rate, key = dropout
        p = jnp.where(jax.random.bernoulli(key, 1 - rate, p.shape), p / (1 - rate), 0)
    p = p.astype(v.dtype).reshape(b, kh, n // kh, t, s)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", p, v, precision=precise, preferred_element_type=jnp.float32)
    out = out.reshape(b, t, n, v.shape[-1]).astype(q.dtype)
    return (out, (jnp.log(total) + top)[..., 0].swapaxes(1, 2)) if return_lse else out


def cudnn(q, k, v, mask, *, scale, return_lse=False, implementation="cudnn"):
    """cuDNN's fused attention, for the masks it computes exactly."""
    as_window = _as_causal_window(mask)
    if as_window is None:
        raise NotImplementedError(f"cuDNN has no exact form of {mask}")
    causal, size = as_window
    call: Any = jax.nn.dot_product_attention  # its overloads want literal flags
    return call(
        q, k, v, scale=scale, is_causal=causal, local_window_size=size, implementation=implementation,
        return_residual=return_lse,
    )  # fmt: skip


def refuses_reference(q, v, mask, given, platform) -> str | None:
    """The reference refuses nothing."""
    return None


def refuses_cudnn(q, v, mask, given: frozenset[str], platform: str) -> str | None:
    """Why cuDNN cannot compute this exactly, or None."""
    if platform != "gpu":
        return f"needs an NVIDIA GPU, the default backend is {platform!r}"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"computes in float16 or bfloat16, got {q.dtype}"
    if given:
        return f"has no {', '.join(sorted(given))}"
    if _as_causal_window(mask) is None:
        return f"has no exact form of {mask}"
    h = q.shape[-1]
    if h % 8 or h > 128 or v.shape[-1] != h:
        return f"needs equal head dims, a multiple of 8 up to 128, got {h} and {v.shape[-1]}"
    return None


IMPLS = {"cudnn": cudnn, "reference": reference}
REFUSES = {"cudnn": refuses_cudnn, "reference": refuses_reference}


def precision(dtype) -> jax.lax.Precision | None:
    """float32 means float32: the default on TPU and recent GPUs would round the operands to bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _choose(impl, q, v, mask, given, return_lse) -> str:
    platform = jax.default_backend()
    if impl is not None:
        if impl not in IMPLS:
            raise ValueError(f"unknown attention implementation {impl!r}; there are {', '.join(IMPLS)}")
        if reason := REFUSES[impl](q, v, mask, given, platform):
            raise NotImplementedError(f"attention implementation {impl!r} {reason}")
        return impl
    reasons = {}
    for name, refuses in REFUSES.items():
        if (reason := refuses(q, v, mask, given, platform)) is None:
            _log_choice(name, tuple(reasons.items()))
            return name
        reasons[name] = reason
    raise NotImplementedError(f"no attention implementation can: {reasons}")


@functools.cache
def _log_choice(name: str, refused: tuple[tuple[str, str], ...]) -> None:
    """Logs once per choice and reason, so that falling to a slower implementation is never silent."""
    log.info("attention uses %s%s", name, "".join(f"; {other} {why}" for other, why in refused))


def _as_causal_window(mask: Mask) -> tuple[bool, tuple[int, int] | None] | None:
    match mask:
        case Full() | Band(lo=None, hi=None):
            return False, None
        case Band(lo=0, hi=None):
            return True, None
        case Band(lo=0, hi=int(hi)):
            return True, (hi, 0)
    return None


def _visible(mask, t, s, q_pos, k_pos, q_segments, k_segments, k_valid) -> Array:
    """[B or 1, T, S] bool: the mask over positions, minus other segments, hidden keys and empty slots."""
    q = jnp.arange(t)[None] if q_pos is None else q_pos
    k = jnp.arange(s)[None] if k_pos is None else k_pos
    seen = mask(q[:, :, None], k[:, None, :]) & (k >= 0)[:, None, :]
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments and k_segments must be given together")
    if q_segments is not None:
        seen = seen & (q_segments[:, :, None] == k_segments[:, None, :])
    if k_valid is not None:
        seen = seen & k_valid[:, None, :]
    return seen


def _check_shapes(q, k, v) -> None:
    ranks = {q.ndim, k.ndim, v.ndim} == {4}
    if not ranks or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention needs q BTNH, k BSKH, v BSKH; got {q.shape=} {k.shape=} {v.shape=}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key-value heads; got {q.shape=} {k.shape=}")
