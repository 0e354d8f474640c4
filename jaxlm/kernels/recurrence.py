"""Linear recurrences over a matrix state: one entry for the generalised delta rule with diagonal decay.

    S_t = diag(exp(log_w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          S [K, V] for each head
    out_t = r_t^T S_t                                       without a bonus: RWKV-7, GLA, Mamba-2, RetNet, delta rules
    out_t = r_t^T (S_{t-1} + diag(bonus) k_t v_t^T)         with one: RWKV-5 and RWKV-6

Its special cases differ in what the caller passes (tests/kernels/test_recurrence_cases.py has each against its own
textbook form): GLA and RWKV-6 have no a and b; Mamba-2 and RetNet also one decay for all of a head; DeltaNet has
a = k, b = -beta k, values beta v and log_w = 0, which gated DeltaNet decays by a scalar and KDA by a vector, with
a = exp(log_w) k in place of k. RWKV-4's recurrence of scalars is in wkv4.py.

Axes: B batch, T tokens, H heads, K keys (what the state is read by), V values.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from jaxlm.kernels import recurrence_tpu
from jaxlm.kernels.call import device, precision, vary_alike
from jaxlm.kernels.recurrence_xla import chunked

log = logging.getLogger(__name__)
IMPLS = ("auto", "serial", "xla", "tpu")


def recurrence(
    r: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_w: Float[Array, "B T H #K"],
    *,
    a: Float[Array, "B T H K"] | None = None,
    b: Float[Array, "B T H K"] | None = None,
    bonus: Float[Array, "H K"] | None = None,
    state: Float[Array, "B H K V"] | None = None,
    resets: Bool[Array, "B T"] | None = None,
    chunk: int | None = None,
    impl: str = "auto",
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The outputs, in v's dtype, and the state after the last token, in float32 as all of the arithmetic.

    log_w <= 0 is the logarithm of the decay, by channel or one for a head; -inf forgets. a and b come together. state
    is the one before the first token, by default zeros. Where resets is true the state is zeroed before that token is
    seen: the first of a packed segment. chunk is how many tokens are computed at once, by default what suits the
    implementation. impl names one of IMPLS; "auto" takes the best for this platform. Float64 inputs are computed in it.
    Shapes that do not fit and an implementation that is not there or cannot are a ValueError.
    """
    arrays: dict[str, Any] = {"r": r, "k": k, "v": v, "log_w": log_w, "a": a, "b": b, "bonus": bonus}
    arrays |= {"state": state, "resets": resets}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    _check(arrays, chunk)
    if impl not in IMPLS:
        raise ValueError(f"unknown {impl=} of the recurrence; there are {', '.join(IMPLS)}")
    if state is None:
        arrays["state"] = jnp.zeros((r.shape[0], *r.shape[2:], v.shape[3]), wide(v.dtype))
    chosen = _choose(arrays, chunk) if impl == "auto" else impl
    if chosen == "tpu":
        if reason := recurrence_tpu.refuses(arrays, chunk, device()[0]):
            raise ValueError(f"recurrence implementation 'tpu' {reason}")
        return recurrence_tpu.recurrence_tpu(arrays, chunk)
    arrays = vary_alike(arrays)
    return serial(arrays) if chosen == "serial" else chunked(arrays, chunk)


def _choose(arrays: dict[str, Any], chunk: int | None) -> str:
    """The implementation for this call: one token is a step, a TPU has its kernel, chunks are for the rest."""
    if arrays["r"].shape[1] == 1:
        return "serial"
    if (platform := device()[0]) != "tpu":
        return "xla"
    reason = recurrence_tpu.refuses(arrays, chunk, platform)
    if reason is not None:
        _log_once(f"the recurrence uses xla; tpu {reason}")
    return "xla" if reason else "tpu"


@functools.cache
def _log_once(what: str) -> None:
    log.info(what)


def serial(arrays: dict[str, Array]) -> tuple[Array, Array]:
    """Token by token: the definition. A single token needs no loop."""
    given = dict(arrays)
    dtype, out_dtype = wide(arrays["v"].dtype), arrays["v"].dtype
    state, bonus = given.pop("state").astype(dtype), given.pop("bonus", None)
    bonus = None if bonus is None else bonus.astype(dtype)
    take = functools.partial(step, bonus=bonus, exact=precision(arrays["v"].dtype))
    tokens = {name: x if x.dtype == bool else x.astype(dtype) for name, x in given.items()}
    if arrays["v"].shape[1] == 1:
        state, out = take(state, {name: x[:, 0] for name, x in tokens.items()})
        return out[:, None].astype(out_dtype), state
    state, out = jax.lax.scan(take, state, {name: x.swapaxes(0, 1) for name, x in tokens.items()})
    return out.swapaxes(0, 1).astype(out_dtype), state


def step(state: Array, token: dict[str, Array], *, bonus: Array | None, exact) -> tuple[Array, Array]:
    """The state [B, H, K, V] after one token and its output [B, H, V], from arrays without T."""
    read = functools.partial(jnp.einsum, "BHK,BHKV->BHV", precision=exact)
    r, k, v = (token[name] for name in "rkv")
    if "resets" in token:
        state = jnp.where(token["resets"][:, None, None, None], 0, state)
    new = jnp.exp(token["log_w"])[..., None] * state + k[..., None] * v[:, :, None]
    if "a" in token:
        new = new + token["b"][..., None] * read(token["a"], state)[:, :, None]
    if bonus is None:
        return new, read(r, new)
    return new, read(r, state) + (r * bonus * k).sum(-1, keepdims=True) * v


def wide(dtype) -> Any:
    """What is computed in: float32, or float64 where inputs are."""
    return jnp.promote_types(dtype, jnp.float32)


def _check(arrays: dict[str, Any], chunk: int | None) -> None:
    shape, values = arrays["r"].shape, arrays["v"].shape
    if len(shape) != 4 or len(values) != 4:
        raise ValueError(f"the recurrence needs r [B, T, H, K] and v [B, T, H, V], got {shape} and {values}")
    (batch, length, heads, keys), width = shape, values[3]
    if length == 0:
        raise ValueError("the recurrence needs at least one token")
    wanted = dict.fromkeys(("k", "a", "b"), shape) | {"v": (*shape[:3], width), "log_w": shape, "bonus": (heads, keys)}
    wanted |= {"state": (batch, heads, keys, width), "resets": (batch, length)}
    for name in wanted.keys() & arrays.keys():
        got = arrays[name].shape
        if got != wanted[name] and not (name == "log_w" and got == (*shape[:3], 1)):
            raise ValueError(f"{name} of the recurrence must have shape {wanted[name]}, got {got}")
    if ("a" in arrays) != ("b" in arrays):
        raise ValueError("a and b of the recurrence must be given together")
    if "a" in arrays and "bonus" in arrays:
        raise ValueError("the recurrence has either a and b or a bonus, not both")
    if chunk is not None and chunk < 1:
        raise ValueError(f"the recurrence needs a chunk of at least one token, got {chunk}")
