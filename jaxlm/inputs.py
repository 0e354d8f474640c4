"""What the public functions accept: checked here, once, with an error that names the value and what was expected."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

DTYPES = ("float32", "bfloat16", "float16")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tokens(value: Any, config: Any, *, predicted: int = 0, virtual: int = 0) -> jax.Array:
    """int32 [B, T] within the vocabulary and the context; the last `predicted` ones need no place in the context, and
    `virtual` ones have taken some of it."""
    array = jnp.asarray(value)
    if array.ndim != 2 or 0 in array.shape or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T] with at least one token, got {array.dtype} {array.shape}")
    if array.shape[1] - predicted + virtual > config.max_context:
        beside = f" beside {virtual} virtual ones" if virtual else ""
        raise ValueError(f"{array.shape[1]} tokens{beside} do not fit the model's context of {config.max_context}")
    if not isinstance(array, Tracer):
        _check_vocabulary(np.asarray(array), config)
    return array.astype(jnp.int32)


def row(value: Any, config: Any) -> np.ndarray:
    """int32 [T], one prompt."""
    array = np.asarray(value)
    if array.size == 0:
        raise ValueError("a prompt is empty: it has no tokens")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"a prompt must be text or integers [T], got {array.dtype} {array.shape}")
    _check_vocabulary(array, config)
    return array.astype(np.int32)


def mask(value: Any, shape: tuple[int, ...]) -> jax.Array:
    """bool [B, T]; anything but 0 is a token."""
    array = jnp.asarray(value)
    if array.shape != shape:
        raise ValueError(f"attention_mask has shape {array.shape}, expected that of the tokens, {shape}")
    return array != 0


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not supported; supported: {', '.join(map(str, allowed))}")


def whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={value!r}: expected a whole number")


def positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number >= 1")


def _check_vocabulary(array: np.ndarray, config: Any) -> None:
    # An index out of range would be clamped silently by the embedding's gather.
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary 0..{config.vocab_size - 1}")
