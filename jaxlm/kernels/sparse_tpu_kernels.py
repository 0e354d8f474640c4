"""The kernels of attention over a BlockTable on TPU.

Keys and values of a head stay in VMEM, so that a listed block costs a load and no transfer, and the gradients of keys
and values are added where they belong. A tile of 128 queries visits the union of its rows' lists, `width` key blocks at
a time; the logarithm of how often each of its rows lists a block joins the logits, -inf where it does not. Tiles are
transposed, [keys, queries], as in the dense backward pass.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxlm.kernels.call import precision
from jaxlm.kernels.tpu import LOG2E, NN, NT, TN, round_up

LOWEST = float(np.finfo(np.float32).min) / 2  # a finite running maximum keeps rows that see nothing at 0
MOST_KEYS = 1024  # of one pass over a tile
TILES_A_STEP = 8


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernels are compiled for."""

    block: int
    scale: float
    softcap: float | None
    interpret: Any


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a table of query blocks x slots is visited.

    A tile has `group` query blocks; a pass over it takes `width` key blocks, of `entries` in its list; `together` tiles
    run interleaved, `step` tiles in a step of the grid, `tiles` in all.
    """

    group: int
    width: int
    entries: int
    together: int
    step: int
    tiles: int
    likely: int  # key blocks that a tile visits, if half of what a row lists is new to the tile

    @classmethod
    def of(cls, block: int, query_blocks: int, key_blocks: int, slots: int) -> "Tiling":
        group = max(1, 128 // block)
        likely = min(slots + (group - 1) * slots // 2, key_blocks)
        width = max(1, min(likely, MOST_KEYS // block))
        tiles = -(-query_blocks // group)
        together = 4 if tiles >= 4 else 2 if tiles >= 2 else 1  # a power of two
        step = round_up(-(-tiles // -(-tiles // TILES_A_STEP)), together)
        entries = round_up(min(group * slots, key_blocks), width)
        return cls(group, width, entries, together, step, round_up(tiles, step), round_up(likely, width))


def forward_kernel(*refs, names, static: Static, tiling: Tiling):
    """A step of tiles: out and their log-sum-exp."""
    x = dict(zip(names, refs, strict=True))
    dv, first = x["v"].shape[1], pl.program_id(3) * tiling.step

    def together(at, _):
        tiles = [_Tile(x, static, tiling, first, at * tiling.together + i) for i in range(tiling.together)]
        top = jnp.full((1, tiles[0].rows), LOWEST if "sinks" not in x else x["sinks"][0, 0], jnp.float32)
        total = jnp.full_like(top, 0 if "sinks" not in x else 1)
        states = [(top, total, jnp.zeros((dv, tile.rows), jnp.float32)) for tile in tiles]
        states = _passes(tiles, _forward_pass, states)
        for tile, (top, total, out) in zip(tiles, states, strict=True):
            total_or_1 = jnp.where(total == 0, 1, total)
            x["out"][tile.at, :] = (out / total_or_1).T.astype(x["out"].dtype)
            x["lse"][:, tile.at] = jnp.where(total == 0, -jnp.inf, (top + jnp.log2(total_or_1)) / LOG2E)

    jax.lax.fori_loop(0, tiling.step // tiling.together, together, None)


def _forward_pass(tiles: list["_Tile"], number, states):
    """Adds `width` key blocks to each running maximum, sum and output, the latter transposed [Dv, rows].

    Step by step over the tiles: while one waits for the matrix unit the others compute.
    """
    seen = [tile.logits(number) for tile in tiles]
    tops = [jnp.maximum(top, x[0].max(0, keepdims=True)) for x, (top, _, _) in zip(seen, states, strict=True)]
    weights = [jnp.exp2(x[0] - top) for x, top in zip(seen, tops, strict=True)]
    kept = [jnp.exp2(old - top) for (old, _, _), top in zip(states, tops, strict=True)]
    new = []
    for i, (tile, (_, total, out)) in enumerate(zip(tiles, states, strict=True)):
        v, p = seen[i][2][1], weights[i]
        out = out * kept[i] + tile.dot(v, p.astype(v.dtype), TN)
        new.append((tops[i], total * kept[i] + p.sum(0, keepdims=True), out))
    return new


def backward_kernel(*refs, names, static: Static, tiling: Tiling):
    """A step of tiles: their dq, and what they add to dk and dv."""
    x = dict(zip(names, refs, strict=True))
    first, pair = pl.program_id(3) * tiling.step, min(2, tiling.together)

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        x["dk"][...] = jnp.zeros_like(x["dk"])
        x["dv"][...] = jnp.zeros_like(x["dv"])

    def together(at, _):
        tiles = [_Tile(x, static, tiling, first, at * pair + i) for i in range(pair)]
        sums = _passes(tiles, _backward_pass, [jnp.zeros(tile.q.shape, jnp.float32) for tile in tiles])
        for tile, dq in zip(tiles, sums, strict=True):
            x["dq"][tile.at, :] = (dq * static.scale).astype(x["dq"].dtype)

    jax.lax.fori_loop(0, tiling.step // pair, together, None)


def _backward_pass(tiles: list["_Tile"], number, sums):
    """Adds the gradients of `width` key blocks: step by step over the tiles, as the forward pass."""
    seen, x = [tile.logits(number) for tile in tiles], tiles[0].x
    p = [jnp.exp2(s[0] - x["lse"][:, tile.at]) for tile, s in zip(tiles, seen, strict=True)]
    ds = [_logit_gradients(*each) for each in zip(tiles, seen, p, strict=True)]
    new = []
    for tile, (_, _, (k, _, slices)), dlogits, weights, dq in zip(tiles, seen, ds, p, sums, strict=True):
        do, block = x["do"][tile.at, :], tile.static.block
        dk, dv = tile.dot(dlogits, tile.q, NN), tile.dot(weights.astype(do.dtype), do, NN)
        for i, keys in enumerate(slices):
            x["dk"][keys, :] += dk[i * block : (i + 1) * block]
            x["dv"][keys, :] += dv[i * block : (i + 1) * block]
        new.append(dq + tile.dot(dlogits, k, TN))
    return new


def _logit_gradients(tile: "_Tile", seen, p):
    _, squashed, (k, v, _) = seen
    ds = p * (tile.dot(v, tile.x["do"][tile.at, :], NT) - tile.x["shift"][:, tile.at])
    return (ds if squashed is None else ds * (1 - squashed * squashed)).astype(k.dtype)


def _passes(tiles: list["_Tile"], one, states):
    """The passes over tiles that run interleaved: the first without a loop, since most lists need no other."""
    states, tiling = one(tiles, 0, states), tiles[0].tiling
    if tiling.entries == tiling.width:
        return states
    most = functools.reduce(jnp.maximum, [tile.passes for tile in tiles])
    return jax.lax.fori_loop(1, most, functools.partial(one, tiles), states)


class _Tile:
    """Some query blocks of one head, in a kernel."""

    def __init__(self, x, static: Static, tiling: Tiling, first, local):
        self.x, self.static, self.tiling = x, static, tiling
        self.rows = tiling.group * static.block
        self.at = pl.ds(pl.multiple_of(local * self.rows, self.rows), self.rows)
        self.q = x["q"][self.at, :]
        tile = first + local
        self.list_start, self.log_start = tile * (1 + tiling.entries), tile * tiling.entries * tiling.group
        self.passes = x["lists"][0, self.list_start]
        self.dot = functools.partial(
            jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision(self.q.dtype)
        )

    def logits(self, number):
        """Of one pass: logits in base 2 [keys, rows], softcap's tanh or None, and keys, values and where they lie."""
        static, width, block = self.static, self.tiling.width, self.static.block
        first = number * width
        columns = [self.x["lists"][0, self.list_start + 1 + first + i] for i in range(width)]
        slices = [pl.ds(pl.multiple_of(column * block, block), block) for column in columns]
        k, v = (jnp.concatenate([self.x[name][keys, :] for keys in slices], 0) for name in "kv")
        products, squashed = self.dot(k, self.q, NT), None
        if static.softcap is None:
            logits = products * (static.scale * LOG2E)
        else:
            squashed = jnp.tanh(products * (static.scale / static.softcap))
            logits = squashed * (static.softcap * LOG2E)
        parts = [logits[i * block : (i + 1) * block] + self._log_counts(first + i) for i in range(width)]
        if "k_segments" in self.x:
            segments = self.x["q_segments"][:, self.at]
            same = [segments == self.x["k_segments"][keys, :] for keys in slices]
            parts = [jnp.where(seen, part, -jnp.inf) for seen, part in zip(same, parts, strict=True)]
        return jnp.concatenate(parts, 0), squashed, (k, v, slices)

    def _log_counts(self, entry):
        """log2 of how often each query lists the block of this entry, [1, rows]."""
        group, block = self.tiling.group, self.static.block
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, self.rows), 1)
        counts = [self.x["logs"][0, self.log_start + entry * group + i] for i in range(group)]
        row = jnp.full((1, self.rows), counts[0], jnp.float32)
        for i in range(1, group):
            row = jnp.where(lane >= i * block, counts[i], row)
        return row
