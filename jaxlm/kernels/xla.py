"""Attention in chunks, in plain XLA: memory linear in T, forward and backward, on every platform and for every call.

Queries and keys are cut into tiles. One loop visits pairs of tiles with an online softmax; another recomputes their
probabilities from the saved log-sum-exp and adds up the gradients. Where positions are the default, which pairs are
visited is known when tracing (plan.py). Where visibility depends on arrays (positions, segments, validity), it is found
out when running, before the loop, and pairs without a visible key are still not visited. Fully visible pairs run
without the predicate. A BlockTable's keys are gathered by row of blocks instead (tiles.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.call import Call, device, dropout_seed, vary_alike
from jaxlm.kernels.masks import EVERYTHING, FULL, PARTIAL, SKIP
from jaxlm.kernels.plan import tile_plan
from jaxlm.kernels.tiles import Gathered, Spec, Tiles

BLOCK = 512  # queries and keys of a tile, at most
# B * N * queries * keys of a tile, at most, unless its sides would be shorter than 128: on a CPU what stays in cache.
TILE_LOGITS = {"cpu": 2**21}
TILE_LOGITS_ELSEWHERE = 2**24
# T * S from which it is the choice. On a CPU it wins from 128 x 128 on, measured with scripts/bench_attention.py;
# elsewhere a step of a loop costs more beside its work. The logits of few queries are linear in S as they are.
LOGITS = {"cpu": 2**14}
LOGITS_ELSEWHERE = 2**20
FEW, LOGITS_OF_FEW = 64, 2**24


def xla(q, k, v, mask, *, scale, return_lse=False, block_q=None, block_k=None, **features):
    """Every feature, in tiles of block_q queries and block_k keys; by default sizes that keep a tile in cache."""
    (b, t, n, _), s = q.shape, k.shape[1]
    rate, key = features.pop("dropout", (0.0, None))
    if key is not None:
        features["seed"] = dropout_seed(key)
    softcap = features.pop("softcap", None)
    spec = functools.partial(Spec, scale=float(scale), softcap=softcap, rate=rate, queries=t)
    arrays = vary_alike({"q": q, "k": k, "v": v, **features})
    if isinstance(mask, BlockTable):
        out, lse = _table(spec, arrays, mask, block_k)
    else:
        block_q, block_k = block_q or _block(t, b * n), block_k or _block(s, b * n)
        out, lse = _attend(spec(mask=mask, block_q=block_q, block_k=block_k), *split_smooth(arrays))
    return (out, lse) if return_lse else out


def gradients_xla(q, k, v, mask, out, lse, d_out, d_lse, *, scale, softcap=None, **features):
    """As kernels.attention.gradients has it, of a Mask: probabilities follow from the log-sum-exp of all keys."""
    (b, t, n, _), s = q.shape, k.shape[1]
    block_q, block_k = _block(t, b * n), _block(s, b * n)
    spec = Spec(mask=mask, block_q=block_q, block_k=block_k, scale=float(scale), softcap=softcap, rate=0.0, queries=t)
    smooth, rest = split_smooth(vary_alike({"q": q, "k": k, "v": v, **features}))
    return _backward(spec, (smooth, rest, out, lse, None), (d_out, d_lse))[0]


def refuses_xla(call: Call) -> str | None:
    """Nothing."""
    return None


def declines_xla(call: Call) -> str | None:
    """Short sequences, which the reference computes as fast and in little memory."""
    (t, s), here = (call.q.shape[1], call.k.shape[1]), LOGITS.get(call.platform, LOGITS_ELSEWHERE)
    if t * s < here:
        return f"pays from {here} logits (T * S) on"
    if t <= FEW and t * s < LOGITS_OF_FEW:
        return f"pays for up to {FEW} queries from {LOGITS_OF_FEW} logits (T * S) on"
    return None


def _block(length: int, heads: int) -> int:
    """A block size of at most BLOCK that pads little."""
    most, logits = BLOCK, TILE_LOGITS.get(device()[0], TILE_LOGITS_ELSEWHERE)
    while most > 128 and heads * most * most > logits:
        most //= 2
    blocks = -(-length // most)
    return -(-length // (blocks * 16)) * 16


def split_smooth(arrays: dict) -> tuple[dict, dict]:
    """Those with a gradient, and the rest."""
    smooth = {"q", "k", "v", "bias", "alibi", "sinks"}
    return {a: x for a, x in arrays.items() if a in smooth}, {a: x for a, x in arrays.items() if a not in smooth}


def _table(spec: Callable[..., Spec], arrays: dict, table: BlockTable, block_k: int | None):
    """Rows of the table by gathering; its full rows, which list nothing, as dense attention of their queries."""
    t, block = arrays["q"].shape[1], table.block
    full = np.flatnonzero(table.full())
    spec = functools.partial(spec, mask=EVERYTHING)
    gathered = spec(block_q=block, block_k=block, skip_rows=tuple(map(int, full)))
    out, lse = _attend(gathered, *split_smooth(vary_alike(arrays | {"blocks": table.blocks})))
    if not full.size:
        return out, lse
    rows = (full[:, None] * block + np.arange(block)).ravel()
    position = {"q_pos": jnp.arange(t, dtype=jnp.int32)[None]} if "alibi" in arrays else {}
    of_rows = position | arrays | ({"q_index": jnp.asarray(rows)} if "seed" in arrays else {})
    for name in {"q", "q_pos", "q_segments"} & of_rows.keys():
        of_rows[name] = of_rows[name][:, rows]
    if "bias" in arrays and arrays["bias"].shape[2] > 1:
        of_rows["bias"] = arrays["bias"][:, :, rows]
    heads = arrays["q"].shape[0] * arrays["q"].shape[2]
    block_q = _block(len(rows), heads)
    block_k = block_k or _block(arrays["k"].shape[1], heads)
    dense, dense_lse = _attend(spec(block_q=block_q, block_k=block_k), *split_smooth(of_rows))
    return out.at[:, rows].set(dense), lse.at[:, rows].set(dense_lse)


def _results(spec: Spec, smooth: dict, rest: dict):
    """(out [B, T, N, Dv] in q's dtype, log-sum-exp [B, T, N] float32)."""
    return _forward(spec, smooth, rest)[0]


def _forward(spec: Spec, smooth: dict, rest: dict):
    tiles = _tiles(spec, smooth, rest)
    steps = _steps(tiles)

    def step(predicated, at, carry):
        i, j = tiles.pair(steps[0], at)
        return tiles.forward(carry, i, j, predicated)

    # Named, so that a remat policy may keep them: without them the backward pass does all of this again.
    out, lse = (checkpoint_name(x, "attention") for x in tiles.finish(_loops(step, tiles.start(), *steps[1:])))
    # Steps found when running are kept; those known when tracing are not, so that they stay known.
    return (out, lse), (smooth, rest, out, lse, steps if _hides(tiles) else None)


def _backward(spec: Spec, saved, cotangents):
    (smooth, rest, out, lse, steps), (d_out, d_lse) = saved, cotangents
    tiles = _tiles(spec, smooth, rest)
    steps = _steps(tiles) if steps is None else steps
    given = tiles.fold_cotangents(d_out, d_lse, out, lse)

    def step(predicated, at, carry):
        i, j = tiles.pair(steps[0], at)
        return tiles.backward(carry, given, i, j, predicated)

    grads = tiles.finish_gradients(_loops(step, tiles.start_gradients(), *steps[1:]), given)
    return {name: grads[name].astype(x.dtype) for name, x in smooth.items()}, None


_attend: Any = jax.custom_vjp(_results, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)


def _tiles(spec: Spec, smooth: dict, rest: dict) -> Tiles:
    return (Gathered if "blocks" in rest else Tiles)(spec, smooth | rest)


def _loops(step, carry, full, partial):
    """The fully visible steps [0, full) without the predicate, then the steps [full, full + partial) with it."""
    for predicated, first, count in ((False, 0, full), (True, full, partial)):
        if not (isinstance(count, int) and count == 0):
            carry = jax.lax.fori_loop(first, first + count, functools.partial(step, predicated), carry)
    return carry


def _hides(tiles: Tiles) -> bool:
    """Whether arrays decide which pairs of tiles have a visible key."""
    arrays = {"q_pos", "k_pos", "q_segments", "k_valid"}
    return not isinstance(tiles, Gathered) and bool(arrays & tiles.given)


def _steps(tiles: Tiles) -> tuple[Array, Any, Any]:
    """(steps of the loop, how many lead that are fully visible, how many follow that are partly visible)."""
    spec = tiles.spec
    if isinstance(tiles, Gathered):
        rows = np.setdiff1d(np.arange(tiles.nq), spec.skip_rows)
        return jnp.asarray(rows, jnp.int32), 0, len(rows)
    if {"q_pos", "k_pos"} & tiles.given:
        pairs = np.argwhere(np.ones((tiles.nq, tiles.nk), bool)).astype(np.int32)
        kinds = np.full(len(pairs), PARTIAL)
    else:
        plan = tile_plan(spec.mask, tiles.t, tiles.s, spec.block_q, spec.block_k)
        row, column = np.nonzero(plan.kind != SKIP)
        if not row.size:  # nothing is visible; one step finds that out, as no loop can be over no steps
            row = column = np.zeros(1, np.int32)
        kinds = np.maximum(plan.kind[row, column], PARTIAL)
        pairs = np.stack([row, plan.index[row, column]], 1).astype(np.int32)
    if not _hides(tiles):
        order = np.argsort(-kinds, kind="stable")
        return jnp.asarray(pairs[order]), int((kinds == FULL).sum()), int((kinds == PARTIAL).sum())

    def kind(pair):
        seen = tiles.visible(pair[0], pair[1])
        return jnp.where(seen.all(), FULL, jnp.where(seen.any(), PARTIAL, SKIP))

    found = jax.lax.map(kind, jnp.asarray(pairs))
    order = jnp.argsort(-found, stable=True)
    return jnp.asarray(pairs)[order], (found == FULL).sum(), (found == PARTIAL).sum()
