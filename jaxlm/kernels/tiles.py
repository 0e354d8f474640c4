"""The arithmetic of one tile of attention, for xla.py: its logits, its part of the softmax, its part of the gradients.

Tiles of queries are [B, K, G * Q, H], so that a key-value head meets all its query heads in one product, and tiles of
keys [B, K, S, H]; logits are [B, K, G, Q, S] in float32. Tiles are stacked on a leading axis.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.kernels.call import kept, precision, varying_zero, visible
from jaxlm.kernels.masks import Mask

LEAST = float(np.finfo(np.float32).min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What is static of a call."""

    mask: Mask
    scale: float
    softcap: float | None
    rate: float
    queries: int  # T of the whole call, by which dropout counts its rows
    block_q: int
    block_k: int
    skip_rows: tuple[int, ...] = ()  # rows of a block table that are computed elsewhere


class Tiles:
    """A call's arrays, cut into tiles, and the steps of the loops over pairs (i, j) of tiles."""

    def __init__(self, spec: Spec, x: dict[str, Array]):
        (b, t, n, h), (s, kh), bq, bk = x["q"].shape, x["k"].shape[1:3], spec.block_q, spec.block_k
        self.spec, self.given, self.dtype = spec, x.keys(), x["q"].dtype
        self.b, self.t, self.s, self.n, self.h, self.dv = b, t, s, n, h, x["v"].shape[3]
        self.nq, self.nk = -(-t // bq), -(-s // bk)
        self.kh = self._key_heads(x, kh)
        self.group = n // self.kh
        self.product = functools.partial(
            jnp.einsum, precision=precision(self.dtype), preferred_element_type=jnp.float32
        )
        self.q, self.k, self.v = self._fold_q(x["q"]), self._fold_k(x["k"]), self._fold_k(x["v"])
        lines = {"q_pos": jnp.arange(t)[None], "q_index": jnp.arange(t), "k_pos": jnp.arange(s)[None]} | x
        lines["q_index"], lines["k_index"] = lines["q_index"][None], jnp.arange(s)[None]
        self.q_lines = {a: _fold_line(lines[a], bq) for a in ("q_pos", "q_segments", "q_index") if a in lines}
        self.k_lines = {
            a: _fold_line(lines[a], bk) for a in ("k_pos", "k_segments", "k_valid", "k_index") if a in lines
        }
        self.alibi, self.sinks = (self._by_head(x[a]) if a in x else None for a in ("alibi", "sinks"))
        self.bias: Any = _pad_bias(x["bias"], self.nq * bq, self.nk * bk) if "bias" in x else None
        self.seed: Any = x.get("seed")
        self.zero = varying_zero(x)

    def _key_heads(self, x: dict[str, Array], kh: int) -> int:
        return kh

    # Keys: the dense way, by the number of a tile.

    def pair(self, steps: Array, at):
        return steps[at, 0], steps[at, 1]

    def take(self, x: Array, j) -> Array:
        return x[j]

    def add(self, total: Array, j, part: Array) -> Array:
        return total.at[j].add(part)

    def key_line(self, name: str, j) -> Array:
        """A property of the tile's keys, [B or 1, K or 1, S]."""
        return self.k_lines[name][j]

    def take_bias(self, i, j) -> Array:
        """[B or 1, K or 1, G or 1, Q or 1, S or 1] of the bias."""
        at, shape = self._bias_at(i, j)
        return self._split_heads(jax.lax.dynamic_slice(self.bias, at, shape))

    def add_bias(self, total: Array, i, j, part: Array) -> Array:
        at, shape = self._bias_at(i, j)
        here = jax.lax.dynamic_slice(total, at, shape)
        return jax.lax.dynamic_update_slice(total, here + part.reshape(shape), at)

    def _bias_at(self, i, j):
        b1, n1, t1, s1 = self.bias.shape
        bq, bk = self.spec.block_q, self.spec.block_k
        at = (0, 0, i * bq if t1 > 1 else 0, j * bk if s1 > 1 else 0)
        return at, (b1, n1, min(t1, bq), min(s1, bk))

    # The tile.

    def visible(self, i, j) -> Array:
        """[B or 1, K or 1, Q, S] bool."""
        names = ("k_pos", "k_segments", "k_valid")
        keys = {name: self.key_line(name, j) for name in names if name in self.k_lines}
        queries = {name: self.q_lines[name][i] for name in ("q_pos", "q_segments") if name in self.q_lines}
        return visible(self.spec.mask, **queries, **keys)

    def _distance(self, i, j) -> Array:
        """k_pos - q_pos, for ALiBi, [B or 1, K or 1, 1, Q, S]."""
        return (self.key_line("k_pos", j)[:, :, None, None] - self.q_lines["q_pos"][i][:, :, None, :, None]).astype(
            jnp.float32
        )

    def _kept(self, i, j) -> Array:
        heads = jnp.arange(self.b * self.n).reshape(self.b, self.kh, self.group, 1, 1)
        rows = heads * self.spec.queries + self.q_lines["q_index"][i][:, :, None, :, None]
        return kept(self.seed, self.spec.rate, rows, self.key_line("k_index", j)[:, :, None, None])

    def logits(self, i, j, q, k, predicated: bool) -> tuple[Array, Array]:
        """[B, K, G, Q, S]: what the softmax takes, -inf where hidden; and before bias and hiding, for the softcap."""
        capped = self.product("BKMH,BKSH->BKMS", q, k)
        capped = capped.reshape(self.b, self.kh, self.group, self.spec.block_q, -1) * self.spec.scale
        if self.spec.softcap is not None:
            capped = self.spec.softcap * jnp.tanh(capped / self.spec.softcap)
        logits = capped
        if self.bias is not None:
            logits = logits + self.take_bias(i, j)
        if self.alibi is not None:
            logits = logits + self.alibi[..., None, None] * self._distance(i, j)
        if predicated:
            logits = jnp.where(self.visible(i, j)[:, :, None], logits, -jnp.inf)
        return logits, capped

    # Forward: unnormalised output, running maximum and running sum, for every tile of queries.

    def start(self) -> tuple[Array, Array, Array]:
        rows = (self.nq, self.b, self.kh, self.group, self.spec.block_q)
        acc = jnp.zeros((self.nq, self.b, self.kh, self.group * self.spec.block_q, self.dv), jnp.float32) + self.zero
        if self.sinks is None:
            return acc, jnp.full(rows, LEAST) + self.zero, jnp.zeros(rows) + self.zero
        # A sink is a logit that was seen first. Of one that is -inf nothing is left.
        top = jnp.maximum(self.sinks, LEAST)
        spread = lambda x: jnp.broadcast_to(x[..., None], rows)
        return acc, spread(top), spread(jnp.exp(self.sinks - top))

    def forward(self, carry, i, j, predicated: bool):
        acc, top, total = carry
        logits, _ = self.logits(i, j, self.q[i], self.take(self.k, j), predicated)
        new_top = jnp.maximum(top[i], logits.max(-1))
        # The maximum is finite from the start, so that hidden logits give exp(-inf) = 0 and never NaN.
        p, fade = jnp.exp(logits - new_top[..., None]), jnp.exp(top[i] - new_top)
        new_total = total[i] * fade + p.sum(-1)
        if self.seed is not None:
            p = jnp.where(self._kept(i, j), p / (1 - self.spec.rate), 0)
        part = self.product("BKMS,BKSD->BKMD", self._merge(p).astype(self.dtype), self.take(self.v, j))
        acc = acc.at[i].set(acc[i] * self._merge(fade[..., None]) + part)
        return acc, top.at[i].set(new_top), total.at[i].set(new_total)

    def finish(self, carry) -> tuple[Array, Array]:
        """Output in q's dtype and log-sum-exp; of a query that saw nothing 0 and -inf."""
        acc, top, total = carry
        seen = total > 0
        out = acc / jnp.where(seen, total, 1).reshape(*acc.shape[:-1], 1)
        lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)) + top, -jnp.inf)
        return self._unfold_q(out).astype(self.dtype), self._unfold_q(lse.reshape(*acc.shape[:-1], 1))[..., 0]

    # Backward.

    def fold_cotangents(self, d_out: Array, d_lse: Array, out: Array, lse: Array) -> dict[str, Array]:
        """By tile: d_out, sum(d_out * out) - d_lse, and the log-sum-exp, +inf where nothing is to be recomputed."""
        fall = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
        rows = lambda x: x.reshape(self.nq, self.b, self.kh, self.group, self.spec.block_q)
        lse = self._fold_q(jnp.where(lse == -jnp.inf, jnp.inf, lse)[..., None], jnp.inf)
        return {"d_out": self._fold_q(d_out), "fall": rows(self._fold_q(fall[..., None])), "lse": rows(lse)}

    def start_gradients(self) -> dict[str, Array]:
        totals = {name: getattr(self, name) for name in ("q", "k", "v", "bias", "alibi")}
        return {name: jnp.zeros(x.shape, jnp.float32) + self.zero for name, x in totals.items() if x is not None}

    def backward(self, grads: dict, given: dict, i, j, predicated: bool) -> dict:
        q, k, v, d_out = self.q[i], self.take(self.k, j), self.take(self.v, j), given["d_out"][i]
        logits, capped = self.logits(i, j, q, k, predicated)
        p = jnp.exp(logits - given["lse"][i][..., None])
        d_p = self.product("BKMD,BKSD->BKMS", d_out, v).reshape(p.shape)
        dropped = p
        if self.seed is not None:
            keep = self._kept(i, j)
            dropped, d_p = (jnp.where(keep, x / (1 - self.spec.rate), 0) for x in (p, d_p))
        d_logits = p * (d_p - given["fall"][i][..., None])
        grads = dict(grads)
        if self.bias is not None:
            like = self.take_bias(i, j).shape
            shared = [axis for axis in range(5) if like[axis] == 1]
            grads["bias"] = self.add_bias(grads["bias"], i, j, d_logits.sum(shared, keepdims=True))
        if self.alibi is not None:
            grads["alibi"] = grads["alibi"] + (d_logits * self._distance(i, j)).sum((0, 3, 4))
        if self.spec.softcap is not None:
            d_logits = d_logits * (1 - (capped / self.spec.softcap) ** 2)
        d_s, dropped = self._merge(d_logits).astype(self.dtype), self._merge(dropped).astype(self.dtype)
        grads["q"] = grads["q"].at[i].add(self.product("BKMS,BKSH->BKMH", d_s, k))
        grads["k"] = self.add(grads["k"], j, self.product("BKMS,BKMH->BKSH", d_s, q))
        grads["v"] = self.add(grads["v"], j, self.product("BKMS,BKMD->BKSD", dropped, d_out))
        return grads

    def finish_gradients(self, grads: dict, given: dict) -> dict[str, Array]:
        grads = dict(grads)
        grads["q"] = self._unfold_q(grads["q"] * self.spec.scale)
        grads["k"], grads["v"] = self._unfold_k(grads["k"] * self.spec.scale), self._unfold_k(grads["v"])
        if self.bias is not None:
            grads["bias"] = grads["bias"][:, :, : self.t, : self.s]
        if self.alibi is not None:
            grads["alibi"] = grads["alibi"].reshape(self.n)
        if self.sinks is not None:
            p = jnp.exp(self.sinks[..., None] - given["lse"])
            grads["sinks"] = -(p * given["fall"]).sum((0, 1, 4)).reshape(self.n)
        return grads

    # Shapes.

    def _merge(self, x: Array) -> Array:
        """[B, K, G, Q, ...] -> [B, K, G * Q, ...]."""
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])

    def _by_head(self, x: Array) -> Array:
        return x.astype(jnp.float32).reshape(self.kh, self.group)

    def _split_heads(self, bias: Array) -> Array:
        heads = (self.kh, self.group) if bias.shape[1] == self.n else (1, 1)
        return bias.reshape(bias.shape[0], *heads, *bias.shape[2:])

    def _fold_q(self, x: Array, fill: float = 0) -> Array:
        """[B, T, N, D] -> [tiles, B, K, G * Q, D]."""
        (b, t, _, d), bq = x.shape, self.spec.block_q
        x = jnp.pad(x, ((0, 0), (0, self.nq * bq - t), (0, 0), (0, 0)), constant_values=fill)
        x = x.reshape(b, self.nq, bq, self.kh, self.group, d).transpose(1, 0, 3, 4, 2, 5)
        return x.reshape(self.nq, b, self.kh, self.group * bq, d)

    def _unfold_q(self, x: Array) -> Array:
        bq, d = self.spec.block_q, x.shape[-1]
        x = x.reshape(self.nq, self.b, self.kh, self.group, bq, d).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(self.b, self.nq * bq, self.n, d)[:, : self.t]

    def _fold_k(self, x: Array) -> Array:
        """[B, S, K, D] -> [tiles, B, K, S, D]."""
        (b, s, kh, d), bk = x.shape, self.spec.block_k
        x = jnp.pad(x, ((0, 0), (0, self.nk * bk - s), (0, 0), (0, 0)))
        return x.reshape(b, self.nk, bk, kh, d).transpose(1, 0, 3, 2, 4)

    def _unfold_k(self, x: Array) -> Array:
        n, b, kh, bk, d = x.shape
        return x.transpose(1, 0, 3, 2, 4).reshape(b, n * bk, kh, d)[:, : self.s]


class Gathered(Tiles):
    """Keys named by a block table: one step for each row i of blocks, whose j are the blocks listed, [N or 1, slots].

    A block listed twice is gathered twice, so its multiplicity needs no arithmetic; an empty slot gathers a hidden one.
    If heads have lists of their own, each query head is its own key-value head.
    """

    def __init__(self, spec: Spec, x: dict[str, Array]):
        self.blocks = x["blocks"]
        self.kv_head = np.arange(x["q"].shape[2]) // (x["q"].shape[2] // x["k"].shape[2])
        super().__init__(spec, x)

    def _key_heads(self, x: dict[str, Array], kh: int) -> int:
        return kh if len(self.blocks) == 1 else x["q"].shape[2]

    def pair(self, steps: Array, at):
        return steps[at], self.blocks[:, steps[at]]

    def take(self, x: Array, j) -> Array:
        j = jnp.maximum(j, 0)
        if len(j) == 1:
            part = x[j[0]].transpose(1, 2, 0, 3, 4)  # [B, K, slots, S, D]
        else:
            part = x[j, :, self.kv_head[:, None]].transpose(2, 0, 1, 3, 4)
        return part.reshape(*part.shape[:2], -1, part.shape[-1])

    def add(self, total: Array, j, part: Array) -> Array:
        part = part.reshape(*part.shape[:2], j.shape[1], -1, part.shape[-1])
        j = jnp.maximum(j, 0)  # an empty slot adds zeros
        if len(j) == 1:
            return total.at[j[0]].add(part.transpose(2, 0, 1, 3, 4))
        return total.at[j, :, self.kv_head[:, None]].add(part.transpose(1, 2, 0, 3, 4))

    def key_line(self, name: str, j) -> Array:
        part = self.k_lines[name][jnp.maximum(j, 0)][:, :, :, 0]  # [N or 1, slots, B or 1, S]
        if name == "k_pos":
            part = jnp.where(j[:, :, None, None] < 0, -1, part)
        return part.transpose(2, 0, 1, 3).reshape(part.shape[2], len(j), -1)

    def take_bias(self, i, j) -> Array:
        return self._split_heads(self._bias_rows(self.bias, i, j))

    def add_bias(self, total: Array, i, j, part: Array) -> Array:
        like, back = jax.vjp(lambda bias: self._bias_rows(bias, i, j), total)
        return total + back(part.reshape(like.shape))[0]

    def _bias_rows(self, bias: Array, i, j) -> Array:
        """[B or 1, N or 1, Q or 1, slots * S or 1]."""
        (b1, n1, t1, s1), bq, bk = bias.shape, self.spec.block_q, self.spec.block_k
        rows = jax.lax.dynamic_slice_in_dim(bias, i * bq, bq, 2) if t1 > 1 else bias
        if s1 == 1:
            return rows
        rows = rows.reshape(b1, n1, rows.shape[2], -1, bk)
        pick = lambda rows, j: jnp.take(rows, jnp.maximum(j, 0), axis=2)
        axes = (1 if n1 > 1 else None, 0 if len(j) > 1 else None)
        if axes == (None, None):
            part = pick(rows[:, 0], j[0])[:, None]
        else:
            one = lambda x, axis: x if axis is not None else x[:, 0] if x is rows else x[0]
            part = jax.vmap(pick, axes, 1)(one(rows, axes[0]), one(j, axes[1]))
        return part.reshape(*part.shape[:3], -1)


def _fold_line(x: Array, block: int) -> Array:
    """[B or 1, T] -> [tiles, B or 1, 1, block], padded with -1 (False), which is an empty slot or no position."""
    b, t = x.shape
    x = jnp.pad(x, ((0, 0), (0, -t % block)), constant_values=False if x.dtype == jnp.bool_ else -1)
    return x.reshape(b, -1, 1, block).transpose(1, 0, 2, 3)


def _pad_bias(bias: Array, t: int, s: int) -> Array:
    """With whole tiles along the axes that do not broadcast."""
    t, s = (0 if have == 1 else want - have for have, want in zip(bias.shape[2:], (t, s), strict=True))
    return jnp.pad(bias, ((0, 0), (0, 0), (0, t), (0, s)))
