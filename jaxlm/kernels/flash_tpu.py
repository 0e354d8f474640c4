"""Flash attention on TPU: its entry, what it refuses, and its custom_vjp around the forward and backward kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from jaxlm.kernels import flash_tpu_bwd, flash_tpu_fwd
from jaxlm.kernels.call import Call
from jaxlm.kernels.flash_tpu_fwd import Blocks, Static
from jaxlm.kernels.masks import Mask
from jaxlm.kernels.tpu import HIDDEN, shard

FEATURES = frozenset({"q_segments", "k_segments", "k_valid", "softcap", "sinks"})


def flash_tpu(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Dv"],
    mask: Mask,
    *,
    scale: float,
    return_lse: bool = False,
    q_segments: Int[Array, "#B T"] | None = None,
    k_segments: Int[Array, "#B S"] | None = None,
    k_valid: Bool[Array, "#B S"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    interpret: Any = False,
    blocks: Blocks | None = None,
    backward_blocks: flash_tpu_bwd.Blocks | None = None,
) -> Any:
    """Attention as `attention` defines it: out BTND in q's dtype and, if asked, lse float32 BTN; differentiable.

    Runs under the mesh in force: batch over its axes data, fsdp and expert, heads over tensor; a size that they do not
    divide is a ValueError. interpret (True or pltpu.InterpretParams) and the blocks are for tests.
    """
    sign, scale = _above_zero(scale)
    arrays = _operands(sign * q, k, v, q_segments, k_segments, k_valid, sinks)
    both: Any = _attend(arrays, Static(mask, scale, softcap, interpret, blocks), backward_blocks)
    return both if return_lse else both[0]


def gradients_flash_tpu(
    q, k, v, mask, out, lse, d_out, d_lse, *, scale, q_segments=None, k_segments=None, k_valid=None, softcap=None,
    sinks=None, interpret=False,
):  # fmt: skip
    """As kernels.attention.gradients has it: probabilities follow from the log-sum-exp of all keys."""
    sign, scale = _above_zero(scale)
    arrays = _operands(sign * q, k, v, q_segments, k_segments, k_valid, sinks)
    (grads,) = _attend_backward(Static(mask, scale, softcap, interpret, None), None, (arrays, out, lse), (d_out, d_lse))
    return {name: grads[name] for name in ("k", "v", "sinks") if name in grads} | {"q": sign * grads["q"]}


def _above_zero(scale: float) -> tuple[int, float]:
    """The sign, or 0, to multiply queries by, and the scale then: the kernel takes the maximum before it scales."""
    return (1, float(scale)) if scale > 0 else (-1, float(-scale)) if scale else (0, 1.0)


def _operands(q, k, v, q_segments, k_segments, k_valid, sinks) -> dict[str, Array]:
    arrays, b = {"q": q, "k": k, "v": v}, q.shape[0]
    if q_segments is not None or k_valid is not None:
        keys = jnp.zeros((b, k.shape[1]), jnp.int32) if k_segments is None else k_segments
        keys = keys if k_valid is None else jnp.where(k_valid, keys, HIDDEN)
        queries = jnp.zeros((b, q.shape[1]), jnp.int32) if q_segments is None else q_segments
        arrays |= {name: jnp.broadcast_to(x, (b, x.shape[1])) for name, x in (("queries", queries), ("keys", keys))}
    if sinks is not None:
        arrays["sinks"] = sinks.astype(jnp.float32)
    return arrays


def refuses_flash_tpu(call: Call) -> str | None:
    """Why this kernel cannot compute the call, or None."""
    if call.platform != "tpu":
        return f"needs a TPU, the platform is {call.platform!r}"
    if not isinstance(call.mask, Mask):
        return "takes a Mask, not a BlockTable"
    if unknown := call.given - FEATURES:
        return f"has no {', '.join(sorted(unknown))}"
    dtypes = {x.dtype for x in (call.q, call.k, call.v)}
    if len(dtypes) > 1 or dtypes - {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"computes in bfloat16 or float32 throughout, got {', '.join(sorted(map(str, dtypes)))}"
    widths = call.q.shape[-1], call.v.shape[-1]
    if any(width % 8 or not 64 <= width <= 256 for width in widths):
        return f"needs head dims that are multiples of 8 from 64 to 256, got {widths[0]} and {widths[1]}"
    if call.mask.table_block:
        return f"needs a predicate of plain arithmetic, and {call.mask} looks up a table"
    return None


# The gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(arrays: dict[str, Array], static: Static, backward_blocks) -> tuple[Array, Array]:
    return shard(functools.partial(flash_tpu_fwd.forward, static=static), arrays, ("q", "lse"))


def _attend_forward(arrays, static, backward_blocks):
    both: Any = _attend(arrays, static, backward_blocks)
    return both, (arrays, *both)


def _attend_backward(static, backward_blocks, saved, gradients):
    arrays, out, lse = saved
    operands = arrays | {"out": out, "lse": lse, "dout": gradients[0], "dlse": gradients[1]}
    names = ("q", "k", "v", *(["sinks"] if "sinks" in arrays else []))
    grads = shard(functools.partial(_backward, static=static, blocks=backward_blocks), operands, names)
    zeros = {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in arrays.items() if name in ("queries", "keys")}
    return (dict(zip(names, grads, strict=True)) | zeros,)


_attend.defvjp(_attend_forward, _attend_backward)


def _backward(arrays, batch_axes, *, static, blocks):
    dq, dk, dv, dsinks = flash_tpu_bwd.backward(
        mask=static.mask,
        **{name: arrays[name] for name in ("q", "k", "v", "out", "lse", "dout", "dlse")},
        scale=static.scale,
        softcap=static.softcap,
        q_segments=arrays.get("queries"),
        k_segments=arrays.get("keys"),
        k_valid=None if "keys" not in arrays else arrays["keys"] != HIDDEN,
        sinks=arrays.get("sinks"),
        interpret=static.interpret,
        blocks=blocks,
    )
    if dsinks is None:
        return dq, dk, dv
    return dq, dk, dv, jax.lax.psum(dsinks, batch_axes) if batch_axes else dsinks
