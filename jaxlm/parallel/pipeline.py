"""Layers cut over the mesh axis `pipe`: each device runs its own on one micro-batch after another (arXiv 1811.06965).

The stacks stay as they are stored: cut on their first axis, a device holds successive layers. A step of the schedule
runs one micro-batch through every stage and passes the results on; after m + P - 1 steps all m micro-batches have seen
all P stages. The axes other than `pipe` stay automatic, so that everything else composes with it. Plain
differentiation: the backward pass runs the schedule in reverse. Embedding and head are outside; the stages
share out the rows of the head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxlm.models import stack
from jaxlm.models.stack import Extra, Layer, Tree
from jaxlm.parallel.sharding import RULES, constrain, sizes

AXIS = "pipe"
BATCH: tuple[str, ...] = dict(RULES)["batch"]  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A way to run layers, for `Runtime.layers`; without an axis `pipe` above 1 it is that of stack.py.

    microbatches: 0 for the most, up to four a stage, that the rows split into. Idle steps are (P - 1) of m + P - 1.
    """

    microbatches: int = 0

    def __post_init__(self):
        if self.microbatches < 0:
            raise ValueError(f"microbatches={self.microbatches}: expected 1 or more, or 0 to choose")

    def __call__(
        self,
        block: Callable,
        layers: Sequence[Layer],
        params: Mapping[str, Tree],
        x: Array,
        cache: Mapping[str, Tree] | None = None,
        *,
        given: tuple = (),
        remat: Callable | None = None,
    ) -> tuple[Array, dict[str, Tree] | None, list[Extra]]:
        """As stack.run, with x [B, T, D]. Arrays in `given` with B rows go with theirs, and a random key is another one
        for each micro-batch; what blocks return beside the stream is summed over micro-batches.

        ValueError for a cache, and for layers or rows that do not split.
        """
        stages = sizes().get(AXIS, 1)
        if stages == 1:
            return stack.run(block, layers, params, x, cache, given=given, remat=remat)
        if cache is not None:
            raise ValueError(f"a pipeline over {AXIS}={stages} keeps no cache: generate over other axes")
        _check(layers, params, stages)
        m = _microbatches(self.microbatches, len(x), stages)
        leaves, structure = jax.tree.flatten(given)
        by_row = [not _is_key(leaf) and leaf.ndim > 0 and leaf.shape[0] == len(x) for leaf in leaves]
        leaves = [_cut(leaf, m) if rows else leaf for leaf, rows in zip(leaves, by_row, strict=True)]
        depths: list[np.ndarray] = []

        def of(leaf: Array, rows: bool, i: Array) -> Array:
            if _is_key(leaf):
                return jax.random.fold_in(leaf, i)
            return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False) if rows else leaf

        def stage(params, number, xs, leaves):
            first = number[0] * (len(layers) // stages)
            at_depth = lambda kind, p, x, state, depth, *given: block(kind, p, x, state, first + depth, *given)

            def layers_of(x, i):
                given = jax.tree.unflatten(structure, [of(a, r, i) for a, r in zip(leaves, by_row, strict=True)])
                mine = layers[: len(layers) // stages]
                x, _, extras = stack.run(at_depth, mine, params, x, given=given, remat=remat)
                depths[:] = [extra.depths for extra in extras]
                return x, [extra.values for extra in extras]

            return _schedule(layers_of, number[0], xs, stages, x.dtype)

        run = jax.shard_map(
            stage, mesh=jax.sharding.get_abstract_mesh(), in_specs=(P(AXIS), P(AXIS), P(), P()),
            out_specs=(P(), P(AXIS)), axis_names={AXIS}, check_vma=False,
        )  # fmt: skip
        # A stage learns its number from an array: partitioners do not know it where other axes are automatic.
        # XLA on CPU aborts over a bfloat16 sum in such a region: micro-batches and their gradients pass as float32.
        out, values = run(dict(params), jnp.arange(stages), _cut(x.astype(jnp.float32), m), leaves)
        out = jnp.moveaxis(out, 0, 1).reshape(x.shape).astype(x.dtype)
        step = len(layers) // stages * np.arange(stages)[:, None]
        extras = [Extra((d + step).ravel(), v) for d, v in zip(depths, values, strict=True)]
        shared = len(x) % (stages * _ways()) == 0
        return constrain(out, "head_batch" if shared else "batch", "length", None), None, extras


def _schedule(layers_of: Callable, number: Array, xs: Array, stages: int, dtype):
    """Micro-batches xs [m, b, T, D] float32 through all stages, which compute in dtype: (the last one's results,
    float32, and this one's extras summed)."""
    m = len(xs)

    def step(received: Array, t: Array):
        i = t - number
        busy, i = (i >= 0) & (i < m), jnp.clip(i, 0, m - 1)
        x = jnp.where(number == 0, jax.lax.dynamic_index_in_dim(xs, i, keepdims=False).astype(dtype), received)
        x, values = layers_of(x, i)
        following = jax.lax.ppermute(x, AXIS, [(s, s + 1) for s in range(stages - 1)])
        return following, (x, jax.tree.map(lambda v: jnp.where(busy, v, 0), values))

    _, (results, values) = jax.lax.scan(step, jnp.zeros(xs.shape[1:], dtype), jnp.arange(m + stages - 1))
    results = results[stages - 1 :].astype(jnp.float32)
    results = jax.lax.psum(jnp.where(number == stages - 1, results, 0), AXIS)  # only the last stage has them
    return results, jax.tree.map(lambda v: v.sum(0), values)


def _check(layers: Sequence[Layer], params: Mapping[str, Tree], stages: int) -> None:
    if stack.is_unrolled(params):
        raise ValueError(f"a pipeline over {AXIS}={stages} needs stacked parameters, not unrolled ones")
    if len(layers) % stages:
        raise ValueError(f"{len(layers)} layers do not split over {AXIS}={stages}")
    each = len(layers) // stages
    for stage in range(1, stages):
        for i, (one, other) in enumerate(zip(layers, layers[stage * each :], strict=False)):
            if i < each and one != other:
                raise ValueError(
                    f"stages of a pipeline need the same kinds of layers: over {AXIS}={stages}, layer {i} of the first "
                    f"is {one.kind}, and of stage {stage} {other.kind}"
                )


def _microbatches(wanted: int, rows: int, stages: int) -> int:
    """How many micro-batches these rows make; ValueError where they cannot."""
    ways = _ways()
    m = wanted or max((m for m in range(1, 4 * stages + 1) if rows % (m * ways) == 0), default=1)
    if rows % (m * ways):
        raise ValueError(f"{rows} rows do not split into {m} micro-batches over {ways} devices of {', '.join(BATCH)}")
    return m


def _ways() -> int:
    """How many ways rows are cut."""
    return math.prod(sizes().get(axis, 1) for axis in BATCH)


def _cut(x: Array, m: int) -> Array:
    """[B, ...] -> [m, B / m, ...]: every m-th row, so that the rows of a micro-batch stay where they are."""
    x = jnp.moveaxis(x.reshape(-1, m, *x.shape[1:]), 1, 0)
    return constrain(x, None, "batch", *(None,) * (x.ndim - 2))


def _is_key(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
