"""Sums over the devices of a mesh axis of which each keeps a part."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxlm.parallel.sharding import sizes, spec


def rows_over(shape: tuple[int, ...]) -> tuple[P, tuple[str, ...]]:
    """How the first two axes, batch and length, of an array lie on the mesh in force, and the mesh axes of that."""
    if not sizes():
        return P(None, None), ()
    laid, _ = spec(("batch", "length"), shape[:2], jax.sharding.get_abstract_mesh())
    return laid, tuple(axis for part in laid for axis in ((part,) if isinstance(part, str) else part or ()))


def sum_rows(product: Callable[..., Array], arrays: tuple[Array, ...], dim: int) -> Array:
    """product(*arrays), which sums over batch and length, the first axes of every array.

    Where fsdp cuts the rows and dimension `dim` of the result, every device sums its own rows, and then each gets its
    part of the sum of all: the partitioner would have each get all. It does the rest: over data, whose layout is
    ZeRO's, and within a pipeline's stage, where it fails on a region of ours inside of another.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        return product(*arrays)
    laid, over = rows_over(arrays[0].shape)
    shape = jax.eval_shape(product, *arrays).shape
    if "fsdp" not in over or "data" in over or dim < 0 or shape[dim] % sizes()["fsdp"]:
        return product(*arrays)
    rest = tuple(axis for axis in over if axis != "fsdp")

    def local(*arrays):
        found = sum_scatter(product(*arrays), "fsdp", dim)
        return jax.lax.psum(found, rest) if rest else found

    out = P(*("fsdp" if i == dim else None for i in range(len(shape))))
    return jax.shard_map(
        local, in_specs=(laid,) * len(arrays), out_specs=out, axis_names=set(over), check_vma=False
    )(*arrays)  # fmt: skip


def sum_scatter(x: Array, axis: str, dim: int) -> Array:
    """Inside of shard_map: x summed over `axis`, cut along `dim`, which the axis divides; as lax.psum_scatter, tiled.

    TPU compilers make one reduce-scatter over a ring or a plane of the torus, but over all of its dimensions they sum
    everything everywhere and slice: twice the bytes, and the whole sum in memory. So an axis over a cube or a square
    of devices is summed in two stages.
    """
    n = jax.lax.axis_size(axis)
    outer = stages(n)
    if outer == 1:
        return jax.lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    inner, before, after = n // outer, x.shape[:dim], x.shape[dim + 1 :]
    parts = x.reshape(*before, outer, inner, x.shape[dim] // n, *after)
    ids = np.arange(n).reshape(outer, inner)
    # The first stage deals by the place within a group of neighbours, the second by the group.
    for groups in (ids, ids.T):
        parts = jax.lax.psum_scatter(
            parts, axis, scatter_dimension=dim + (groups is ids), axis_index_groups=groups.tolist(), tiled=False
        )
    return parts


def stages(n: int) -> int:
    """Into how many groups of neighbours an axis of n devices falls: the side of a cube or of a square, 1 for none."""
    cube, square = round(n ** (1 / 3)), math.isqrt(n)
    if cube > 1 and cube**3 == n:
        return cube
    return square if square > 1 and square**2 == n else 1
