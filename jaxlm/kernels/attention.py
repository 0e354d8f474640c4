"""The one entry to attention, its reference implementation, and the choice between implementations.

Axes: B batch, T queries, S keys, N query heads, K key-value heads, G = N // K, H head dim. q is BTNH, k and v are BSKH.
"""

import dataclasses
import functools
import importlib
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from jaxlm.kernels.block_table import BlockTable, multiplicity
from jaxlm.kernels.call import Call, call_of, dropout_seed, kept, precision, repeat_heads, visible
from jaxlm.kernels.masks import Mask
from jaxlm.parallel.sharding import sizes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """Where an implementation lives; its module is imported when a call first asks for it.

    The module has `<name>(q, k, v, mask, *, scale, return_lse, **features)`, `refuses_<name>(call)`: why it cannot, or
    None, and possibly `declines_<name>(call)`: why it could and yet is not the choice where none is named, or None; and
    `gradients_<name>`, which computes what `gradients` does without the results of these keys alone.
    """

    name: str
    module: str
    platform: str | None = None  # the only one it runs on, known without the import

    def run(self, *args, **features) -> Any:
        return self._get(self.name)(*args, **features)

    def refuses(self, call: Call) -> str | None:
        if self.platform not in (None, call.platform):
            return f"needs a {self.platform.upper()}, the platform is {call.platform!r}"
        return self._get(f"refuses_{self.name}")(call)

    def declines(self, call: Call) -> str | None:
        judge = self._get(f"declines_{self.name}", None)
        return None if judge is None else judge(call)

    def gradients(self) -> Any:
        return self._get(f"gradients_{self.name}", None)

    def _get(self, name: str, *default) -> Any:
        return getattr(importlib.import_module(self.module), name, *default)


# In order of preference. The first two spread a call over devices, and call `attention` for what is then on one.
IMPLS = {
    i.name: i
    for i in (
        Implementation("ring", "jaxlm.parallel.ring"),
        Implementation("all_to_all", "jaxlm.parallel.ring"),
        Implementation("sparse_tpu", "jaxlm.kernels.sparse_tpu", platform="tpu"),
        Implementation("decode_tpu", "jaxlm.kernels.decode_tpu", platform="tpu"),
        Implementation("flash_tpu", "jaxlm.kernels.flash_tpu", platform="tpu"),
        Implementation("cudnn", "jaxlm.kernels.cudnn"),
        Implementation("decode", "jaxlm.kernels.decode"),
        Implementation("xla", "jaxlm.kernels.xla"),
        Implementation("reference", "jaxlm.kernels.attention"),
    )
}


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    mask: Mask | BlockTable,
    *,
    q_pos: Int[Array, "#B T"] | None = None,
    k_pos: Int[Array, "#B S"] | None = None,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
    k_valid: Bool[Array, "#B S"] | None = None,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    alibi: Float[Array, " N"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    dropout: tuple[float, Key[Array, ""]] | None = None,
    impl: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N Dv"] | tuple[Float[Array, "B T N Dv"], Float[Array, "B T N"]]:
    """softmax(scale * q k^T) v under a mask, in q's dtype; and the log-sum-exp in float32, if asked.

    q_pos and k_pos are positions, by default 0..T-1 and 0..S-1; a key at position -1 is an empty slot. Segments confine
    attention to equal numbers; k_valid hides keys. bias is added to the logits, and alibi, slopes by head, as
    slope * (k_pos - q_pos), both after the softcap; sinks are extra logits without a value; dropout is (rate, key). A
    query that sees no key returns zeros. impl names an implementation, which then runs or raises NotImplementedError;
    None takes the first that can and does not decline. Over a mesh that cuts query heads further than there are
    key-value heads, those are repeated. Shapes that do not fit are a ValueError.
    """
    named = {
        "q_pos": q_pos,
        "k_pos": k_pos,
        "q_segments": q_segments,
        "k_segments": k_segments,
        "k_valid": k_valid,
        "bias": bias,
        "alibi": alibi,
        "softcap": softcap,
        "sinks": sinks,
        "dropout": dropout,
    }
    given = {name: value for name, value in named.items() if value is not None}
    _check_shapes(q, k, v)
    _check_features(q.shape, k.shape[1], given)
    if isinstance(mask, BlockTable):
        mask.validate(q.shape[1], k.shape[1], q.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = repeat_heads(q, k, v, sizes().get("tensor", 1))
    chosen = choose(call_of(q, k, v, mask, given, return_lse), impl)
    return chosen.run(q, k, v, mask, scale=scale, return_lse=return_lse, **given)


def gradients(q, k, v, mask, out, lse, d_out, d_lse, *, scale, **features) -> dict[str, Array]:
    """The gradients of q, k, v and sinks from these keys, where out, lse and their gradients are those of attention to
    these keys and others: what a ring needs. features as `attention` has them."""
    given = {name: x for name, x in features.items() if x is not None}
    chosen = choose(call_of(q, k, v, mask, given, return_lse=True))
    if (direct := chosen.gradients()) is not None:
        return direct(q, k, v, mask, out, lse, d_out, d_lse, scale=scale, **given)
    smooth = {"q": q, "k": k, "v": v} | ({"sinks": given.pop("sinks")} if "sinks" in given else {})
    part, pull = jax.vjp(lambda x: chosen.run(mask=mask, scale=scale, return_lse=True, **x, **given), smooth)
    # The result is the sum of the parts of some keys, each weighted by exp(its lse - lse).
    weight = jnp.exp(part[1] - jnp.where(lse == -jnp.inf, 0, lse))
    d_out = d_out.astype(jnp.float32)
    more = (d_out * (part[0].astype(jnp.float32) - out.astype(jnp.float32))).sum(-1)
    return pull(((weight[..., None] * d_out).astype(part[0].dtype), weight * (d_lse + more)))[0]


def reference(
    q, k, v, mask, *, scale, q_pos=None, k_pos=None, q_segments=None, k_segments=None, k_valid=None, bias=None,
    alibi=None, softcap=None, sinks=None, dropout=None, return_lse=False,
):  # fmt: skip
    """Every feature, logits materialised: what all other implementations are compared with."""
    (b, t, n, h), (s, kh) = q.shape, k.shape[1:3]
    product = functools.partial(jnp.einsum, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    logits = product("BTKGH,BSKH->BKGTS", q.reshape(b, t, kh, n // kh, h), k).reshape(b, n, t, s) * scale
    q_pos = jnp.arange(t)[None] if q_pos is None else q_pos
    k_pos = jnp.arange(s)[None] if k_pos is None else k_pos
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if alibi is not None:
        logits = logits + alibi[:, None, None] * (k_pos[:, None, :] - q_pos[:, :, None])[:, None]
    if isinstance(mask, BlockTable):
        logits = logits + jnp.log(multiplicity(mask, t, s))
    seen = visible(mask, q_pos, k_pos, q_segments, k_segments, k_valid)[:, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    sink = jnp.full((n, 1, 1), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)[:, None, None]
    # A finite maximum keeps a row without any visible key at exp(-inf) = 0 instead of NaN.
    top = jnp.maximum(jnp.maximum(logits.max(-1, keepdims=True), sink), jnp.finfo(jnp.float32).min)
    top = jax.lax.stop_gradient(top)
    p = jnp.exp(logits - top)
    total = p.sum(-1, keepdims=True) + jnp.exp(sink - top)
    p = p / jnp.where(total == 0, 1, total)
    if dropout is not None:
        rows = jnp.arange(b * n * t, dtype=jnp.uint32).reshape(b, n, t, 1)
        p = jnp.where(kept(dropout_seed(dropout[1]), dropout[0], rows, jnp.arange(s)), p / (1 - dropout[0]), 0)
    out = product("BKGTS,BSKH->BTKGH", p.astype(v.dtype).reshape(b, kh, n // kh, t, s), v)
    out = out.reshape(b, t, n, v.shape[-1]).astype(q.dtype)
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + top)
    return (out, lse[..., 0].swapaxes(1, 2)) if return_lse else out


def refuses_reference(call: Call) -> str | None:
    """The reference refuses nothing."""
    return None


def judge(call: Call) -> dict[str, str | None]:
    """For each implementation in order of preference, why it is not the one for this call, or None."""
    return {name: i.refuses(call) or i.declines(call) for name, i in IMPLS.items()}


def choose(call: Call, impl: str | None = None) -> Implementation:
    """The implementation named, or else the first without an objection; NotImplementedError if there is none."""
    if impl is None:
        reasons = []
        for i in IMPLS.values():
            if (reason := i.refuses(call) or i.declines(call)) is None:
                _log_choice(i.name, tuple(reasons))
                return i
            reasons.append((i.name, reason))
        raise NotImplementedError(f"no attention implementation can: {dict(reasons)}")
    if impl not in IMPLS:
        raise ValueError(f"unknown attention implementation {impl!r}; there are {', '.join(IMPLS)}")
    if reason := IMPLS[impl].refuses(call):
        raise NotImplementedError(f"attention implementation {impl!r} {reason}")
    return IMPLS[impl]


def _log_choice(name: str, refused: tuple[tuple[str, str], ...]) -> None:
    """Logs once per choice and reasons, but for their numbers, so that falling to a slower one is never silent."""
    key = (name, re.sub(r"\d+", "#", str(refused)))
    if key not in _logged:
        _logged.add(key)
        log.info("attention uses %s%s", name, "".join(f"; {other} {why}" for other, why in refused))


_logged: set[tuple[str, str]] = set()


def _check_shapes(q, k, v) -> None:
    ranks = {q.ndim, k.ndim, v.ndim} == {4}
    if not ranks or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention needs q BTNH, k BSKH, v BSKH; got {q.shape=} {k.shape=} {v.shape=}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key-value heads; got {q.shape=} {k.shape=}")


def _check_features(q_shape, s: int, given: dict[str, Any]) -> None:
    b, t, n, _ = q_shape
    if ("q_segments" in given) != ("k_segments" in given):
        raise ValueError("q_segments and k_segments must be given together")
    queries, keys = (b, t), (b, s)
    wanted = {"q_pos": queries, "q_segments": queries, "k_pos": keys, "k_segments": keys, "k_valid": keys}
    wanted |= {"bias": (b, n, t, s), "alibi": (n,), "sinks": (n,)}
    for name, shape in wanted.items():
        if name not in given:
            continue
        got, broadcast = given[name].shape, {"bias": 4, "alibi": 0, "sinks": 0}.get(name, 1)
        axes = [g == w or (g == 1 and i < broadcast) for i, (g, w) in enumerate(zip(got, shape, strict=False))]
        if len(got) != len(shape) or not all(axes):
            raise ValueError(f"{name} must have shape {shape}, or 1 where it broadcasts; got {got}")
    if "dropout" in given and not 0 <= given["dropout"][0] < 1:
        raise ValueError(f"the dropout rate must be in [0, 1); got {given['dropout'][0]}")
