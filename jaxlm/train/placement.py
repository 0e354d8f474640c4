"""Where a training state lives on a mesh: parameters by the rules, optimizer moments beside their parameters.

ZeRO's stages say what the axis `data` cuts beyond that: 0 nothing, 1 the moments, 2 the gradients too, 3 the parameters
too, which is what the axis `fsdp` does at every stage. Moments and parameters may lie in the hosts' memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel import hosts
from jaxlm.parallel.sharding import RULES, SPREAD, Replicated, Rules, batch_shardings, shardings
from jaxlm.train.partition import join
from jaxlm.train.step import Batch, Gradients, TrainState

Tree = Any
STAGES = (0, 1, 2, 3)
OFFLOAD = ("optimizer", "params")  # what may lie in the hosts' memory
HOST = "pinned_host"


def state_shardings(
    state: TrainState,
    axes: Tree,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    zero: int = 0,
    offload: Sequence[str] = (),
) -> tuple[TrainState, list[Replicated]]:
    """A sharding for every leaf of the state, and the dimensions that do not divide.

    axes: logical axes of the variables; a leaf without any (adapters, task heads) is replicated. offload: names of
    OFFLOAD whose arrays lie in pinned host memory. ValueError for a device without such memory, or an unknown name.
    """
    if unknown := set(offload) - set(OFFLOAD):
        raise ValueError(f"offload: unknown {', '.join(sorted(unknown))}; there are {', '.join(OFFLOAD)}")
    where = {name: _in_host_memory if name in offload else lambda sharding: sharding for name in OFFLOAD}
    whole = NamedSharding(mesh, PartitionSpec())
    rules = SPREAD if _stage(zero, mesh) == 3 else RULES
    trainable, failed = _variable_shardings(state.trainable, axes, mesh, rules)
    frozen, more = _variable_shardings(state.frozen, axes, mesh, rules)
    spread, missed = _variable_shardings(state.trainable, axes, mesh, SPREAD if zero else RULES)

    # Moments have the shape of their parameter; factored ones do not, and are small.
    def beside(leaf: Any, sharding: NamedSharding, parameter: Any) -> NamedSharding:
        return where["optimizer"](sharding) if leaf.shape == parameter.shape else whole

    moments = optax.tree_utils.tree_map_params(
        optimizer, beside, state.optimizer, spread, state.trainable, transform_non_params=lambda _: whole
    )
    trainable, frozen = jax.tree.map(where["params"], (trainable, frozen))
    rest = jax.tree.map(lambda _: whole, (state.step, state.key, state.scale, state.lr_scale))
    step, key, scale, lr_scale = rest
    missed = [one for one in missed if one not in failed]
    return TrainState(step, trainable, frozen, moments, key, scale, lr_scale), failed + more + missed


def gradient_shardings(state: TrainState, axes: Tree, mesh: Mesh | AbstractMesh, zero: int = 0) -> Gradients:
    """Where gradients lie, beside `state_shardings` with the same arguments."""
    layouts = [_variable_shardings(state.trainable, axes, mesh, rules)[0] for rules in (RULES, SPREAD)]
    return Gradients(summed=layouts[_stage(zero, mesh) >= 2], used=layouts[zero >= 1])


def bytes_per_device(tree: Tree, shardings: Tree) -> dict[str, int]:
    """Bytes of arrays or their shapes on each device, by kind of memory ("device" for the default)."""
    found: dict[str, int] = {}
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        size = int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        kind = HOST if sharding.memory_kind == HOST else "device"
        found[kind] = found.get(kind, 0) + size
    return found


def _variable_shardings(
    tree: Tree, axes: Tree, mesh: Mesh | AbstractMesh, rules: Rules
) -> tuple[Tree, list[Replicated]]:
    named = {join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)}
    none = lambda leaf: (None,) * leaf.ndim
    found = jax.tree_util.tree_map_with_path(lambda path, leaf: named.get(join(path), none(leaf)), tree)
    return shardings(found, tree, mesh, rules)


def _stage(zero: int, mesh: Mesh | AbstractMesh) -> int:
    """The stage; ValueError for one that there is not, or that would change nothing."""
    if zero not in STAGES:
        raise ValueError(f"zero={zero}: expected one of {', '.join(map(str, STAGES))}")
    if zero and mesh.shape["data"] == 1:
        raise ValueError(f"zero={zero} cuts over the axis data, which is 1 here; fsdp cuts everything at every stage")
    return zero


def _in_host_memory(sharding: NamedSharding) -> NamedSharding:
    device = next(iter(sharding.device_set))
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(f"offload: {device.device_kind} has no {HOST} memory; it has {', '.join(kinds)}")
    return sharding.with_memory_kind(HOST)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh | None, lead: int = 0) -> Batch:
    """A host's share of a batch as global arrays on the mesh; as it is without one."""
    if mesh is None:
        return batch  # type: ignore[return-value]
    _, shares = hosts.share_of_rows(mesh)
    shapes = {
        name: np.broadcast_to(np.int8(0), (*a.shape[:lead], a.shape[lead] * shares, *a.shape[lead + 1 :]))
        for name, a in batch.items()
    }
    wanted = batch_shardings(shapes, mesh, lead)
    # The whole shape is given: hosts that hold the same rows (of a model cut over hosts) must not be counted twice.
    return {
        name: jax.make_array_from_process_local_data(wanted[name], a, shapes[name].shape) for name, a in batch.items()
    }


def within(mesh: Mesh | None, function: Callable) -> Callable:
    """The function, called with the mesh in force: models lay out their activations over it."""

    @functools.wraps(function)
    def call(*args):
        with jax.set_mesh(mesh):
            return function(*args)

    return function if mesh is None else call


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)
