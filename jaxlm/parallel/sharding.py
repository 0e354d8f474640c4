"""The one table from logical axes to mesh axes, and the shardings that follow from it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

Tree = Any
MeshAxes = str | tuple[str, ...] | None

# Logical axis -> mesh axes. A weight is cut along its model width by fsdp and along heads, features or vocabulary by
# tensor; whatever is not named here is an error, not a replica. Rows are cut over expert too: outside of the experts
# that axis is one more of data. A dimension that its mesh axes do not divide is cut by as many of the first of them as
# divide it, and listed as Replicated. It is never padded, not even a vocabulary: the shapes of parameters stay those of
# the checkpoint, and a table that tensor does not cut is cut by fsdp along its other dimension all the same.
Rules = tuple[tuple[str, MeshAxes], ...]
RULES: Rules = (
    ("batch", ("data", "fsdp", "expert")),
    ("head_batch", ("data", "fsdp", "expert", "pipe")),  # rows of the head, which the stages of a pipeline share out
    ("length", "sequence"),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "expert"),
    ("layers", "pipe"),
    ("head_dim", None),
    ("positions", None),
)
# Where ZeRO spreads parameters, gradients or moments over data too: after fsdp, so that each part is one of its parts.
SPREAD: Rules = tuple((name, ("fsdp", "data") if name == "embed" else axes) for name, axes in RULES)


@dataclasses.dataclass(frozen=True)
class Replicated:
    """A dimension that stays whole, or is cut less than its rule says: its size does not divide over the mesh axes."""

    path: str
    axis: str
    size: int
    over: int


def sizes(mesh: Mesh | AbstractMesh | None = None) -> dict[str, int]:
    """The axes above 1 of a mesh, by default of the one in force, that are not manual here (those of shard_map)."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    manual = getattr(mesh, "manual_axes", ())
    return {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in manual}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, laid out over the mesh in force by its logical axes; a dimension that does not divide stays whole."""
    if not sizes():
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, jax.sharding.get_abstract_mesh())[0])


def everywhere(tree: Tree) -> Tree:
    """The arrays, each whole on every device of the mesh in force, so that every host can read them."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree) if sizes() else tree


def spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules = RULES
) -> tuple[PartitionSpec, list[tuple[str, int, int]]]:
    """The PartitionSpec of an array with these logical axes, and the (axis, size, over) that do not divide.

    Inside of shard_map, only over the axes that are not its own. ValueError for an unknown axis, and where one mesh
    axis would cut two dimensions.
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} are {len(axes)}, for an array of shape {tuple(shape)}")
    table, parts, failed, free = dict(rules), [], [], sizes(mesh)
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in table:
            raise ValueError(f"unknown logical axis {name!r}; there are {', '.join(table)}")
        wanted = None if name is None else table[name]
        wanted = (wanted,) if isinstance(wanted, str) else tuple(wanted or ())
        wanted = tuple(axis for axis in wanted if axis in free)
        over = math.prod(free[axis] for axis in wanted)
        if size % over:
            failed.append((name, size, over))
        while size % math.prod(free[axis] for axis in wanted):
            wanted = wanted[:-1]
        parts.append(wanted if len(wanted) != 1 else wanted[0])
    used = [axis for part in parts for axis in ((part,) if isinstance(part, str) else part)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} would use a mesh axis twice: {parts}")
    return PartitionSpec(*(part or None for part in parts)), failed


def shardings(
    axes: Tree, shapes: Tree, mesh: Mesh | AbstractMesh, rules: Rules = RULES
) -> tuple[Tree, list[Replicated]]:
    """The NamedSharding of every leaf, and the dimensions that do not divide. ValueError as for `spec`."""
    failed: list[Replicated] = []

    def one(path, names, leaf):
        where = "/".join(str(getattr(key, "key", key)) for key in path)
        try:
            made, bad = spec(names, leaf.shape, mesh, rules)
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from problem
        failed.extend(Replicated(where, *rest) for rest in bad)
        return NamedSharding(mesh, made)

    is_axes = lambda x: isinstance(x, tuple)
    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=is_axes), failed


def batch_shardings(batch: Mapping[str, Any], mesh: Mesh | AbstractMesh, lead: int = 0) -> dict[str, NamedSharding]:
    """Rows over data, fsdp and expert; `lead` dimensions before them (micro-batches) stay whole. ValueError if rows do
    not divide."""
    made = {}
    for name, array in batch.items():
        axes = (*(None,) * lead, "batch", *(None,) * (len(array.shape) - lead - 1))
        made_spec, failed = spec(axes, array.shape, mesh)
        if failed:
            _, size, over = failed[0]
            raise ValueError(f"batch {name!r}: {size} rows do not divide over {over} devices (data x fsdp x expert)")
        made[name] = NamedSharding(mesh, made_spec)
    return made
