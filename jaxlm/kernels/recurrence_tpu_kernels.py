"""The kernels of the recurrence on TPU: one chunk of a few heads at a time, the state staying in VMEM between chunks.

The algebra of a chunk is recurrence_xla.py's, laid out for the matrix unit. Heads lie side by side in lanes, as many as
fill 128. What must not mix is stacked: rows of all heads meet columns that are copies of a tile, one for each head and
zero in the lanes of the others. States are transposed, [V, K], and block-diagonal over heads. The pairs of tokens of
which the later is in the second half of a block of 2, 4, ... tokens and the earlier in its first half are one masked
product of the whole chunk. All sums of log_w come from one product with a matrix of zeros and ones.

The backward kernel takes the gradient of the same function of a chunk, from the state before it, chunks in reverse.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from jaxlm.kernels.call import precision
from jaxlm.kernels.tpu import NN, NT, TN

FORGETS = -1e4  # as a log_w it leaves nothing, and unlike -inf can be multiplied by 0
THREE = "three products of bfloat16"


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a step of the grid computes: tokens, heads side by side, the widths of a head, and how many such groups of
    heads, which do not depend on each other: while one waits for the matrix unit, another uses it."""

    tokens: int
    heads: int
    keys: int
    values: int
    groups: int = 1

    def lanes(self, name: str, group: int) -> slice:
        """Where a group's heads are in the array of that name."""
        width = self.heads * (self.values if name == "v" else self.keys)
        return slice(group * width, (group + 1) * width)

    def levels(self) -> int:
        return self.tokens.bit_length() - 1


def summing(tokens: int) -> np.ndarray:
    """[(levels + 2) * C, C] of zeros and ones: what of log_w adds up to the exponents of a token.

    First those of each level: in the second half of a block from its middle up to the token, in the first half from
    after the token to the middle. Then from the chunk's start up to the token, and from after the token to its end.
    """
    i, s = np.arange(tokens)[:, None], np.arange(tokens)
    half, found = 1, []
    while half < tokens:
        middle = i // (2 * half) * 2 * half + half
        found.append(np.where(i >= middle, (s >= middle) & (s < i), (s > i) & (s < middle)))
        half *= 2
    return np.concatenate([*found, s < i, s > i]).astype(np.float32)


def chunk(tile: Tile, dtype, sums: Array, segments: Array | None, state: Array, x: dict[str, Array]):
    """The state [heads V, heads K] after a chunk and its outputs [C, heads V] in float32.

    x has r, k, log_w and perhaps a and b [C, heads K], v [C, heads V] and perhaps bonus [1, heads K]; segments
    [1, heads C] counts the resets of the chunk so far, once for each head. Products are of `dtype`.
    """
    c, heads, delta = tile.tokens, tile.heads, "a" in x
    x = {name: t.astype(jnp.float32) for name, t in x.items()}
    x["log_w"] = jnp.where(x["log_w"] > FORGETS, x["log_w"], FORGETS)
    decays: Any = summed(dtype == jnp.float32, c, sums, x["log_w"])
    *levels, until, after = map(jnp.exp, decays)
    total = jnp.exp(x["log_w"].sum(0, keepdims=True))
    own = x["r"] * x["bonus"] if "bonus" in x else x["r"]
    # A row sees the state before its token's decay; without a bonus, r sees what is after the token.
    rows = [x["r"] if "bonus" in x else x["r"] * jnp.exp(x["log_w"])] + ([x["a"]] if delta else [])
    columns = [x["k"], x["b"]] if delta else [x["k"]]
    of_keys, of_values = (head_lanes(tile, width) for width in (tile.keys, tile.values))
    stack = lambda parts: parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)
    tall = lambda y, lanes: jnp.where(lanes, stack([y] * heads), 0)
    dot = functools.partial(product, dtype)

    i, j, same = pair_indices(tile, len(rows), len(columns), segments)
    diagonal = dot(NT, own, stack([tall(y, of_keys) for y in columns]))
    pairs = stack([diagonal, jnp.zeros_like(diagonal)][: len(rows)])
    pairs = jnp.where((i == j), pairs, 0)
    for level, decay in enumerate(levels):
        found = dot(NT, stack([y * decay for y in rows]), stack([tall(y * decay, of_keys) for y in columns]))
        pairs = jnp.where(((i ^ j) >> level == 1) & (i > j), found, pairs)
    if segments is not None and same is not None:
        pairs = jnp.where(same, pairs, 0)
        at = jnp.where(i[:c, :c] == j[:c, :c], segments[:, :c], 0).sum(1, keepdims=True)  # [C, 1]
        last = segments[:, c - 1 : c]
        until, after = jnp.where(at == 0, until, 0), jnp.where(at == last, after, 0)
        total = jnp.where(last == 0, total, 0)

    read = jnp.split(dot(NT, stack([y * until for y in rows]), state), len(rows), 0)
    by_row = [jnp.split(y, len(columns), 1) for y in jnp.split(pairs, len(rows), 0)]  # [C, heads C] each
    v, out = tall(x["v"], of_values), read[0]
    out = out + dot(NN, by_row[0][0], v)
    wrote, kept = [x["v"]], [y * after for y in columns]
    if delta:
        seen = read[1] + dot(NN, by_row[1][0], v)
        own_head = head_lanes(tile, c)
        solved = inverse(dtype, c, jnp.where(own_head, stack([by_row[1][1]] * heads), 0))
        u = dot(NN, solved, tall(seen, of_values))
        out = out + dot(NN, by_row[0][1], u)
        wrote.append(added_up(jnp.split(u, heads, 0)))
    added = dot(TN, stack(wrote), stack(kept))
    return state * total + jnp.where(of_head(tile, added.shape), added, 0), out


def added_up(parts: list[Array]) -> Array:
    return functools.reduce(jnp.add, parts)


def iota(shape, axis) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def head_lanes(tile: Tile, width: int) -> Array:
    """bool [heads C, heads width]: the lanes of the head whose copy a row is in."""
    shape = tile.heads * tile.tokens, tile.heads * width
    return iota(shape, 0) // tile.tokens == iota(shape, 1) // width


def pair_indices(tile: Tile, rows: int, columns: int, segments):
    """Of pairs [rows C, columns heads C] the tokens of both, and whether nothing was reset between them."""
    shape = rows * tile.tokens, columns * tile.heads * tile.tokens
    i, j = iota(shape, 0) % tile.tokens, iota(shape, 1) % tile.tokens
    if segments is None:
        return i, j, None
    row = jnp.concatenate([segments] * columns, 1)
    column = jnp.where(i == j, row, 0)[:, : tile.tokens].sum(1, keepdims=True)
    return i, j, row == column


# Products, whose gradients are products of the same kind.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(dtype, axes, x: Array, y: Array) -> Array:
    """Of the operands rounded to the dtype, in float32; THREE is of each as two bfloat16s, without their low parts'."""
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=axes, preferred_element_type=jnp.float32)
    if not isinstance(dtype, str):
        return dot(x.astype(dtype), y.astype(dtype), precision=precision(dtype))
    (high, low), (more, less) = split(x, 2), split(y, 2)
    dot = functools.partial(dot, precision=jax.lax.Precision.DEFAULT)
    return dot(high, more) + (dot(high, less) + dot(low, more))


def split(x: Array, count: int) -> list[Array]:
    """bfloat16s that add up to x, to 8 bits each."""
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def _product_forward(dtype, axes, x, y):
    return product(dtype, axes, x, y), (x, y)


def _product_backward(dtype, axes, saved, g):
    x, y = saved
    dx = {NN: (NT, g, y), NT: (NN, g, y), TN: (NT, y, g)}[axes]
    dy = {NN: (TN, x, g), NT: (TN, g, x), TN: (NN, x, g)}[axes]
    return product(dtype, *dx), product(dtype, *dy)


product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(exact: bool, tokens: int, sums: Array, x: Array) -> list[Array]:
    """The parts [C, K] of sums @ x, of zeros and ones in bfloat16, each product exact: x is cut into bfloat16s."""
    return jnp.split(_exactly(exact, NN, sums, x), sums.shape[0] // tokens, 0)


def _exactly(exact, axes, sums, x):
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=axes, preferred_element_type=jnp.float32)
    return added_up([dot(sums, part, precision=jax.lax.Precision.DEFAULT) for part in split(x, 3 if exact else 2)])


def _summed_forward(exact, tokens, sums, x):
    return summed(exact, tokens, sums, x), sums


def _summed_backward(exact, tokens, sums, g):
    return None, _exactly(exact, TN, sums, jnp.concatenate(g, 0))


summed.defvjp(_summed_forward, _summed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def inverse(dtype, size: int, x: Array) -> Array:
    """(I - x)^-1 of x block-diagonal in blocks of `size`, strictly lower triangular, as recurrence_xla.inverse."""
    dot = functools.partial(product, _finer(dtype), NN)
    i, j = iota(x.shape, 0), iota(x.shape, 1)
    found = jnp.where(i == j, 1.0, 0.0)
    for level in range(size.bit_length() - 1):
        across = jnp.where(((i ^ j) >> level == 1) & (i > j), x, 0)
        found = found + (across if level == 0 else dot(dot(found, across), found))
    return found


def _finer(dtype):
    """What products of products are computed in, where those of inputs are of the dtype."""
    return jnp.float32 if dtype == jnp.float32 else THREE


def _inverse_forward(dtype, size, x):
    found = inverse(dtype, size, x)
    return found, found


def _inverse_backward(dtype, size, found, g):
    # What is not below the diagonal of a block is masked where x is made.
    return (product(_finer(dtype), TN, found, product(_finer(dtype), NT, g, found)),)


inverse.defvjp(_inverse_forward, _inverse_backward)


# The kernels


def fold(tile: Tile, state: Array) -> Array:
    """The blocks [V, K] of each head of [heads V, heads K], to [V, heads K]."""
    return added_up(jnp.split(jnp.where(of_head(tile, state.shape), state, 0), tile.heads, 0))


def unfold(tile: Tile, state: Array) -> Array:
    """[V, heads K] to the block-diagonal [heads V, heads K]."""
    state = jnp.concatenate([state] * tile.heads, 0)
    return jnp.where(of_head(tile, state.shape), state, 0)


def of_head(tile: Tile, shape) -> Array:
    """Where values [heads V] and keys [heads K] are of the same head."""
    return iota(shape, 0) // tile.values == iota(shape, 1) // tile.keys


def forward_kernel(*refs, tile: Tile, names: tuple[str, ...], keep: bool):
    """Outputs and the last state; and, to keep, the state before each chunk."""
    count = len(names)
    ref = dict(zip(names, refs[:count], strict=True))
    out, last, *kept, state = refs[count:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for group in range(tile.groups):
            state[group] = unfold(tile, ref["state"][:, tile.lanes("state", group)])

    for group in range(tile.groups):
        before = state[group]
        if keep:
            kept[0][:, tile.lanes("state", group)] = fold(tile, before)
        after, values = chunk(tile, *_operands(ref), before, _tokens(tile, ref, group))
        out[:, tile.lanes("v", group)] = values.astype(out.dtype)
        state[group] = after

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for group in range(tile.groups):
            last[:, tile.lanes("state", group)] = fold(tile, state[group])


def backward_kernel(*refs, tile: Tile, names: tuple[str, ...], smooth: tuple[str, ...]):
    """Gradients of the arrays of `smooth`, of tokens or for a head, and of the first state; chunks come in reverse."""
    count = len(names)
    ref = dict(zip(names, refs[:count], strict=True))
    *grads, first, d_state = refs[count:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for group in range(tile.groups):
            d_state[group] = unfold(tile, ref["d_last"][:, tile.lanes("state", group)])

    run = functools.partial(chunk, tile, *_operands(ref))
    for group in range(tile.groups):
        before = unfold(tile, ref["kept"][:, tile.lanes("state", group)])
        pull = jax.vjp(run, before, _tokens(tile, ref, group))[1]
        d_out = ref["d_out"][:, tile.lanes("v", group)].astype(jnp.float32)
        d_before, d_tokens = pull((d_state[group], d_out))
        d_state[group] = d_before
        for name, grad in zip(smooth, grads, strict=True):
            at = tile.lanes(name, group)
            if name == "bonus":  # of all chunks
                earlier = jnp.where(pl.program_id(2) == 0, jnp.zeros_like(d_tokens[name]), grad[:, at])
                grad[:, at] = earlier + d_tokens[name]
            else:
                grad[:, at] = d_tokens[name].astype(grad.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        for group in range(tile.groups):
            first[:, tile.lanes("state", group)] = fold(tile, d_state[group])


def _operands(ref):
    return ref["v"].dtype, ref["sums"][...], ref["segments"][...] if "segments" in ref else None


def _tokens(tile: Tile, ref, group: int) -> dict[str, Array]:
    names = {"r", "k", "v", "log_w", "a", "b", "bonus"} & ref.keys()
    return {name: ref[name][:, tile.lanes(name, group)] for name in sorted(names)}
