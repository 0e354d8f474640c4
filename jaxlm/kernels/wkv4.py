"""RWKV-4's recurrence: an average of all values so far, weighted by exp(key) and an exponential decay, in each channel.

    out_t = (sum_{i<t} exp(k_i + (t - 1 - i) log_w) v_i + exp(bonus + k_t) v_t) / (the same of ones for v)

Numerator and denominator are carried with the logarithm of the scale of both, so that no exponential overflows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlm.kernels.call import device, vary_alike

# Tokens that are computed at once, by platform. A CPU is kept busy by one token of all channels, and joining runs in
# parallel takes three times the work: measured, 1024 tokens of 768 channels take 7 ms one by one and 21 ms at once.
CHUNK = {"cpu": 1}
CHUNK_ELSEWHERE = 1024
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
    chunk: int | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B 3 C"]]:
    """The outputs, in v's dtype, and the state after the last token: numerator, denominator and scale, in float32.

    log_w <= 0 is the logarithm of the decay. state is the one before the first token, by default of nothing seen. Where
    resets is true the state is emptied before that token; where valid is false it stays as it is, decay and all. chunk
    is how many tokens are computed at once, by default what suits the platform. Shapes that do not fit are a
    ValueError.
    """
    batch, length, channels = _check(k, v, log_w, bonus, state, resets, valid)
    dtype = jnp.promote_types(v.dtype, jnp.float32)
    arrays: dict[str, Any] = {name: x.astype(dtype) for name, x in (("k", k), ("v", v), ("w", log_w), ("u", bonus))}
    arrays["state"] = empty_state(batch, channels, dtype) if state is None else state.astype(dtype)
    arrays["resets"] = jnp.zeros(k.shape[:2], bool) if resets is None else resets
    arrays["valid"] = jnp.ones(k.shape[:2], bool) if valid is None else valid
    given = vary_alike(arrays)
    take = functools.partial(_chunk, w=given["w"], u=given["u"])
    tokens = {name: given[name] for name in ("k", "v", "resets", "valid")}
    size = min(chunk or CHUNK.get(device()[0], CHUNK_ELSEWHERE), length)
    whole = length // size * size
    cut = lambda x: x[:, :whole].reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)
    # Backward, each chunk is computed again from the state before it.
    step = jax.checkpoint(take, prevent_cse=False)
    last, out = jax.lax.scan(step, given["state"], {name: cut(x) for name, x in tokens.items()})
    out = out.swapaxes(0, 1).reshape(batch, whole, channels)
    if whole < length:
        last, rest = take(last, {name: x[:, whole:] for name, x in tokens.items()})
        out = jnp.concatenate([out, rest], 1)
    return out.astype(v.dtype), last


def _chunk(state: Array, tokens: dict[str, Array], w: Array, u: Array) -> tuple[Array, Array]:
    """The state after some tokens [B, T, C] and their outputs.

    A run of tokens is (logarithm of its decay, numerator, denominator, scale); joining runs is associative, and the run
    of what came before is first.
    """
    k, v, resets, valid = tokens["k"], tokens["v"], tokens["resets"][..., None], tokens["valid"][..., None]
    decay = jnp.where(resets, -jnp.inf, jnp.where(valid, w, 0))
    own = decay, jnp.where(valid, v, 0), jnp.where(valid, jnp.ones_like(k), 0), jnp.where(valid, k, EMPTY)
    runs = zip((jnp.zeros_like(w) + 0 * state[:, 0], *state.swapaxes(0, 1)), own, strict=True)
    _, *runs = jax.lax.associative_scan(_join, [jnp.concatenate([x[:, None], y], 1) for x, y in runs], axis=1)
    aa, bb, pp = (x[:, :-1] for x in runs)
    pp = jnp.where(resets, EMPTY, pp)
    top = jnp.maximum(pp, u + k)
    past, now = jnp.exp(pp - top), jnp.exp(u + k - top)
    return jnp.stack([x[:, -1] for x in runs], 1), (past * aa + now * v) / (past * bb + now)


def _join(early, late):
    """Of two runs the one of both: decays add up, and the early one's sums fade by the late one's."""
    decay, (x, y, scale), (aa, bb, pp) = late[0], early[1:], late[1:]
    top = jnp.maximum(scale + decay, pp)
    past, now = jnp.exp(scale + decay - top), jnp.exp(pp - top)
    return early[0] + decay, past * x + now * aa, past * y + now * bb, top


def empty_state(batch: int, channels: int, dtype: Any = jnp.float32) -> Array:
    """[B, 3, C]: of nothing seen."""
    zeros = jnp.zeros((batch, channels), dtype)
    return jnp.stack([zeros, zeros, jnp.full_like(zeros, EMPTY)], 1)


def _check(k, v, log_w, bonus, state, resets, valid) -> tuple[int, int, int]:
    if k.ndim != 3 or 0 in k.shape:
        raise ValueError(f"wkv4 needs k [B, T, C] of at least one token, got {k.shape}")
    batch, length, channels = k.shape
    wanted = {"v": (v, k.shape), "log_w": (log_w, (channels,)), "bonus": (bonus, (channels,))}
    wanted |= {"state": (state, (batch, 3, channels))}
    wanted |= {"resets": (resets, (batch, length)), "valid": (valid, (batch, length))}
    for name, (x, shape) in wanted.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of wkv4 must have shape {shape}, got {x.shape}")
    return batch, length, channels
