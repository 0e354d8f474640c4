"""The recurrence on TPU: what its kernels take, how arrays are laid out for them, and their gradient."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.kernels import recurrence_tpu_kernels as kernels
from jaxlm.kernels.recurrence_tpu_kernels import Tile
from jaxlm.kernels.tpu import VMEM_BYTES, round_up, shard

CHUNK = 64
LANES = 128
WIDTHS = (64, 128, 256)
FORGETS = -1e4  # as a log_w it leaves nothing, and unlike -inf can be multiplied by 0
BY_TOKEN = ("r", "k", "v", "log_w", "a", "b")


@dataclasses.dataclass(frozen=True)
class Static:
    """What the kernels are made from: tokens of a chunk, and Pallas's interpreter for tests."""

    chunk: int
    interpret: Any = False


def refuses(shapes: dict[str, Any], chunk: int | None, platform: str) -> str | None:
    """Why the kernels cannot compute a call with arrays of these shapes and dtypes, or None."""
    r, v = shapes["r"], shapes["v"]
    dtypes = {shapes[name].dtype for name in BY_TOKEN if name in shapes and name != "log_w"}
    if platform != "tpu":
        return f"needs a TPU, the platform is {platform!r}"
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"computes in bfloat16 or float32 throughout, got {', '.join(sorted(map(str, dtypes)))}"
    if r.shape[3] not in WIDTHS or v.shape[3] not in WIDTHS:
        return f"needs keys and values as wide as one of {WIDTHS}, got {r.shape[3]} and {v.shape[3]}"
    if chunk is not None and chunk not in (16, 32, 64, 128):
        return f"computes 16, 32, 64 or 128 tokens at once, got {chunk}"
    heads = tile_heads(r.shape[3], v.shape[3])
    ways = head_ways()
    if r.shape[2] % (heads * ways):
        return (
            f"computes {heads} heads of {r.shape[3]} keys at once, which do not divide {r.shape[2]} over {ways} devices"
        )
    return None


def tile_heads(keys: int, values: int) -> int:
    """How many heads fill whole lanes, of keys and of values."""
    return math.lcm(LANES // math.gcd(LANES, keys), LANES // math.gcd(LANES, values))


def head_ways() -> int:
    """Over how many devices the mesh in force splits heads."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty or "tensor" in mesh.manual_axes else mesh.shape.get("tensor", 1)


def recurrence_tpu(arrays: dict[str, Array], chunk: int | None = None, interpret: Any = False) -> tuple[Array, Array]:
    """As recurrence.serial, of arrays that `refuses` does not; differentiable.

    Runs under the mesh in force: batch over its axes data, fsdp and expert, heads over tensor.
    """
    given, length = dict(arrays), arrays["v"].shape[1]
    static = Static(chunk or min(CHUNK, max(16, 1 << (length - 1).bit_length())), interpret)
    keys = given["r"].shape
    given["log_w"] = jnp.broadcast_to(jnp.maximum(given["log_w"], FORGETS), keys)
    given["state"] = given["state"].astype(jnp.float32).transpose(0, 3, 1, 2)  # [B, V, H, K]
    resets = given.pop("resets", None)
    out, state = _recur(given, resets, static)
    return out, state.transpose(0, 2, 3, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _recur(arrays: dict[str, Array], resets: Array | None, static: Static) -> tuple[Array, Array]:
    return _sharded(functools.partial(_forward, static=static, keep=False), arrays, resets, ("v", "state"))


def _recur_forward(arrays, resets, static):
    run = functools.partial(_forward, static=static, keep=True)
    out, state, kept = _sharded(run, arrays, resets, ("v", "state", "state"))
    return (out, state), (arrays, resets, kept)


def _recur_backward(static, saved, gradients):
    arrays, resets, kept = saved
    smooth = tuple(name for name in (*BY_TOKEN, "bonus", "state") if name in arrays)
    run = functools.partial(_backward, static=static, smooth=smooth)
    d_out, d_last = gradients
    grads = _sharded(run, arrays | {"kept": kept, "d_out": d_out, "d_last": d_last}, resets, smooth)
    found = dict(zip(smooth, grads, strict=True))
    if "bonus" in found:  # of each example
        found["bonus"] = found["bonus"].sum((0, 1)).astype(arrays["bonus"].dtype)
    return found, None


_recur.defvjp(_recur_forward, _recur_backward)


def _sharded(run, arrays, resets, results):
    """run(arrays, batch_axes) of one device's part. `shard` knows r as q, and bonus as if it had batch and tokens."""
    arrays = {"q" if name == "r" else name: x for name, x in arrays.items()}
    if (bonus := arrays.get("bonus")) is not None:
        arrays["bonus"] = jnp.broadcast_to(bonus.astype(jnp.float32), (arrays["q"].shape[0], 1, *bonus.shape))
    if resets is not None:
        arrays["resets"] = resets
    return shard(run, arrays, tuple("q" if name == "r" else name for name in results))


def _lanes(arrays: dict[str, Array], static: Static) -> tuple[dict[str, Array], Tile, int]:
    """Arrays [B, T, H, K] as [B, tokens, H * K] of whole chunks, the tile, and how many chunks there are."""
    given = {"r" if name == "q" else name: x for name, x in arrays.items()}
    (_, length, _, keys), values = given["r"].shape, given["v"].shape[3]
    tile = Tile(static.chunk, tile_heads(keys, values), keys, values)
    padded = round_up(length, tile.tokens)
    if "resets" in given:
        resets = jnp.pad(given.pop("resets"), ((0, 0), (0, padded - length)))
        counts = jnp.cumsum(resets.reshape(-1, padded // tile.tokens, 1, tile.tokens), -1)
        given["segments"] = jnp.tile(counts.astype(jnp.float32), (1, 1, 1, tile.heads))
    for name in (*BY_TOKEN, "d_out"):
        if name in given:
            given[name] = jnp.pad(given[name], ((0, 0), (0, padded - length), (0, 0), (0, 0)))
    flat = {name: x.reshape(*x.shape[:2], -1) if name != "segments" else x for name, x in given.items()}
    flat["sums"] = jnp.asarray(kernels.summing(tile.tokens), jnp.bfloat16)
    return flat, tile, padded // tile.tokens


def _spec(name: str, tile: Tile, at) -> pl.BlockSpec:
    """The block of a step of the grid (example, heads, chunk); `at` says which chunk a step has."""
    keys, values = tile.heads * tile.keys, tile.heads * tile.values
    if name in ("v", "d_out", "out"):
        return pl.BlockSpec((None, tile.tokens, values), lambda b, h, n: (b, at(n), h))
    if name in BY_TOKEN:
        return pl.BlockSpec((None, tile.tokens, keys), lambda b, h, n: (b, at(n), h))
    if name == "kept":  # [B, chunks, V, H * K]
        return pl.BlockSpec((None, None, tile.values, keys), lambda b, h, n: (b, at(n), 0, h))
    if name == "segments":
        return pl.BlockSpec((None, None, 1, tile.heads * tile.tokens), lambda b, h, n: (b, at(n), 0, 0))
    if name == "sums":
        return pl.BlockSpec(((tile.levels() + 2) * tile.tokens, tile.tokens), lambda b, h, n: (0, 0))
    rows = 1 if name == "bonus" else tile.values
    return pl.BlockSpec((None, rows, keys), lambda b, h, n: (b, 0, h))  # bonus and states


def _call(kernel, flat, results: dict[str, Any], tile: Tile, count: int, at, static: Static, flops: int):
    batch, _, width = flat["r"].shape
    names = tuple(sorted(flat))
    kind = lambda name: {"last": "state", "first": "state"}.get(name, name)
    moved = sum(x.size * x.dtype.itemsize for x in (*flat.values(), *results.values()))
    return pl.pallas_call(
        functools.partial(kernel, tile=tile, names=names),
        grid=(batch, width // (tile.heads * tile.keys), count),
        in_specs=[_spec(kind(name), tile, at) for name in names],
        out_specs=[_spec(kind(name), tile, at) for name in results],
        out_shape=list(results.values()),
        scratch_shapes=[pltpu.VMEM((tile.heads * tile.values, tile.heads * tile.keys), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops, transcendentals=(tile.levels() + 4) * flat["r"].size, bytes_accessed=moved
        ),
        interpret=static.interpret,
        name=kernel.func.__name__.removesuffix("_kernel") + "_recurrence",
    )(*(flat[name] for name in names))


def _forward(arrays, batch_axes, *, static: Static, keep: bool):
    flat, tile, count = _lanes(arrays, static)
    (batch, length, heads, _), shape = arrays["v"].shape, flat["v"].shape
    results = {
        "out": jax.ShapeDtypeStruct(shape, flat["v"].dtype),
        "last": jax.ShapeDtypeStruct(flat["state"].shape, jnp.float32),
    }
    if keep:
        results["kept"] = jax.ShapeDtypeStruct((batch, count, *flat["state"].shape[1:]), jnp.float32)
    kernel = functools.partial(kernels.forward_kernel, keep=keep)
    out, last, *kept = _call(kernel, flat, results, tile, count, lambda n: n, static, _flops(flat, tile))
    out, last = out[:, :length].reshape(batch, length, heads, -1), last.reshape(arrays["state"].shape)
    # Kept states [B, chunks, V, H * K], for `shard` as [B, chunks * V, H, K].
    return out, last, *(x.reshape(batch, -1, heads, tile.keys) for x in kept)


def _backward(arrays, batch_axes, *, static: Static, smooth: tuple[str, ...]):
    arrays = dict(arrays)
    kept = arrays.pop("kept")
    flat, tile, count = _lanes(arrays, static)
    batch, length, heads, _ = arrays["v"].shape
    del flat["state"]
    flat["kept"] = kept.reshape(batch, count, tile.values, -1)
    by_token = tuple(name for name in smooth if name != "state")
    results = {name: jax.ShapeDtypeStruct(flat[name].shape, flat[name].dtype) for name in by_token}
    results["first"] = jax.ShapeDtypeStruct(flat["d_last"].shape, jnp.float32)
    kernel = functools.partial(kernels.backward_kernel, smooth=by_token)
    grads = _call(kernel, flat, results, tile, count, lambda n: count - 1 - n, static, 3 * _flops(flat, tile))
    grads = [g if name in ("bonus", "state") else g[:, :length] for name, g in zip(smooth, grads, strict=True)]
    return tuple(g.reshape(*g.shape[:2], heads, -1) for g in grads)


def _flops(flat, tile: Tile) -> int:
    """Of the products that the recurrence needs, each token with half of its chunk; not of those that are masked."""
    batch, length, width = flat["r"].shape
    kinds = 2 if "a" in flat else 1
    pairs = kinds * tile.tokens * (kinds * tile.keys + tile.values)
    return batch * length * (width // tile.keys) * (pairs + 4 * kinds * tile.keys * tile.values)
