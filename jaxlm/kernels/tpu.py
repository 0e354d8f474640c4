"""What the TPU kernels share: how they split over a mesh, how operands are laid out, and constants."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

LOG2E = math.log2(math.e)
HIDDEN = -(2**31)  # the segment of keys that nobody sees
# Which axes a product sums over.
NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))
VMEM_BYTES = 16 * 2**20  # the whole of the smallest chip's
BATCH_AXES, HEAD_AXES = ("data", "fsdp", "expert"), ("tensor",)  # mesh axes that split batch and heads


def shard(function, arrays: dict[str, Array], results: tuple[str, ...], by_head: tuple[str, ...] = ()) -> Any:
    """function(arrays, batch axes) over the mesh in force: Mosaic kernels cannot be partitioned automatically.

    Axes are told by rank: BTNH, BTN, BT, N. Of the arrays in by_head the first axis is query heads, or 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = [] if mesh.empty else [a for a in mesh.axis_names if a not in mesh.manual_axes and mesh.shape[a] > 1]
    if not free:
        return function(arrays, ())
    batch = tuple(a for a in BATCH_AXES if a in free)
    heads = tuple(a for a in HEAD_AXES if a in free)
    for what, size, axes in (
        ("examples", arrays["q"].shape[0], batch),
        ("query heads", arrays["q"].shape[2], heads),
        ("key-value heads", arrays["k"].shape[2], heads),
    ):
        ways = math.prod(mesh.shape[a] for a in axes)
        if size % ways:
            raise ValueError(f"{what} {size} do not split over the mesh axes {axes} of {ways} devices")
    specs = {4: P(batch or None, None, heads or None), 3: P(batch or None, None, heads or None), 2: P(batch or None)}
    specs |= {1: P(heads or None)}
    rank = {name: x.ndim for name, x in arrays.items()} | {"lse": 3}
    own = {name: P(heads or None) if arrays[name].shape[0] > 1 else P() for name in by_head}
    return jax.shard_map(
        functools.partial(function, batch_axes=batch),
        mesh=mesh,
        in_specs=({name: specs[x.ndim] for name, x in arrays.items()} | own,),
        out_specs=tuple(specs[rank[name]] for name in results),
        axis_names=frozenset(mesh.axis_names) - frozenset(mesh.manual_axes),
        check_vma=False,
    )(arrays)


def segment_arrays(q_segments, k_segments, k_valid, sizes, padded):
    """Segments as a row of queries [B, 1, T] and a column of keys [B, S, 1]; keys that are not valid are HIDDEN."""
    (b, t, s), (tq, ts) = sizes, padded
    q_segments = jnp.zeros((b, t), jnp.int32) if q_segments is None else q_segments
    k_segments = jnp.zeros((b, s), jnp.int32) if k_segments is None else k_segments
    k_segments = k_segments if k_valid is None else jnp.where(k_valid, k_segments, HIDDEN)
    row = jnp.pad(jnp.broadcast_to(q_segments, (b, t)), ((0, 0), (0, tq - t)))
    column = jnp.pad(jnp.broadcast_to(k_segments, (b, s)), ((0, 0), (0, ts - s)), constant_values=HIDDEN)
    return {"q_segments": row[:, None].astype(jnp.int32), "k_segments": column[:, :, None].astype(jnp.int32)}


def heads_first(x, length):
    """BTNH to BNTH, zeros up to the length."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def lane_rows(x, length, fill):
    """[B, T, N] to [B, N, 1, T]: a row of lanes."""
    padded = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)), constant_values=fill)
    return padded.swapaxes(1, 2)[:, :, None].astype(jnp.float32)


def round_up(x: int, step: int) -> int:
    return -(-x // step) * step
