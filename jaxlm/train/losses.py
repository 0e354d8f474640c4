"""Cross-entropy of a large vocabulary without its logits: computed a few positions at a time, forward and backward.

The loss is a sum, so its gradient is known as soon as a chunk's logits are: the forward pass of a differentiated call
makes the gradients of `hidden` and of the table while the logits are there, and the backward pass only scales them.
That saves the second product with the table that recomputing would cost; logits never exist at [B, T, V].
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.call import precision
from jaxlm.parallel.reduce import rows_over, sum_scatter
from jaxlm.parallel.sharding import sizes

IGNORE = -100  # a target that counts for nothing
_SLABS = 8  # parts of the table's gradient that are summed over devices one after another
_CHUNK = 1 << 24  # logits at a time where the caller does not say: 64 MiB in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """How to compute the loss; static.

    smoothing: share of the target's mass spread over the vocabulary. z: weight of the squared log-normaliser (PaLM,
    section 5). chunk: positions of a row at a time, at most; 0 to choose. scale and softcap are those of the model's
    head.
    """

    smoothing: float = 0.0
    z: float = 0.0
    chunk: int = 0
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self):
        for name, value, ok in (
            ("smoothing", self.smoothing, 0 <= self.smoothing < 1),
            ("z", self.z, self.z >= 0),
            ("chunk", self.chunk, self.chunk >= 0),
        ):
            if not ok:
                raise ValueError(f"{name}={value}: expected {'0 <= smoothing < 1' if name == 'smoothing' else '>= 0'}")


Sums = dict[str, Array]  # float32 scalars: nll, z, correct; each a weighted sum over positions


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    spec: CrossEntropy, hidden: Array, table: Array, targets: Array, weights: Array
) -> tuple[Array, Sums]:
    """hidden [B, T, D], table [V, D], targets [B, T] int, weights [B, T] -> the weighted sum of losses, and its parts.

    Products run in hidden's dtype with float32 accumulation. A target of -100 counts for nothing. Only the first output
    has a gradient, with respect to hidden and table.
    """
    return _run(spec, hidden, table, targets, weights, gradients=False)[0]


def _forward(spec, hidden, table, targets, weights):
    out, gradients = _run(spec, hidden, table, targets, weights, gradients=True)
    return out, gradients


def _backward(spec, gradients, cotangents):
    # The cotangent holds the loss scale and the number of targets: in hidden's dtype it would be rounded, or overflow.
    dhidden, dtable = ((g.astype(jnp.float32) * cotangents[0]).astype(g.dtype) for g in gradients)
    return dhidden, dtable, None, None


cross_entropy.defvjp(_forward, _backward)


def _run(how: CrossEntropy, hidden, table, targets, weights, gradients: bool):
    """The sums, and the gradients of their total.

    Over a mesh every device sums over its own positions, and the table's gradient is reduced once, at the end: left to
    the partitioner, each chunk would reduce one of its own.
    """
    rows, over = rows_over(hidden.shape)
    w = table.astype(hidden.dtype)
    axes = sizes()
    # Where both pipe and tensor cut, XLA's partitioner fails on a region (a check in spmd_partitioner_util.cc).
    if not over or (axes.get("pipe", 1) > 1 and axes.get("tensor", 1) > 1):
        out, made = _chunks(how, hidden, w, targets, weights, gradients)
        return out, made and (made[0], made[1].astype(table.dtype))
    cut = "fsdp" if "fsdp" in over and table.shape[1] % axes["fsdp"] == 0 else None
    rest = tuple(axis for axis in over if axis != cut)

    def local(hidden, w, targets, weights):
        out, made = _chunks(how, hidden, w, targets, weights, gradients)
        out = jax.lax.psum(out, over)
        if not made:
            return out, None
        dtable = _scattered(made[1], cut) if cut else made[1]
        dtable = (jax.lax.psum(dtable, rest) if rest else dtable).astype(table.dtype)
        # Summed before the backward pass of anything else may begin: until then the whole table's gradient is held.
        return out, jax.lax.optimization_barrier((made[0], dtable))

    return jax.shard_map(
        local,
        in_specs=(rows, P(), rows, rows),
        out_specs=(P(), (rows, P(None, cut)) if gradients else None),
        axis_names=set(over),
        check_vma=False,
    )(hidden, w, targets, weights)


def _scattered(dtable, axis: str):
    """[V, D] summed over an axis that keeps its part of D; some rows at a time, for it takes copies of them."""
    slabs = math.gcd(_SLABS, dtable.shape[0])
    parts = dtable.reshape(slabs, -1, dtable.shape[1])
    return jax.lax.map(lambda part: sum_scatter(part, axis, 1), parts).reshape(dtable.shape[0], -1)


def _chunks(spec: CrossEntropy, hidden, w, targets, weights, gradients: bool):
    """The sums and gradients, that of the table w in float32: a scan over chunks of positions."""
    (b, t, d), v = hidden.shape, w.shape[0]
    chunk = min(spec.chunk or max(1, _CHUNK // (b * v)), t)
    n = -(-t // chunk)
    chunk = -(-t // n)  # as equal as can be: what is left over is padded, and computed for nothing
    cut = lambda a: jnp.moveaxis(
        jnp.pad(a, ((0, 0), (0, n * chunk - t)) + ((0, 0),) * (a.ndim - 2)).reshape(b, n, chunk, *a.shape[2:]), 1, 0
    )
    weights = jnp.where(targets == IGNORE, 0, weights).astype(jnp.float32)

    def step(carry, piece):
        sums, dtable = carry
        found, g = _chunk(spec, w, *piece)
        sums = jax.tree.map(jnp.add, sums, found)
        if not gradients:
            return (sums, dtable), None
        h, g = piece[0], g.astype(hidden.dtype)
        rows = lambda a: a.reshape(-1, a.shape[-1])  # as one axis: XLA on CPU copies g, transposed, to sum over two
        product = functools.partial(jnp.einsum, precision=precision(h.dtype), preferred_element_type=jnp.float32)
        return (sums, dtable + product("BV,BD->VD", rows(g), rows(h))), product("BTV,VD->BTD", g, w).astype(h.dtype)

    zero = {"loss": 0.0, "nll": 0.0, "z": 0.0, "correct": 0.0}
    start = jax.tree.map(jnp.float32, zero), jnp.zeros((v, d) if gradients else (), jnp.float32)
    pieces = cut(hidden), cut(jnp.where(targets == IGNORE, 0, targets)), cut(weights)
    if n == 1:
        (sums, dtable), only = step(start, jax.tree.map(lambda a: a[0], pieces))
        dhidden = None if only is None else only[None]
    else:
        (sums, dtable), dhidden = jax.lax.scan(step, start, pieces)
    out = sums.pop("loss"), sums
    if dhidden is None:
        return out, None
    dhidden = jnp.moveaxis(dhidden, 0, 1).reshape(b, n * chunk, d)[:, :t]
    return out, (dhidden, dtable)


def _chunk(spec: CrossEntropy, w: Array, h: Array, y: Array, weight: Array) -> tuple[Sums, Array]:
    """Weighted sums over a chunk [B, c], and the gradient of the loss with respect to its products h w [B, c, V]."""
    products = jnp.einsum("BTD,VD->BTV", h, w, precision=precision(h.dtype), preferred_element_type=jnp.float32)
    logits = products * spec.scale if spec.scale != 1 else products
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    v, smoothing = logits.shape[-1], spec.smoothing
    top = logits.max(-1, keepdims=True)
    odds = jnp.exp(logits - top)
    mass = odds.sum(-1)
    lse = jnp.log(mass) + top[..., 0]
    picked = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
    nll = lse - picked
    z = spec.z * lse**2
    loss = nll + z
    if smoothing:
        loss = (1 - smoothing) * nll + smoothing * (lse - logits.mean(-1)) + z
    total = lambda x: (x * weight).sum()
    sums = {"loss": total(loss), "nll": total(nll), "z": total(z), "correct": total(picked >= top[..., 0])}
    at_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == y[..., None]
    g = odds * ((1 + 2 * spec.z * lse) / mass)[..., None]
    g = g - jnp.where(at_target, 1 - smoothing, 0) - smoothing / v
    if spec.softcap is not None:
        g = g * (1 - (logits / spec.softcap) ** 2)
    return sums, g * (spec.scale * weight)[..., None]
