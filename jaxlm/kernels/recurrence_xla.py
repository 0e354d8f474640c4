"""The recurrence in chunks, as matrix products, in plain XLA: all that a chunk adds to the state is found at once.

Within a chunk the inner vectors u_t = a_t^T S_{t-1} solve a triangular system, U = (I - A_ab)^-1 (A_ak V + a~ S_0), and
out = A_rk V + A_rb U + r~ S_0, S_C = w~ S_0 + k~^T V + b~^T U, where A_xy[t, i] = sum_K x_t y_i (decay from i to t).

No decay is divided by another. The pairs of a chunk are those within its halves and those from the first half to the
second, whose decay is that up to the middle times that from there on, both exponentials of sums of log_w <= 0: nothing
overflows and nothing cancels, whatever log_w is, and a reset is one of -inf. The inverse follows the same halves.

Backward, each chunk is computed again from the state before it: one state per chunk is kept, and none is reconstructed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.kernels.call import precision

CHUNK = 64
SMALL = 16  # pairs within blocks of so many tokens are masked products of whole blocks: smaller ones do not pay


def chunked(arrays: dict[str, Array], chunk: int | None = None) -> tuple[Array, Array]:
    """As recurrence.serial; ValueError for a chunk that is not a power of two."""
    given, v = dict(arrays), arrays["v"]
    dtype, (batch, length, heads) = jnp.promote_types(v.dtype, jnp.float32), v.shape[:3]
    size = chunk_size(length, chunk)
    count = -(-length // size)
    state = given.pop("state").astype(dtype)
    bonus = given.pop("bonus").astype(dtype)[:, None] if "bonus" in given else None  # [H, 1, K]
    if "resets" in given:
        given["resets"] = given["resets"][:, :, None, None]

    def cut(x):
        """[B, T, H, K] to [chunks, B, H, C, K]; zeros follow the last token, and change nothing."""
        x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
        return x.reshape(batch, count, size, *x.shape[2:]).transpose(1, 0, 3, 2, 4)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, tokens):
        return _chunk(state, tokens, bonus, precision(v.dtype))

    state, out = jax.lax.scan(step, state, {name: cut(x) for name, x in given.items()})
    return out.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, v.shape[3])[:, :length], state


def chunk_size(length: int, chunk: int | None) -> int:
    """Tokens of a chunk: a power of two, no more than needed."""
    if chunk is not None and chunk & (chunk - 1):
        raise ValueError(f"a chunk of the recurrence must be a power of two of tokens, got {chunk}")
    return min(chunk or CHUNK, 1 << (length - 1).bit_length())


def _chunk(state, tokens, bonus, exact):
    """The state [B, H, K, V] after a chunk and its outputs [B, H, C, V], from arrays [B, H, C, K]."""
    product = functools.partial(jnp.einsum, precision=exact)
    x = {name: t.astype(state.dtype) for name, t in tokens.items() if t.dtype != bool}
    v, log_w = x["v"], x["log_w"]
    forget = jnp.where(tokens["resets"], -jnp.inf, 0) if "resets" in tokens else 0
    sums = _Sums(jnp.broadcast_to(forget, log_w.shape).astype(state.dtype), log_w)
    # A row sees the state before its token's decay, but after a reset; without a bonus, r sees what is after the token.
    rows, columns = [x["r"] * jnp.exp(log_w) if bonus is None else x["r"]], [x["k"]]
    if "a" in x:
        rows, columns = [*rows, x["a"]], [*columns, x["b"]]
    own = x["r"] if bonus is None else x["r"] * bonus
    own = jnp.stack([(own * column).sum(-1) for column in columns], -1)  # a token's r with its k and b
    products = _products(rows, columns, own, sums, product)
    pairs = lambda row, column: products[:, :, 0, row, :, column]
    rows = [row * jnp.exp(sums.until) for row in rows]
    columns = [column * jnp.exp(sums.after) for column in columns]
    read = lambda i: product("BHTK,BHKV->BHTV", rows[i], state) + product("BHTS,BHSV->BHTV", pairs(i, 0), v)
    wrote = lambda i, y: product("BHTK,BHTV->BHKV", columns[i], y)
    out, new = read(0), jnp.exp(sums.total()).swapaxes(2, 3) * state + wrote(0, v)
    if "a" in x:
        u = product("BHTS,BHSV->BHTV", inverse(pairs(1, 1)), read(1))
        out, new = out + product("BHTS,BHSV->BHTV", pairs(0, 1), u), new + wrote(1, u)
    return new, out.astype(tokens["v"].dtype)


class _Sums:
    """Sums of log_w [..., C, K] within blocks of `half` tokens: from the block's start until each token, and from after
    each token until the block's end. A token starts with what forgets what is before it."""

    def __init__(self, forget: Array, log_w: Array):
        self.half, self.until, self.after, self.log_w = 1, forget, jnp.zeros_like(log_w), log_w

    def total(self) -> Array:
        """Of each block, [..., blocks, K]."""
        return (self.until + self.log_w)[..., self.half - 1 :: self.half, :]

    def double(self) -> None:
        """Joins blocks in pairs."""
        half, total = self.half, self.total()[..., None, :]
        self.until = _joined(_halves(self.until, half, 0), _halves(self.until, half, 1) + total[..., ::2, :, :])
        self.after = _joined(_halves(self.after, half, 0) + total[..., 1::2, :, :], _halves(self.after, half, 1))
        self.half = 2 * half


def _halves(x, half: int, which: int):
    """Of blocks of 2 * half tokens the first or the second halves: [..., C, K] to [..., blocks, half, K]."""
    return x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])[..., which, :, :]


def _joined(first, second):
    """[..., C, K] of both halves."""
    x = jnp.stack([first, second], -3)
    return x.reshape(*x.shape[:-4], -1, x.shape[-1])


def _products(rows, columns, own, sums: _Sums, product) -> Array:
    """Decayed, causal products of each kind of row with each kind of column [..., C, K]: [..., 1, rows, C, columns, C];
    leaves the sums as those of the whole chunk.

    own [..., C, columns] is what a row of the first kind has with its own token's columns; the other kind has nothing.
    """
    length, p, q = own.shape[-2], len(rows), len(columns)
    small = min(SMALL, length)
    cut = lambda x, size: x.reshape(*x.shape[:-2], -1, size, x.shape[-1])

    def dot(rows, columns):
        """[..., blocks, T, K] and [..., blocks, S, K] of each kind to [..., blocks, rows, T, columns, S]."""
        t, s = rows[0].shape[-2], columns[0].shape[-2]
        x = product("...TK,...SK->...TS", jnp.concatenate(rows, -2), jnp.concatenate(columns, -2))
        return x.reshape(*x.shape[:-2], p, t, q, s)

    late, early = jnp.arange(small)[:, None, None], jnp.arange(small)
    diagonal = jnp.where(late == early, cut(own, small)[..., None], 0)
    found: Any = jnp.stack([diagonal, jnp.zeros_like(diagonal)][:p], -4)
    while sums.half < length:
        half = sums.half
        decay = jnp.exp(_joined(_halves(sums.after, half, 0), _halves(sums.until, half, 1)))
        if half < small:
            across = ((late ^ early) // half == 1) & (late > early)  # from a second half to its first
            pairs = dot([cut(row * decay, small) for row in rows], [cut(column * decay, small) for column in columns])
            found = jnp.where(across, pairs, found)
        else:
            second = [_halves(row * decay, half, 1) for row in rows]
            below = dot(second, [_halves(column * decay, half, 0) for column in columns])
            above = jnp.concatenate([found[..., ::2, :, :, :, :], jnp.zeros_like(below)], -1)
            found = jnp.concatenate([above, jnp.concatenate([below, found[..., 1::2, :, :, :, :]], -1)], -3)
        sums.double()
    return found


@jax.custom_vjp
def inverse(x: Array) -> Array:
    """(I - x)^-1 of strictly lower triangular x [..., C, C], C a power of two, in float32 throughout.

    Halves have their own inverses, and between them is what couples them: stable where powers of x overflow.
    """
    size = x.shape[-1]
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if size > SMALL:
        half = size // 2
        both = inverse(jnp.stack([x[..., :half, :half], x[..., half:, half:]]))
        below = product(product(both[1], x[..., half:, :half]), both[0])
        above = jnp.concatenate([both[0], jnp.zeros_like(below)], -1)
        return jnp.concatenate([above, jnp.concatenate([below, both[1]], -1)], -2)
    at, half = jnp.arange(size), 1
    found = jnp.broadcast_to(jnp.eye(size, dtype=x.dtype), x.shape)
    while half < size:
        across = (at // (2 * half))[:, None] == at // (2 * half)
        across = jnp.where(across & ((at // half)[:, None] > at // half), x, 0)
        found = found + (across if half == 1 else product(product(found, across), found))
        half *= 2
    return found


def _inverse_forward(x):
    found = inverse(x)
    return found, found


def _inverse_backward(found, gradient):
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    whole = product("...TS,...TR,...QR->...SQ", found, gradient, found)
    return (jnp.tril(whole, -1),)


inverse.defvjp(_inverse_forward, _inverse_backward)
