"""Sums over the devices of a mesh axis of which each keeps a part."""

import math

import jax
import numpy as np
from jax import Array


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
