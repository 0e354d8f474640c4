"""cuDNN's fused attention through jax.nn, for the calls it computes exactly."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.kernels.call import Call
from jaxlm.kernels.masks import EVERYTHING, Band, Mask


def cudnn(q, k, v, mask, *, scale, return_lse=False, implementation="cudnn"):
    """Causal, causal window or full attention of float16 or bfloat16."""
    as_window = _as_causal_window(mask)
    if as_window is None or return_lse:
        raise NotImplementedError(f"cuDNN has no exact form of {mask} with {return_lse=}")
    causal, size = as_window
    call: Any = jax.nn.dot_product_attention  # its overloads want literal flags
    return call(q, k, v, scale=scale, is_causal=causal, local_window_size=size, implementation=implementation)


def refuses_cudnn(call: Call) -> str | None:
    """Why cuDNN cannot compute this exactly, or None."""
    if call.platform != "gpu":
        return f"needs an NVIDIA GPU, the platform is {call.platform!r}"
    if call.q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"computes in float16 or bfloat16, got {call.q.dtype}"
    if call.given:
        return f"has no {', '.join(sorted(call.given))}"
    if call.return_lse:
        return "returns a log-sum-exp rounded to the inputs' dtype and without its gradient"
    as_window = _as_causal_window(call.mask)
    if as_window is None:
        return f"has no exact form of {call.mask}"
    (t, s), size = (call.q.shape[1], call.k.shape[1]), as_window[1]
    if size is not None and t > s + size[0]:
        return f"is undefined where a query sees no key, as with {t} queries and {s} keys under {call.mask}"
    h, most = call.q.shape[-1], 256 if call.capability is not None and call.capability >= (9, 0) else 128
    if h % 8 or h > most or call.v.shape[-1] != h:
        return f"needs equal head dims, a multiple of 8 up to {most}, got {h} and {call.v.shape[-1]}"
    return None


def _as_causal_window(mask) -> tuple[bool, tuple[int, int] | None] | None:
    if isinstance(mask, Mask) and mask == EVERYTHING:
        return False, None
    match mask:
        case Band(lo=None, hi=None):
            return False, None
        case Band(lo=0, hi=None):
            return True, None
        case Band(lo=0, hi=int(hi)):
            return True, (hi, 0)
    return None
