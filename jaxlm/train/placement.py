"""Where a training state lives on a mesh: parameters by the rules, optimizer moments beside their parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.parallel import hosts
from jaxlm.parallel.sharding import Replicated, batch_shardings, shardings
from jaxlm.train.partition import join
from jaxlm.train.step import Batch, TrainState

Tree = Any


def state_shardings(
    state: TrainState, axes: Tree, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, list[Replicated]]:
    """A sharding for every leaf of the state, and the dimensions that stay whole because they do not divide.

    axes: logical axes of the variables; a leaf without any (adapters, task heads) is replicated.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    named = {join(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)}

    def of(tree: Tree) -> tuple[Tree, list[Replicated]]:
        none = lambda leaf: (None,) * leaf.ndim
        found = jax.tree_util.tree_map_with_path(lambda path, leaf: named.get(join(path), none(leaf)), tree)
        return shardings(found, tree, mesh)

    trainable, failed = of(state.trainable)
    frozen, more = of(state.frozen)
    # Moments have the shape of their parameter; factored ones do not, and are small.
    beside = lambda leaf, sharding, parameter: sharding if leaf.shape == parameter.shape else whole
    moments = optax.tree_utils.tree_map_params(
        optimizer, beside, state.optimizer, trainable, state.trainable, transform_non_params=lambda _: whole
    )
    rest = jax.tree.map(lambda _: whole, (state.step, state.key, state.scale, state.lr_scale))
    step, key, scale, lr_scale = rest
    return TrainState(step, trainable, frozen, moments, key, scale, lr_scale), failed + more


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
