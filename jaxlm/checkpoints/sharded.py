"""From a checkpoint's tensors to arrays on a mesh: every host reads what its own devices hold, and nothing else.

Where a stack is cut along its layers or experts, tensors go to their devices side by side: those that are the same
element of each device's part are read and placed in one step, so that no device is sent what it does not keep.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoints.rules import Binding, Layout, Shape
from jaxlm.checkpoints.source import Box, Source

Cast = Callable[[np.ndarray, str], np.ndarray]
Read = Callable[[Box], np.ndarray]


def fill(
    source: Source,
    bindings: Mapping[str, Binding],
    leaves: Mapping[str, Shape],
    shardings: Mapping[str, NamedSharding],
    dtypes: Mapping[str, str],
    check: Cast,
    on_bytes: Callable[[int], None],
) -> dict[str, jax.Array]:
    """{path: array with its sharding} for every leaf. check(values, name) sees everything that was read."""
    parts: dict[str, list[tuple[Binding, Layout]]] = {path: [] for path in leaves}
    for binding in bindings.values():
        for path, layout in zip(binding.paths, binding.layouts, strict=True):
            parts[path].append((binding, layout))
    arrays = {}
    for path, shape in leaves.items():
        sharding, depth = shardings[path], len(parts[path][0][0].index)
        cuts = _cuts(sharding, len(shape))[:depth]
        steps: dict[tuple[int, ...], dict[tuple[int, ...], tuple[Binding, Layout]]] = {}
        for binding, layout in parts[path]:
            local = [n // cut for n, cut in zip(shape, cuts, strict=False)]
            at = tuple(i % n for i, n in zip(binding.index, local, strict=True))
            device = tuple(i // n for i, n in zip(binding.index, local, strict=True))
            steps.setdefault(at, {})[device] = (binding, layout)
        stack = None if not depth else _empty(shape, dtypes[path], sharding)
        for at, found in steps.items():
            piece, layout = _piece(source, found, cuts, sharding, dtypes[path], check)
            if stack is None:
                stack = _whole(piece, dtypes[path], layout, sharding)
            else:
                stack = _place(stack, piece, np.asarray(at, np.int32), layout, sharding)
            # Dispatch is asynchronous: without waiting, tensors that were read would pile up in memory.
            stack.block_until_ready()
            on_bytes(sum(_nbytes(source, binding.name, layout) for binding, layout in found.values()))
        arrays[path] = stack
    return arrays


def _piece(source, found, cuts, sharding: NamedSharding, dtype: str, check: Cast) -> tuple[jax.Array, Layout]:
    """One stored tensor for every part of the leading axes, [*parts, *layout.shape], its axes cut as the leaf's are."""
    layout: Layout = next(iter(found.values()))[1]
    spread = _piece_sharding(sharding, layout, len(cuts))
    shape = (*cuts, *(1 if axis is None else n for axis, n in zip(layout.axes, layout.shape, strict=True)))
    wanted: dict[tuple[int, ...], dict[Any, Box]] = {}
    for device, index in spread.addressable_devices_indices_map(shape).items():
        bounds = [one.indices(n)[:2] for one, n in zip(index or (), shape, strict=True)]
        inner = tuple(
            (layout.at, layout.at + 1) if axis is None else bound
            for axis, bound in zip(layout.axes, bounds[len(cuts) :], strict=True)
        )
        wanted.setdefault(tuple(start for start, _ in bounds[: len(cuts)]), {})[device] = inner
    kinds = {source.tensors[binding.name].dtype for binding, _ in found.values()}
    made = []
    for part, boxes in wanted.items():
        binding, own = found[part]
        read = lambda box, name=binding.name, own=own: check(source.read_box(name, own.begin, own.shape, box), name)
        values = _each_once(read, set(boxes.values()))
        for device, box in boxes.items():
            value = values[box] if len(kinds) == 1 else values[box].astype(jnp.dtype(dtype))
            made.append(jax.device_put(value.reshape((1,) * len(cuts) + value.shape), device))
    # Where the piece lay in its tensor no longer matters: with one layout for all, `_place` compiles once.
    return jax.make_array_from_single_device_arrays(shape, spread, made), dataclasses.replace(layout, begin=0, at=0)


def _each_once(read: Read, boxes: Iterable[Box]) -> dict[Box, np.ndarray]:
    """The values of boxes that are disjoint: read together where they fill their hull, else one by one."""
    boxes = sorted(boxes)
    hull = tuple((min(a for a, _ in ranges), max(b for _, b in ranges)) for ranges in zip(*boxes, strict=True))
    if len(boxes) == 1 or _size(hull) != sum(map(_size, boxes)):
        return {box: read(box) for box in boxes}
    whole = read(hull)
    cut = lambda box: tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, hull, strict=True))
    return {box: whole[cut(box)] for box in boxes}


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _spec(sharding: NamedSharding, rank: int) -> tuple:
    return (*sharding.spec, *(None,) * (rank - len(sharding.spec)))


def _cuts(sharding: NamedSharding, rank: int) -> tuple[int, ...]:
    """Into how many parts each axis is cut."""
    axes = [(part,) if isinstance(part, str) else part or () for part in _spec(sharding, rank)]
    return tuple(math.prod(sharding.mesh.shape[name] for name in part) for part in axes)


def _piece_sharding(sharding: NamedSharding, layout: Layout, depth: int) -> NamedSharding:
    spec = _spec(sharding, depth + sum(axis is not None for axis in layout.axes))
    inner = (None if axis is None else spec[depth + axis] for axis in layout.axes)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[:depth], *inner))


def _empty(shape: Shape, dtype: str, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _place(stack, piece, index, layout: Layout, sharding: NamedSharding):
    """The stack with the piece as element `index` of every device's part of it."""
    depth = len(index)

    def put(stack, piece, index):
        part = layout.to_leaf(piece.reshape(piece.shape[depth:])).astype(stack.dtype)
        start = (*index, *(jnp.int32(0) for _ in part.shape))
        return jax.lax.dynamic_update_slice(stack, part.reshape((1,) * depth + part.shape), start)

    specs = (sharding.spec, _piece_sharding(sharding, layout, depth).spec, PartitionSpec())
    return jax.shard_map(put, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)(stack, piece, index)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _whole(piece, dtype: str, layout: Layout, sharding: NamedSharding):
    return jax.lax.with_sharding_constraint(layout.to_leaf(piece).astype(dtype), sharding)


def _nbytes(source: Source, name: str, layout: Layout) -> int:
    size = math.prod(n for n, axis in zip(layout.shape, layout.axes, strict=True) if axis is not None)
    return size * source.tensors[name].dtype.itemsize


def element(stack: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """One element of a stack on a mesh, on every host; no device holds more than that element beside the stack.

    With several processes all of them must ask for it, in the same order.
    """
    sharding = stack.sharding
    assert isinstance(sharding, NamedSharding)
    at = np.asarray(index, np.int32)
    return np.asarray(_taken(stack, at, sharding, jax.process_count() > 1))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _taken(stack, index, sharding: NamedSharding, everywhere: bool):
    spec, depth = _spec(sharding, stack.ndim), len(index)
    cuts = _cuts(sharding, stack.ndim)[:depth]
    mesh_axes = tuple(itertools.chain(*((part,) if isinstance(part, str) else part or () for part in spec[:depth])))

    def take(stack, index):
        # The index of this device's part along each leading axis; only its owner has the element.
        local, mine = [], True
        for i, part in enumerate(spec[:depth]):
            place = jax.lax.axis_index(part) if part else 0
            local.append(index[i] - place * stack.shape[i])
            mine &= (local[i] >= 0) & (local[i] < stack.shape[i])
        start = [jnp.clip(i, 0, n - 1) for i, n in zip(local, stack.shape, strict=False)]
        sizes = (*(1,) * depth, *stack.shape[depth:])
        found = jax.lax.dynamic_slice(stack, (*start, *(jnp.int32(0),) * (stack.ndim - depth)), sizes)
        found = found.reshape(stack.shape[depth:])
        if math.prod(cuts) == 1:
            return found
        # As integers: a sum of floats would turn -0 into 0.
        bits = jax.lax.bitcast_convert_type(found, f"uint{8 * found.dtype.itemsize}")
        bits = jax.lax.psum(jnp.where(mine, bits, 0), mesh_axes)
        return jax.lax.bitcast_convert_type(bits, found.dtype)

    inner = PartitionSpec(*spec[depth:])
    out = jax.shard_map(take, mesh=sharding.mesh, in_specs=(sharding.spec, PartitionSpec()), out_specs=inner)(
        stack, index
    )
    return jax.lax.with_sharding_constraint(out, NamedSharding(sharding.mesh, PartitionSpec())) if everywhere else out
