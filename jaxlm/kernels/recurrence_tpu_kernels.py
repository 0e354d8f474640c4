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

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from jaxlm.kernels.call import precision
from jaxlm.kernels.tpu import NN, NT, TN


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a step of the grid computes: tokens, heads side by side, and the widths of a head."""

    tokens: int
    heads: int
    keys: int
    values: int

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
    *levels, until, after = (jnp.exp(d) for d in summed(dtype == jnp.float32, c, sums, x["log_w"]))
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
    if segments is not None:
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
        solved = inverse(jnp.where(own_head, stack([by_row[1][1]] * heads), 0), c)
        u = dot(NN, solved, tall(seen, of_values))
        out = out + dot(NN, by_row[0][1], u)
        wrote.append(sum(jnp.split(u, heads, 0)))
    added = dot(TN, stack(wrote), stack(kept))
    return state * total + jnp.where(of_head(tile, added.shape), added, 0), out


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
    """Of the operands rounded to the dtype, in float32."""
    return jax.lax.dot_general(
        x.astype(dtype), y.astype(dtype), axes, precision=precision(dtype), preferred_element_type=jnp.float32
    )


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
    parts = []
    for _ in range(3 if exact else 2):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=axes, preferred_element_type=jnp.float32)
    return sum(dot(sums, part, precision=jax.lax.Precision.DEFAULT) for part in parts)


def _summed_forward(exact, tokens, sums, x):
    return summed(exact, tokens, sums, x), sums


def _summed_backward(exact, tokens, sums, g):
    return None, _exactly(exact, TN, sums, jnp.concatenate(g, 0))


summed.defvjp(_summed_forward, _summed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def inverse(x: Array, size: int) -> Array:
    """(I - x)^-1 of x block-diagonal in blocks of `size`, strictly lower triangular, as recurrence_xla.inverse."""
    i, j = iota(x.shape, 0), iota(x.shape, 1)
    found = jnp.where(i == j, 1.0, 0.0)
    for level in range(size.bit_length() - 1):
        across = jnp.where(((i ^ j) >> level == 1) & (i > j), x, 0)
        more = across if level == 0 else product(jnp.float32, NN, product(jnp.float32, NN, found, across), found)
        found = found + more
    return found


def _inverse_forward(x, size):
    found = inverse(x, size)
    return found, found


def _inverse_backward(size, found, g):
    # What is not below the diagonal of a block is masked where x is made.
    return (product(jnp.float32, TN, found, product(jnp.float32, NT, g, found)),)


inverse.defvjp(_inverse_forward, _inverse_backward)


# The kernels


def fold(tile: Tile, state: Array) -> Array:
    """The blocks [V, K] of each head of [heads V, heads K], to [V, heads K]."""
    return sum(jnp.split(jnp.where(of_head(tile, state.shape), state, 0), tile.heads, 0))


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
        state[...] = unfold(tile, ref["state"][...])

    before = state[...]
    if keep:
        kept[0][...] = fold(tile, before)
    after, values = chunk(tile, *_operands(ref), before, _tokens(ref))
    out[...] = values.astype(out.dtype)
    state[...] = after

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last[...] = fold(tile, after)


def backward_kernel(*refs, tile: Tile, names: tuple[str, ...], smooth: tuple[str, ...]):
    """Gradients of the arrays of `smooth`, of tokens or for a head, and of the first state; chunks come in reverse."""
    count = len(names)
    ref = dict(zip(names, refs[:count], strict=True))
    *grads, first, d_state = refs[count:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        d_state[...] = unfold(tile, ref["d_last"][...])

    run = functools.partial(chunk, tile, *_operands(ref))
    _, pull = jax.vjp(run, unfold(tile, ref["kept"][...]), _tokens(ref))
    d_before, d_tokens = pull((d_state[...], ref["d_out"][...].astype(jnp.float32)))
    d_state[...] = d_before
    for name, grad in zip(smooth, grads, strict=True):
        if name == "bonus":
            earlier = jnp.where(pl.program_id(2) == 0, jnp.zeros_like(grad[...]), grad[...])
            grad[...] = earlier + d_tokens[name]
        else:
            grad[...] = d_tokens[name].astype(grad.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        first[...] = fold(tile, d_before)


def _operands(ref):
    return ref["v"].dtype, ref["sums"][...], ref["segments"][...] if "segments" in ref else None


def _tokens(ref) -> dict[str, Array]:
    names = {"r", "k", "v", "log_w", "a", "b", "bonus"} & ref.keys()
    return {name: ref[name][...] for name in sorted(names)}
