"""Grouped-query self-attention with an explicit cache: the mixer of most decoders."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.kernels.attention import attention
from jaxlm.kernels.masks import CAUSAL, window
from jaxlm.models.config import DecoderConfig, Kind
from jaxlm.models.layers import Einsum, Norm
from jaxlm.models.rope import rotate
from jaxlm.parallel.sharding import constrain

State = dict[str, Array]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What every layer knows of the tokens of this call; None where the default holds."""

    positions: Array | None = None  # [B, T] int32, -1 for padding
    segments: Array | None = None  # [B, T] int32
    valid: Array | None = None  # [B, T] bool
    tables: dict = dataclasses.field(default_factory=dict)  # Rope -> (cos, sin)
    shared: int | None = None  # with segments: how many of the first keys, virtual tokens, belong to all of them

    def tree_flatten(self):
        arrays = self.positions, self.segments, self.valid, tuple(self.tables.values())
        return arrays, (tuple(self.tables), self.shared)

    @classmethod
    def tree_unflatten(cls, static, arrays):
        (ropes, shared), (positions, segments, valid, tables) = static, arrays
        return cls(positions, segments, valid, dict(zip(ropes, tables, strict=True)), shared)


class SelfAttention(nn.Module):
    config: DecoderConfig
    kind: Kind
    impl: str | None

    @nn.compact
    def __call__(self, x: Array, tokens: Tokens, state: State | None, depth, rng) -> tuple[Array, State | None]:
        c, a = self.config, self.config.attention
        if "qkv" in self.variables.get("params", ()):  # joined for decoding (view.py)
            qkv = self._project("qkv", x, a.n_heads + 2 * a.n_kv_heads, "N", "heads")
            q, k, v = jnp.split(qkv, (a.n_heads, a.n_heads + a.n_kv_heads), axis=2)
        else:
            q = self._project("q", x, a.n_heads, "N", "heads")
            k = self._project("k", x, a.n_kv_heads, "K", "kv_heads")
            v = self._project("v", x, a.n_kv_heads, "K", "kv_heads")
        q = constrain(q, "batch", "length", "heads", None)
        k, v = (constrain(x, "batch", "length", "kv_heads", None) for x in (k, v))
        if a.qk_norm:
            size = lambda heads: (a.head_dim,) if a.qk_norm == "head" else (heads, a.head_dim)
            q = Norm(c.norm, size(a.n_heads), name="q_norm")(q)
            k = Norm(c.norm, size(a.n_kv_heads), name="k_norm")(k)
        if rope := self.kind.rope:
            cos, sin = tokens.tables[rope]
            q, k = rotate(q, cos, sin, rope.interleaved), rotate(k, cos, sin, rope.interleaved)
        scale = a.head_dim**-0.5 if a.scale is None else a.scale
        if a.divide_by_depth:
            q = q / (depth + 1).astype(q.dtype)
        keys, state = self._remember(k, v, tokens, state)
        if "prefix" in self.variables.get("adapters", ()):
            keys |= self._prefixed(keys, tokens.segments)
        y: Any = attention(
            q,
            keys.pop("k"),
            keys.pop("v"),
            CAUSAL if self.kind.window is None else window(self.kind.window),
            **_apart(tokens, keys.pop("segments", tokens.segments)),
            scale=scale,
            softcap=a.softcap,
            dropout=(c.dropout.attention, rng) if rng is not None and c.dropout.attention else None,
            impl=self.impl,
            **keys,
        )
        shape, axes = (a.n_heads, a.head_dim, c.d_model), ("heads", "head_dim", "embed")
        return Einsum("BTNH,NHD->BTD", shape, axes, "D" if a.out_bias else None, c.init_std, name="o")(y), state

    def _project(self, name: str, x: Array, heads: int, letter: str, axis: str) -> Array:
        c, a = self.config, self.config.attention
        eqn = f"BTD,D{letter}H->BT{letter}H"
        bias = f"{letter}H" if a.qkv_bias else None
        shape, axes = (c.d_model, heads, a.head_dim), ("embed", axis, "head_dim")
        return Einsum(eqn, shape, axes, bias, c.init_std, name=name)(x)

    def _prefixed(self, keys: dict, segments: Array | None) -> dict:
        """The keys behind those of the prefix, which stand at positions 0..P-1 and were never rotated."""
        prefix = self.variables["adapters"]["prefix"]
        n = prefix["k"].shape[0]
        put = lambda first, x: jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape)).astype(x.dtype), x], 1)
        beside = {"k": put(prefix["k"], keys["k"]), "v": put(prefix["v"], keys["v"])}
        beside["k_pos"] = put(jnp.arange(n), keys["k_pos"])
        return beside if segments is None else beside | {"segments": put(jnp.zeros(n), segments)}

    def _remember(self, k: Array, v: Array, tokens: Tokens, state: State | None) -> tuple[dict, State | None]:
        """The keys that these queries look at, and the cache after them."""
        pos = tokens.positions
        if state is None and tokens.segments is not None and tokens.shared is None:
            # A segment stands in one piece, so its indices differ as its positions do; and masks over indices are
            # known when tracing, so that kernels leave out what nobody sees.
            return {"k": k, "v": v, "k_valid": tokens.valid}, None
        if state is None:
            return {"k": k, "v": v, "q_pos": pos, "k_pos": pos}, None
        assert pos is not None  # `trunk` asks for positions with a cache
        new = write(state, k, v, pos)
        slots = state["k"].shape[1]
        # A ring no longer holds what the first of several new queries must see, so they look at the old ring and
        # the new keys side by side. One query's window is in the ring, and a full-length cache holds everything.
        if k.shape[1] == 1 or self.kind.window is None or slots < self.kind.window:
            return {"k": new["k"], "v": new["v"], "q_pos": pos, "k_pos": new["pos"]}, new
        beside = lambda name, fresh: jnp.concatenate([state[name], fresh], axis=1)
        return {"k": beside("k", k), "v": beside("v", v), "q_pos": pos, "k_pos": beside("pos", pos)}, new


def _apart(tokens: Tokens, k_segments: Array | None) -> dict[str, Array | None]:
    """What keeps packed sequences apart. Virtual tokens belong to all of them, which numbers of segments cannot say: a
    bias does, at the cost of one float a pair."""
    if tokens.shared is None:
        return {"q_segments": tokens.segments, "k_segments": k_segments}
    assert tokens.segments is not None and k_segments is not None
    together = tokens.segments[:, :, None] == k_segments[:, None, :]
    seen = together | (jnp.arange(k_segments.shape[1]) < tokens.shared)
    return {"bias": jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min / 2)[:, None]}


def empty_state(config: DecoderConfig, kind: Kind, batch: int, length: int, dtype) -> State:
    """k, v [B, S, K, H] and the position each slot holds [B, S], -1 for none; S is the window if that is shorter."""
    slots = length if kind.window is None else min(kind.window, length)
    shape = (batch, slots, config.attention.n_kv_heads, config.attention.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "pos": jnp.full((batch, slots), -1, jnp.int32),
    }


def write(state: State, k: Array, v: Array, positions: Array) -> State:
    """Stores position p in slot p mod S; padding, and what later tokens of this call would overwrite, is dropped."""
    slots = state["k"].shape[1]
    last = positions.max(axis=1, keepdims=True)
    keep = (positions >= 0) & (positions > last - slots)
    slot = jnp.where(keep, positions % slots, slots)  # slot S is out of range, and so dropped
    rows = jnp.arange(k.shape[0])[:, None]
    put = lambda name, new: state[name].at[rows, slot].set(new.astype(state[name].dtype), mode="drop")
    return {"k": put("k", k), "v": put("v", v), "pos": put("pos", positions)}
