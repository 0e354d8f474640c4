"""Layers cut over the mesh axis `pipe`: each device runs its own on one micro-batch after another (arXiv 1811.06965).

With v repeats the P v chunks of successive layers are dealt out, chunk c to stage c mod P, and a micro-batch goes round
the ring of stages v times (arXiv 2104.04473, section 2.2; MaxText's circular pipeline): after v m + P - 1 steps of one
chunk each, all m micro-batches have seen all chunks, and a stage has idled in P - 1 of them.

The stacks stay as they are stored: cut on their first axis, a device holds successive layers. For v > 1 these move to
their stages when a pass begins: most of a device's weights cross its links once, and their gradients once back, beside
v times the activations; while the layers run, a device holds its weights in both orders. The axes other than `pipe`
stay automatic, so that everything else composes with it. Plain differentiation: the backward pass runs the schedule in
reverse. Embedding and head are outside; the stages share out the rows of the head.
"""

import collections
import dataclasses
import functools
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
_MOVES = {"dynamic_slice", "squeeze", "reshape", "transpose", "broadcast_in_dim", "convert_element_type", "all_gather"}


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A way to run layers, for `Runtime.layers`; without an axis `pipe` above 1 it is that of stack.py.

    microbatches: 0 for the most, up to four a stage, that the rows split into. repeats: how many chunks of layers a
    stage has; above 1, micro-batches must be as many as stages, or more. Idle steps are (P - 1) of v m + P - 1.
    """

    microbatches: int = 0
    repeats: int = 1

    def __post_init__(self):
        if self.microbatches < 0:
            raise ValueError(f"microbatches={self.microbatches}: expected 1 or more, or 0 to choose")
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats}: expected 1 or more")

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
        each = _check(layers, params, stages, self.repeats)
        m = _microbatches(self.microbatches, len(x), stages, self.repeats)
        leaves, structure = jax.tree.flatten(given)
        by_row = [not _is_key(leaf) and leaf.ndim > 0 and leaf.shape[0] == len(x) for leaf in leaves]
        leaves = [_cut(leaf, m) if rows else leaf for leaf, rows in zip(leaves, by_row, strict=True)]
        depths: list[np.ndarray] = []
        if remat is None:
            remat = functools.partial(jax.checkpoint, prevent_cse=False, policy=_computed)

        def of(leaf: Array, rows: bool, i: Array) -> Array:
            if _is_key(leaf):
                return jax.random.fold_in(leaf, i)
            return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False) if rows else leaf

        def stage(params, number, xs, leaves):
            weights, place = _deal(params, number[0], stages, self.repeats)

            def chunk(x, repeat, i):
                given = jax.tree.unflatten(structure, [of(a, r, i) for a, r in zip(leaves, by_row, strict=True)])
                first = (repeat * stages + number[0]) * each
                x, _, extras = _run_chunk(block, layers[:each], weights, place[repeat], first, x, given, remat)
                depths[:] = [extra.depths for extra in extras]
                return x, [extra.values for extra in extras]

            return _schedule(chunk, number[0], xs, stages, self.repeats, x.dtype)

        run = jax.shard_map(
            stage, mesh=jax.sharding.get_abstract_mesh(), in_specs=(P(AXIS), P(AXIS), P(), P()),
            out_specs=(P(), P(AXIS)), axis_names={AXIS}, check_vma=False,
        )  # fmt: skip
        # A stage learns its number from an array: partitioners do not know it where other axes are automatic.
        # XLA on CPU aborts over a bfloat16 sum in such a region: micro-batches and their gradients pass as float32.
        out, values = run(dict(params), jnp.arange(stages), _cut(x.astype(jnp.float32), m), leaves)
        out = jnp.moveaxis(out, 0, 1).reshape(x.shape).astype(x.dtype)
        chunks = np.arange(stages)[:, None] + stages * np.arange(self.repeats)  # [stages, repeats], as values are
        extras = [Extra((chunks[..., None] * each + d).ravel(), v) for d, v in zip(depths, values, strict=True)]
        shared = len(x) % (stages * _ways()) == 0
        return constrain(out, "head_batch" if shared else "batch", "length", None), None, extras


def deals(stages: int, repeats: int) -> np.ndarray:
    """[repeats, stages]: the chunk that each device, which holds `repeats` successive ones, sends in each round.

    Chunk c goes to stage c mod stages. Devices that hold chunks of the same stages begin with different ones, so that
    every device gets one in every round.
    """
    device = np.arange(stages)
    group = device // (stages // math.gcd(stages, repeats))
    return device * repeats + (np.arange(repeats)[:, None] + group) % repeats


def _deal(params: Tree, number: Array, stages: int, repeats: int) -> tuple[Tree, Array | np.ndarray]:
    """This stage's weights, chunk after chunk as they came, and for each repeat in which place that of its chunk is."""
    if repeats == 1:
        return params, np.zeros(1, int)
    sent, rounds = deals(stages, repeats), []
    for chunks in sent:
        mine = jnp.asarray(chunks)[number] - number * repeats
        pick = lambda a, i=mine: jax.lax.dynamic_slice_in_dim(a, i * (len(a) // repeats), len(a) // repeats)
        to = [(d, int(c) % stages) for d, c in enumerate(chunks)]
        rounds.append(jax.tree.map(lambda a, pick=pick, to=to: jax.lax.ppermute(pick(a), AXIS, to), params))
    came = np.zeros((stages, repeats), int)
    came[sent % stages, sent // stages] = np.arange(repeats)[:, None]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *rounds), jnp.asarray(came)[number]


def _run_chunk(block, layers, weights, place, first, x, given, remat):
    """As stack.run, over the chunk in this place of the weights, at depths from `first` on.

    Blocks take their weights themselves: so these are taken again for the backward pass, not kept. Which they are
    differs from step to step, and it would keep a copy of a chunk for every one.
    """

    def at(layer, i, x, state, depth, *given):
        kind, group = layer
        take = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
        return block(kind, jax.tree.map(take, weights[group]), x, state, first + depth, *given)

    named = [Layer((layer.kind, layer.group), layer.group, layer.state) for layer in layers]
    count = collections.Counter(layer.group for layer in layers)
    index = {group: place * n + jnp.arange(n) for group, n in count.items()}
    return stack.run(at, named, index, x, given=given, remat=remat)


def _computed(primitive, *_, **__) -> bool:
    """What the backward pass keeps of a block that keeps all: not weights as they were taken, cast or gathered."""
    return primitive.name not in _MOVES


def _schedule(chunk: Callable, number: Array, xs: Array, stages: int, repeats: int, dtype):
    """Micro-batches xs [m, b, T, D] float32 through all chunks, which compute in dtype: (the results, float32, and the
    extras of this stage's chunks, summed, [repeats x layers, ...])."""
    m = len(xs)
    ring = [(s, (s + 1) % stages) for s in range(stages)]
    put = jax.lax.dynamic_update_index_in_dim
    take = lambda a, i: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)

    def step(carry: tuple[Array, Array], t: Array):
        received, queue = carry
        # The first stage finds the next micro-batch in its queue, and puts back what has been round the ring.
        slot = (t - stages) % m
        queue = put(queue, jnp.where(t < stages, take(queue, slot), received), slot, 0)
        x = jnp.where(number == 0, take(queue, t % m), received)
        item = jnp.clip(t - number, 0, repeats * m - 1)
        x, values = chunk(x, item // m if repeats > 1 else 0, item % m)
        return (jax.lax.ppermute(x, AXIS, ring), queue), values

    begin = jnp.zeros(xs.shape[1:], dtype), xs.astype(dtype)
    (last, queue), values = jax.lax.scan(step, begin, jnp.arange(repeats * m + stages - 1))
    results = put(queue, last, m - 1, 0).astype(jnp.float32)
    results = jax.lax.psum(jnp.where(number == 0, results, 0), AXIS)  # only the first stage has them

    def total(v: Array) -> Array:
        v = jax.lax.dynamic_slice_in_dim(v, number, repeats * m)  # the steps in which this stage was not idle
        return v.reshape(repeats, m, *v.shape[1:]).sum(1).reshape(-1, *v.shape[2:])

    return results, jax.tree.map(total, values)


def _check(layers: Sequence[Layer], params: Mapping[str, Tree], stages: int, repeats: int) -> int:
    """How many layers a chunk has; ValueError where chunks are not alike."""
    over = f"{AXIS}={stages}" + (f" with {repeats} repeats" if repeats > 1 else "")
    if stack.is_unrolled(params):
        raise ValueError(f"a pipeline over {over} needs stacked parameters, not unrolled ones")
    if len(layers) % (stages * repeats):
        raise ValueError(f"{len(layers)} layers do not split over {over}")
    each = len(layers) // stages // repeats
    for at, layer in enumerate(layers):
        if layer != layers[at % each]:
            raise ValueError(
                f"stages of a pipeline need the same kinds of layers: over {over}, layer {at % each} of the first "
                f"{each} is {layers[at % each].kind}, and layer {at} {layer.kind}"
            )
    return each


def _microbatches(wanted: int, rows: int, stages: int, repeats: int) -> int:
    """How many micro-batches these rows make; ValueError where they cannot."""
    ways = _ways()
    m = wanted or max((m for m in range(1, 4 * stages + 1) if rows % (m * ways) == 0), default=1)
    if rows % (m * ways):
        raise ValueError(f"{rows} rows do not split into {m} micro-batches over {ways} devices of {', '.join(BATCH)}")
    if repeats > 1 and m < stages:
        raise ValueError(
            f"repeats={repeats} over {AXIS}={stages} needs {stages} micro-batches or more: {m} of {rows} rows would "
            "be back at the first stage before it is free"
        )
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
