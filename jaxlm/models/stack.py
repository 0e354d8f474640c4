"""Layers of several kinds, stored in stacks, run as scans over repeating periods.

`params[group]` and `cache[state]` are stacked [L_group, ...] in depth order; a `Layer` says, per depth, what the layer
is (a static, hashable kind) and which stacks it reads. A stack may also be a tuple of its elements: then layers run one
by one, unrolled, which a CPU needs to read weights where they lie instead of copying each layer out of its stack.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


@dataclasses.dataclass(frozen=True)
class Layer:
    kind: Hashable
    group: str
    state: str


@dataclasses.dataclass(frozen=True)
class Extra:
    """What the layers at `depths` returned beside the stream: a dict of arrays stacked on axis 0 in that order."""

    depths: np.ndarray
    values: dict[str, jax.Array]


def runs(layers: Sequence[Layer]) -> list[tuple[tuple[Layer, ...], int]]:
    """Cuts the layers into (period, repeats), taking the longest repeating stretch from the front each time."""
    out, i = [], 0
    while i < len(layers):
        period, repeats = 1, 1
        for n in range(1, (len(layers) - i) // 2 + 1):
            k = 1
            while layers[i + k * n : i + (k + 1) * n] == layers[i : i + n]:
                k += 1
            if k > 1 and n * k > period * repeats:
                period, repeats = n, k
        out.append((tuple(layers[i : i + period]), repeats))
        i += period * repeats
    return out


def run(
    block: Callable,
    layers: Sequence[Layer],
    params: Mapping[str, Tree],
    x: jax.Array,
    cache: Mapping[str, Tree] | None = None,
    *,
    given: tuple = (),
    remat: Callable | None = None,
) -> tuple[jax.Array, dict[str, Tree] | None, list[Extra]]:
    """Applies block(kind, p, x, state, depth, *given) -> (x, state, extra) to every layer in order.

    `depth` is a traced int; `state` is None without a cache; `extra` is a dict of arrays. `remat` wraps the block
    (jax.checkpoint with a policy). Returns the stream, the new cache and the extras of each run.
    """
    step_block = _of_stack(block, is_unrolled(params), remat)
    seen_group = dict.fromkeys((layer.group for layer in layers), 0)
    seen_state = dict.fromkeys((layer.state for layer in layers), 0)
    held = None if cache is None else dict(cache)
    extras, depth0 = [], 0
    for period, repeats in [((layer,), 1) for layer in layers] if is_unrolled(params) else runs(layers):
        step = _period_step(step_block, period, params, dict(seen_group), dict(seen_state), depth0, given)
        if repeats == 1:
            (x, held), ys = step((x, held), 0)
            ys = jax.tree.map(lambda a: a[None], ys)
        else:
            (x, held), ys = jax.lax.scan(step, (x, held), jnp.arange(repeats))
        for i, values in enumerate(ys):
            extras.append(Extra(depth0 + i + len(period) * np.arange(repeats), values))
        for layer in period:
            seen_group[layer.group] += repeats
            seen_state[layer.state] += repeats
        depth0 += len(period) * repeats
    return x, held, extras


def _of_stack(block: Callable, unrolled: bool, remat: Callable | None) -> Callable:
    """block(kind, stack, index, ...), whose backward pass takes a layer's weights from their stack once more.

    What is differentiated without this keeps them: a second copy of all the weights.
    """
    if unrolled:
        apply = remat(block, static_argnums=(0,)) if remat else block
        return lambda kind, stack, i, *rest: apply(kind, _take(stack, i), *rest)
    apply = lambda kind, stack, i, *rest: block(kind, _take(stack, i), *rest)
    return (remat or _KEEP_ALL)(apply, static_argnums=(0,))


def _but_slices(primitive, *_, **__) -> bool:
    return primitive not in (jax.lax.dynamic_slice_p, jax.lax.squeeze_p)


_KEEP_ALL = functools.partial(jax.checkpoint, prevent_cse=False, policy=_but_slices)


def _period_step(block, period, params, group0, state0, depth0, given):
    """One scan step: the layers of a period. Stacks are indexed here, inside the step: slicing a stack outside the
    scan would copy those weights every call."""
    per_group = {g: sum(layer.group == g for layer in period) for g in {layer.group for layer in period}}
    per_state = {s: sum(layer.state == s for layer in period) for s in {layer.state for layer in period}}

    def step(carry, r):
        x, cache = carry
        in_group, in_state = dict.fromkeys(per_group, 0), dict.fromkeys(per_state, 0)
        ys = []
        for i, layer in enumerate(period):
            g = group0[layer.group] + r * per_group[layer.group] + in_group[layer.group]
            s = state0[layer.state] + r * per_state[layer.state] + in_state[layer.state]
            in_group[layer.group] += 1
            in_state[layer.state] += 1
            state = None if cache is None else _take(cache[layer.state], s)
            depth = depth0 + r * len(period) + i
            x, state, extra = block(layer.kind, params[layer.group], g, x, state, depth, *given)
            if cache is not None:
                cache = cache | {layer.state: _put(cache[layer.state], s, state)}
            ys.append(extra)
        return (x, cache), tuple(ys)

    return step


def collect(extras: Sequence[Extra], name: str) -> jax.Array:
    """The value `name` of every layer that returned it, stacked [layers, ...] in depth order; KeyError if none did."""
    have = [e for e in extras if name in e.values]
    if not have:
        raise KeyError(f"no layer returned {name!r}")
    depths = np.concatenate([e.depths for e in have])
    values = jnp.concatenate([e.values[name] for e in have])
    order = np.argsort(depths)
    return values if (order == np.arange(len(order))).all() else values[order]


def is_unrolled(params: Mapping[str, Tree]) -> bool:
    """Whether the stacks are tuples of layers."""
    return any(isinstance(stack, tuple) for stack in params.values())


def _take(tree: Tree, i) -> Tree:
    if isinstance(tree, tuple):
        return tree[i]
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), tree)


def _put(tree: Tree, i, new: Tree) -> Tree:
    if isinstance(tree, tuple):
        return (*tree[:i], new, *tree[i + 1 :])
    return jax.tree.map(lambda a, n: jax.lax.dynamic_update_index_in_dim(a, n, i, 0), tree, new)
