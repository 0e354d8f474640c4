"""What implementations of attention share: the call they judge, visibility, dropout's draws, and precision."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry_2x32

from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.masks import Mask


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of `attention` as an implementation judges it, before anything runs."""

    q: jax.ShapeDtypeStruct  # BTNH
    k: jax.ShapeDtypeStruct  # BSKH
    v: jax.ShapeDtypeStruct  # BSKD
    mask: Mask | BlockTable
    given: frozenset[str] = frozenset()  # names of the keyword arguments of `attention` that are not None
    platform: str = "cpu"  # cpu, gpu or tpu
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU
    return_lse: bool = False


def call_of(q, k, v, mask, given=(), return_lse=False, platform: str | None = None) -> Call:
    """The Call of these arrays on the platform that will run it."""
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    if platform is None:
        platform, capability = device()
    else:
        capability = None
    return Call(shape(q), shape(k), shape(v), mask, frozenset(given), platform, capability, return_lse)


def device() -> tuple[str, tuple[int, int] | None]:
    """Platform and capability: of the mesh that is set, which may be of chips that are not here, or the default's."""
    of_mesh: Any = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if of_mesh is None else of_mesh.platform
    platform = "gpu" if platform in ("cuda", "rocm") else platform
    if platform != "gpu" or jax.default_backend() != "gpu":
        return platform, None
    numbers = str(getattr(jax.devices()[0], "compute_capability", None)).split(".")
    major_minor = len(numbers) == 2 and "".join(numbers).isdigit()  # ROCm devices say something else
    return platform, (int(numbers[0]), int(numbers[1])) if major_minor else None


def precision(dtype) -> jax.lax.Precision:
    """float32 means float32: the default on TPU and recent GPUs would round the operands to bfloat16 or TF32.

    Others say DEFAULT, for None is what the user's configuration says, and Mosaic refuses more of bfloat16.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def visible(
    mask: Mask | BlockTable, q_pos, k_pos, q_segments=None, k_segments: Any = None, k_valid: Any = None
) -> Array:
    """[..., T, S] bool from arrays [..., T] of queries and [..., S] of keys, whose leading axes broadcast.

    The mask over positions, minus other segments, hidden keys and empty slots. Of a BlockTable only the latter: what it
    lists is not a question of positions.
    """
    q, k = q_pos[..., :, None], k_pos[..., None, :]
    seen = (k >= 0) & (q == q)
    if isinstance(mask, Mask):
        seen = seen & mask(q, k)
    if q_segments is not None:
        seen = seen & (q_segments[..., :, None] == k_segments[..., None, :])
    if k_valid is not None:
        seen = seen & k_valid[..., None, :]
    return seen


def repeat_heads(q: Array, k: Array, v: Array, ways: int) -> tuple[Array, Array]:
    """k and v, their heads repeated until `ways` devices get as many each, if query heads still share them evenly."""
    heads = math.lcm(k.shape[2], ways)
    times = heads // k.shape[2] if q.shape[2] % heads == 0 else 1
    return (k, v) if times == 1 else (jnp.repeat(k, times, axis=2), jnp.repeat(v, times, axis=2))


def varying_zero(arrays: dict[str, Array]) -> Any:
    """0; inside of shard_map an int32 array that varies over every manual axis that one of the arrays varies over.

    What a loop carries must vary from the start over the axes over which it will in the end; added to it, this says so.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return 0
    ones = [x.ravel()[0] for x in arrays.values() if x.size]
    return sum((x != x).astype(jnp.int32) for x in ones) * 0


def vary_alike(arrays: dict[str, Array]) -> dict[str, Array]:
    """The arrays, inside of shard_map all varying over the same manual axes."""
    zero = varying_zero(arrays)
    if isinstance(zero, int):
        return arrays
    return {name: x | (zero > 0) if x.dtype == bool else x + zero.astype(x.dtype) for name, x in arrays.items()}


def dropout_seed(key) -> Array:
    """uint32 [2] from a key of any generator: what `kept` draws from."""
    return jax.random.bits(key, (2,), jnp.uint32)


def kept(seed: Array, rate: float, rows, columns) -> Array:
    """bool, rows x columns broadcast: the probabilities that dropout keeps.

    A row is (b * N + n) * T + t, a column a key. Each draw hashes its own row and column, so that any tile of any
    implementation, forward or backward, finds the draws it needs and no other.
    """
    rows, columns = jnp.broadcast_arrays(rows, columns)
    counts = jnp.concatenate([rows.ravel(), columns.ravel()]).astype(jnp.uint32)
    bits = threefry_2x32((seed[0], seed[1]), counts)[: rows.size].reshape(rows.shape)
    return bits >= np.uint32(min(round(rate * 2.0**32), 2**32 - 1))
