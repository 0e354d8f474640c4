"""The two mixers of an RWKV layer: over time, a recurrence, in the form of each version; and over channels.

Both see each token blended with the one before it. Sources: the `rwkv` package 0.8.32 (Apache-2.0) for the arithmetic
of all versions; arXiv 2305.13048 (4), 2404.05892 (5, 6), 2503.14456 (7). Axes here: N heads, H channels of a head.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.kernels.recurrence import recurrence
from jaxlm.kernels.wkv4 import wkv4
from jaxlm.models import rwkv_init as starts
from jaxlm.models.layers import Einsum, Leaf, contract
from jaxlm.models.rwkv_config import RwkvConfig

FLOAT = jnp.float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What every layer knows of the rows of this call; None where every token is real, in one sequence."""

    valid: Array | None = None  # [B, T] bool
    starts: Array | None = None  # [B, T] bool: the first token of a packed sequence
    before: Array | None = None  # [B, T] int32: the last valid index before each, -1 for none; without `valid` t - 1
    final: Array | None = None  # [B] int32: the last valid index of each row, -1 for none

    def previous(self, x: Array, carried: Array) -> Array:
        """x [B, T, D] one token later; `carried` [B, D] precedes the first."""
        if self.before is None:
            shifted = jnp.concatenate([carried[:, None].astype(x.dtype), x[:, :-1]], 1)
        else:
            shifted = jnp.take_along_axis(x, jnp.maximum(self.before, 0)[..., None], 1)
            shifted = jnp.where(self.before[..., None] < 0, carried[:, None].astype(x.dtype), shifted)
        return shifted if self.starts is None else jnp.where(self.starts[..., None], 0, shifted)

    def last(self, x: Array, carried: Array) -> Array:
        """The last token of each row [B, D], which precedes what comes next."""
        if self.final is None:
            return x[:, -1]
        found = jnp.take_along_axis(x, jnp.maximum(self.final, 0)[:, None, None], 1)[:, 0]
        return jnp.where(self.final[:, None] < 0, carried.astype(x.dtype), found)

    def real(self, x: Array, instead: float = 0) -> Array:
        """x [B, T, ...] with `instead` at padding."""
        if self.valid is None:
            return x
        return jnp.where(self.valid.reshape(*self.valid.shape, *(1,) * (x.ndim - 2)), x, instead)


def rows_of(valid: Array | None, segments: Array | None) -> Rows:
    """valid [B, T] bool; segments [B, T] int >= 0, each in one piece: padding is one of its own, and needs no mask."""
    if segments is not None:
        segments = segments if valid is None else jnp.where(valid, segments, -1)
        begins = segments[:, 1:] != segments[:, :-1]
        return Rows(starts=jnp.pad(begins, ((0, 0), (1, 0)), constant_values=True))
    if valid is None:
        return Rows()
    upto = jax.lax.cummax(jnp.where(valid, jnp.arange(valid.shape[1], dtype=jnp.int32), -1), axis=1)
    before = None if valid.shape[1] == 1 else jnp.pad(upto[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return Rows(valid=valid, before=before, final=upto[:, -1])


class Mixer(Leaf):
    """What the mixers share. `depth` only matters to how parameters start; `scale`, a power of two or None, multiplies
    the result (rwkv.py: rescaling in float16)."""

    config: RwkvConfig
    mix_start = staticmethod(starts.time_mix)

    def blend(self, name: str, x: Array, before: Array, depth) -> Array:
        """Each channel between this token and the one before. The stored number is the share of this token up to
        version 5, of the one before from 6 on."""
        c = self.config
        mix = self.weight(f"mix_{name}", (c.d_model,), (None,), self.mix_start(c, depth, name)).astype(x.dtype)
        return x * mix + before * (1 - mix) if c.version < 6 else x + (before - x) * mix

    def project(self, name: str, x: Array, std: float) -> Array:
        """[B, T, D] -> [B, T, N, H]; [B, T, C] in version 4, which has no heads."""
        c = self.config
        if not c.head_dim:
            return Einsum("BTD,DC->BTC", (c.d_model, c.d_attn), ("embed", "mlp"), std=std, name=name)(x)
        shape = (c.d_model, c.heads, c.head_dim)
        return Einsum("BTD,DNH->BTNH", shape, ("embed", "heads", None), std=std, name=name)(x)

    def output(self, y: Array, scale: Array | None, dtype) -> Array:
        """[B, T, N, H] or [B, T, C] -> [B, T, D] in dtype."""
        c = self.config
        y = narrowed(y, scale, dtype)
        if not c.head_dim:
            return Einsum("BTC,CD->BTD", (c.d_attn, c.d_model), ("mlp", "embed"), std=0.0, name="output")(y)
        shape = (c.heads, c.head_dim, c.d_model)
        return Einsum("BTNH,NHD->BTD", shape, ("heads", None, "embed"), std=0.0, name="output")(y)

    def heads(self, name: str, init) -> Array:
        """A weight of every channel of every head, [N, H] float32."""
        c = self.config
        return self.weight(name, (c.heads, c.head_dim), ("heads", None), init).astype(FLOAT)

    def normed(self, y: Array, depth) -> Array:
        """Layer norm of each head, [B, T, N, H] float32."""
        scale, bias = self.heads("norm_scale", starts.norm(self.config, depth)), self.heads("norm_bias", starts.ZEROS)
        y = y.astype(FLOAT)
        y = y - y.mean(-1, keepdims=True)
        return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.config.group_eps) * scale + bias


class TimeMix4(Mixer):
    """Version 4: an average of all values so far, weighted by exp(key) and an exponential decay, in each channel."""

    @nn.compact
    def __call__(self, x: Array, shift: Array, wkv: Array | None, first, rows: Rows, depth, scale):
        """x [B, T, D], normed -> (what is added to the stream [B, T, D], state, values of the first layer)."""
        c, before = self.config, rows.previous(x, shift)
        xk, xv, xr = (self.blend(name, x, before, depth) for name in "kvr")
        r = jax.nn.sigmoid(self.project("receptance", xr, 0.0))
        k, v = self.project("key", xk, 0.0), self.project("value", xv, starts.std(c))
        decay = self.weight("decay", (c.d_attn,), ("mlp",), starts.decay(c, depth)).astype(FLOAT)
        bonus = self.weight("bonus", (c.d_attn,), ("mlp",), starts.bonus(c, depth)).astype(FLOAT)
        y, wkv = wkv4(k, v, -jnp.exp(decay), bonus, state=wkv, resets=rows.starts, valid=rows.valid)
        return self.output(r * y, scale, x.dtype), wkv, first


class TimeMix5(Mixer):
    """Version 5: a matrix of keys and values for each head, with a decay and a bonus that do not change."""

    @nn.compact
    def __call__(self, x: Array, shift: Array, wkv: Array | None, first, rows: Rows, depth, scale):
        """As TimeMix4."""
        c, before = self.config, rows.previous(x, shift)
        xs = {name: self.blend(name, x, before, depth) for name in ("kvr" if c.version == 5 else "kvrg")}
        shape, axes = ((c.heads, c.head_dim), ("heads", None)) if c.version > 5.1 else ((c.heads,), ("heads",))
        decay = self.weight("decay", shape, axes, starts.decay(c, depth)).astype(FLOAT)
        bonus = self.weight("bonus", shape, axes, starts.bonus(c, depth)).astype(FLOAT)
        bonus = jnp.exp(bonus) if c.log_bonus else bonus
        bonus = jnp.broadcast_to(bonus.reshape(c.heads, -1), (c.heads, c.head_dim))
        log_w = jnp.broadcast_to(-jnp.exp(decay.reshape(c.heads, -1)), (*x.shape[:2], c.heads, decay.size // c.heads))
        y, wkv = self.attend(xs, log_w, bonus, wkv, rows)
        y = self.normed(y, depth)
        if "g" in xs:
            y = y.astype(x.dtype) * jax.nn.silu(self.project("gate", xs["g"], 0.1 * starts.std(c)))
        return self.output(y, scale, x.dtype), wkv, first

    def attend(self, xs, log_w, bonus, wkv, rows: Rows):
        """The recurrence of keys, values and receptances made of what was blended."""
        std = starts.std(self.config)
        r, v = self.project("receptance", xs["r"], std), self.project("value", xs["v"], std)
        k = rows.real(self.project("key", xs["k"], 0.1 * std))
        return recurrence(r, k, v, rows.real(log_w), bonus=bonus, state=wkv, resets=rows.starts)


class TimeMix6(TimeMix5):
    """Version 6: how tokens blend, and the decay, follow from the token through products of low rank."""

    @nn.compact
    def __call__(self, x: Array, shift: Array, wkv: Array | None, first, rows: Rows, depth, scale):
        """As TimeMix4."""
        c, before = self.config, rows.previous(x, shift)
        names, ranks = "wkvrg", c.low_ranks
        into = self.weight("mix_in", (c.d_model, len(names), ranks.mix), ("embed", None, None), starts.ZEROS)
        back = self.weight("mix_out", (len(names), ranks.mix, c.d_model), (None, None, "embed"), starts.SMALL)
        inner = jnp.tanh(contract("BTD,DSE->BTSE", self.blend("x", x, before, depth), into))
        # One by one: XLA on CPU has no batched product of bfloat16 that sums in float32.
        moved = {name: contract("BTE,ED->BTD", inner[:, :, i], back[i]) for i, name in enumerate(names)}
        xs = {name: self.blend(name, x, before, depth) + (before - x) * moved[name] for name in names}

        decay = self.heads("decay", starts.decay(c, depth))
        into = self.weight("decay_in", (c.d_model, ranks.decay), ("embed", None), starts.ZEROS)
        shape = (ranks.decay, c.heads, c.head_dim)
        back = self.weight("decay_out", shape, (None, "heads", None), starts.SMALL)
        inner = jnp.tanh(contract("BTD,DE->BTE", xs["w"], into))
        log_w = -jnp.exp(decay + contract("BTE,ENH->BTNH", inner, back, out=FLOAT))

        y, wkv = self.attend(xs, log_w, self.heads("bonus", starts.bonus(c, depth)), wkv, rows)
        y = self.normed(y, depth).astype(x.dtype)
        y = y * jax.nn.silu(self.project("gate", xs["g"], 0.1 * starts.std(c)))
        return self.output(y, scale, x.dtype), wkv, first


class TimeMix7(Mixer):
    """Version 7: the state is corrected along a key before a value is written (the delta rule, generalised); later
    layers blend their values with those of the first."""

    is_first: bool

    @nn.compact
    def __call__(self, x: Array, shift: Array, wkv: Array | None, first, rows: Rows, depth, scale):
        """As TimeMix4; first [B, T, N, H]."""
        c, before, std = self.config, rows.previous(x, shift), starts.std(self.config)
        xr, xw, xk, xv, xa, xg = (self.blend(name, x, before, depth) for name in "rwkvag")
        r, k, v = self.project("r", xr, std), self.project("k", xk, 0.1 * std), self.project("v", xv, std)
        bias = lambda name: self.heads(f"{name}_bias", starts.bias(c, depth, name))
        log_w = -math.exp(-0.5) * jax.nn.sigmoid(bias("w") + self.low_rank("w", jnp.tanh, xw).astype(FLOAT))
        a = jax.nn.sigmoid(bias("a") + self.low_rank("a", None, xa).astype(FLOAT))
        g = self.low_rank("g", jax.nn.sigmoid, xg)
        if self.is_first:
            first = v
        else:
            share = jax.nn.sigmoid(bias("v") + self.low_rank("v", None, xv).astype(FLOAT))
            v = (v + (first - v) * share).astype(x.dtype)
        k32 = k.astype(FLOAT)
        removed = k32 * self.heads("k_k", starts.removal(c))
        # As torch's normalize, without its gradient's division by zero.
        removed = removed * jax.lax.rsqrt(jnp.maximum(jnp.square(removed).sum(-1, keepdims=True), 1e-24))
        k32 = rows.real(k32 * (1 + (a - 1) * self.heads("k_a", starts.constant(1.02))))
        y, wkv = recurrence(
            r, k32.astype(x.dtype), v, rows.real(log_w), a=(-removed).astype(x.dtype),
            b=rows.real(removed * a).astype(x.dtype), state=wkv, resets=rows.starts,
        )  # fmt: skip
        now = (r.astype(FLOAT) * k32 * self.heads("r_k", starts.constant(-0.04))).sum(-1, keepdims=True)
        y = self.normed(y, depth) + now * v.astype(FLOAT)
        return self.output(y.astype(x.dtype) * g, scale, x.dtype), wkv, first

    def low_rank(self, name: str, act, x: Array) -> Array:
        """[B, T, D] -> [B, T, N, H] through few channels."""
        c = self.config
        rank = {"w": c.low_ranks.decay, "a": c.low_ranks.a, "v": c.low_ranks.v, "g": c.low_ranks.gate}[name]
        inner = Einsum("BTD,DE->BTE", (c.d_model, rank), ("embed", None), std=0.0, name=f"{name}_in")(x)
        shape = (rank, c.heads, c.head_dim)
        std = 0.1 * c.d_model**-0.5
        outer = Einsum("BTE,ENH->BTNH", shape, (None, "heads", None), std=std, name=f"{name}_out")
        return outer(inner if act is None else act(inner))


class ChannelMix(Mixer):
    """A feed-forward of squared ReLUs; gated by a receptance before version 7."""

    mix_start = staticmethod(starts.channel_mix)

    @nn.compact
    def __call__(self, x: Array, shift: Array, rows: Rows, depth, scale):
        """x [B, T, D], normed -> what is added to the stream [B, T, D]."""
        c, before = self.config, rows.previous(x, shift)
        xk = self.blend("k", x, before, depth)
        key = Einsum("BTD,DF->BTF", (c.d_model, c.d_ff), ("embed", "mlp"), std=starts.std(c), name="key")
        k = jax.nn.relu(key(xk))
        k = jnp.square(k if scale is None else k.astype(FLOAT))
        value = Einsum("BTF,FD->BTD", (c.d_ff, c.d_model), ("mlp", "embed"), std=0.0, name="value")
        y = value(narrowed(k, scale, x.dtype))
        if c.version == 7:
            return y
        gate = Einsum("BTD,DE->BTE", (c.d_model, c.d_model), ("embed", None), std=0.0, name="receptance")
        return jax.nn.sigmoid(gate(self.blend("r", x, before, depth))) * y


def narrowed(y: Array, scale: Array | None, dtype: Any) -> Array:
    """y in dtype, multiplied by a power of two before it is narrowed."""
    return y.astype(dtype) if scale is None else (y.astype(FLOAT) * scale).astype(dtype)


TIME_MIX = {4: TimeMix4, 5.0: TimeMix5, 5.1: TimeMix5, 5.2: TimeMix5, 6: TimeMix6}
