"""RWKV-4's recurrence: an average of all values so far, weighted by exp(key) and an exponential decay, in each channel.

    out_t = (sum_{i<t} exp(k_i + (t - 1 - i) log_w) v_i + exp(bonus + k_t) v_t) / (the same of ones for v)

Numerator, denominator and the logarithm of the scale of both are carried, so that no exponential overflows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlm.kernels.call import vary_alike

EMPTY = -1e30  # the scale of a state that has seen nothing


def wkv4(
    k: Float[Array, "B T C"],
    v: Float[Array, "B T C"],
    log_w: Float[Array, " C"],
    bonus: Float[Array, " C"],
    *,
    state: Float[Array, "B 3 C"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B 3 C"]]:
    """The outputs, in v's dtype, and the state after the last token: numerator, denominator and scale, in float32.

    log_w <= 0 is the logarithm of the decay. state is the one before the first token, by default of nothing seen. Where
    resets is true the state is emptied before that token; where valid is false it stays as it is, decay and all. Shapes
    that do not fit are a ValueError.
    """
    batch, _, channels = _check(k, v, log_w, bonus, state, resets, valid)
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    arrays: dict[str, Any] = {name: x.astype(dtype) for name, x in (("k", k), ("v", v), ("w", log_w), ("u", bonus))}
    arrays["state"] = empty_state(batch, channels, dtype) if state is None else state.astype(dtype)
    arrays["resets"] = jnp.zeros(k.shape[:2], bool) if resets is None else resets
    arrays["valid"] = jnp.ones(k.shape[:2], bool) if valid is None else valid
    given = vary_alike(arrays)
    w, u = given["w"], given["u"]

    def step(state, token):
        k, v, reset, real = token
        aa, bb, pp = old = tuple(jnp.where(reset[:, None], x, y) for x, y in zip((0, 0, EMPTY), state, strict=True))
        top = jnp.maximum(pp, u + k)
        past, now = jnp.exp(pp - top), jnp.exp(u + k - top)
        out = (past * aa + now * v) / (past * bb + now)
        top = jnp.maximum(w + pp, k)
        past, now = jnp.exp(w + pp - top), jnp.exp(k - top)
        new = past * aa + now * v, past * bb + now, top
        return tuple(jnp.where(real[:, None], x, y) for x, y in zip(new, old, strict=True)), out

    tokens = tuple(given[name].swapaxes(0, 1) for name in ("k", "v", "resets", "valid"))
    last, out = jax.lax.scan(step, tuple(given["state"].swapaxes(0, 1)), tokens)
    return out.swapaxes(0, 1).astype(v.dtype), jnp.stack(last, 1)


def empty_state(batch: int, channels: int, dtype: Any = jnp.float32) -> Array:
    """[B, 3, C]: of nothing seen."""
    zeros = jnp.zeros((batch, channels), dtype)
    return jnp.stack([zeros, zeros, jnp.full_like(zeros, EMPTY)], 1)


def _check(k, v, log_w, bonus, state, resets, valid) -> tuple[int, int, int]:
    if k.ndim != 3 or 0 in k.shape:
        raise ValueError(f"wkv4 needs k [B, T, C] of at least one token, got {k.shape}")
    batch, length, channels = k.shape
    wanted = {"v": (v, k.shape), "log_w": (log_w, (channels,)), "bonus": (bonus, (channels,))}
    wanted |= {"state": (state, (batch, 3, channels)), "resets": (resets, (batch, length))}
    wanted["valid"] = valid, (batch, length)
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of wkv4 must have shape {shape}, got {x.shape}")
    return batch, length, channels
