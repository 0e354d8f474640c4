"""Leaves: the modules that own a weight. Linen names and declares parameters here, and does nothing else.

Axes, in the whole library: B batch, T query length, S key length, D model, N query heads, K key-value heads,
G = N // K, H head dim, F ffn, V vocab, L layers, E experts, M tokens of a batch in one row.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.kernels.call import precision
from jaxlm.models.adapters import adapted
from jaxlm.models.config import NormConfig
from jaxlm.parallel.reduce import sum_rows

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Leaf(nn.Module):
    """A module that declares weights with their logical axes, and reads them back as given."""

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init) -> Array:
        """The weight: made while initialising, otherwise looked up and checked.

        Not `self.param` when applying: linen would compare the stored value with what `init` makes, which refuses
        quantized weights and local shards.
        """
        if self.is_initializing():
            made: Any = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
            return made
        value = self.get_variable("params", name)
        if value is None:
            raise ValueError(f"parameter {'/'.join((*self.path, name))} is missing")
        if value.shape != shape:
            raise ValueError(f"parameter {'/'.join((*self.path, name))} has shape {value.shape}, expected {shape}")
        return value


class Einsum(Leaf):
    """y = einsum(eqn, x, w) + b: the one place where an activation meets a weight. Computes in x's dtype.

    A low-rank pair of the `adapters` collection is added before the bias (adapters.py). Axes of w come inputs first.
    """

    eqn: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    bias: str | None = None  # the letters of w that the bias has; None for no bias
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w = self.weight("w", self.shape, self.axes, jax.nn.initializers.normal(self.std))
        y = contract(self.eqn, x, w)
        if "a" in self.variables.get("adapters", ()):
            y = adapted(x, w, y, self.variables["adapters"])
        if self.bias is None:
            return y
        letters = self.eqn.split(",")[1].split("->")[0]
        dims = [letters.index(c) for c in self.bias]
        shape, axes = tuple(self.shape[i] for i in dims), tuple(self.axes[i] for i in dims)
        return y + self.weight("b", shape, axes, jax.nn.initializers.zeros).astype(y.dtype)


class Matrices(Leaf):
    """One matrix for each expert, [E, in, out]."""

    shape: tuple[int, int, int]
    axes: tuple[str | None, ...]
    std: float = 0.02

    @nn.compact
    def __call__(self) -> Array:
        if "a" in self.variables.get("adapters", ()):
            raise NotImplementedError(f"adapters for {'/'.join(self.path)}: experts take none")
        return self.weight("w", self.shape, self.axes, jax.nn.initializers.normal(self.std))


class Norm(Leaf):
    """RMS or layer norm over the trailing `size` dims, in float32, returned in x's dtype."""

    config: NormConfig
    size: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kind, axis = self.config.kind, tuple(range(-len(self.size), 0))
        axes = (None,) * len(self.size)
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        scale = self.weight("scale", self.size, axes, zeros if kind == "rms1p" else ones).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        if kind == "layer":
            x32 = x32 - x32.mean(axis, keepdims=True)
        # The sum over the reciprocal: XLA's mean would do the same division once per element.
        variance = jnp.square(x32).sum(axis, keepdims=True) / math.prod(self.size)
        y = x32 * jax.lax.rsqrt(variance + self.config.eps)
        y = y * (1 + scale if kind == "rms1p" else scale)
        if kind == "layer":
            y = y + self.weight("bias", self.size, axes, zeros).astype(jnp.float32)
        return y.astype(x.dtype)


class Embed(Leaf):
    """Rows of a table [V, D], and its use as an output head."""

    shape: tuple[int, int]
    axes: tuple[str | None, ...] = ("vocab", "embed")
    std: float = 0.02

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        return self.table()[tokens]

    @nn.compact
    def logits(self, x: Array) -> Array:
        """x [B, T, D] times the table, float32 [B, T, V]."""
        return contract("BTD,VD->BTV", x, self.table(), out=jnp.float32)

    def table(self) -> Array:
        return self.weight("w", self.shape, self.axes, jax.nn.initializers.normal(self.std))


_REDUCE = contextvars.ContextVar("dtype of the gradients of weights", default="float32")


@contextlib.contextmanager
def reducing_in(dtype: str) -> Iterator[None]:
    """Gradients of weights used in here are made, and so summed over devices, in this dtype."""
    token = _REDUCE.set(dtype)
    try:
        yield
    finally:
        _REDUCE.reset(token)


def contract(eqn: str, x: Array, w: Array, out=None) -> Array:
    """einsum in x's dtype with float32 accumulation; the result in `out`, by default x's dtype."""
    if eqn == "BTNH,NHD->BTD":  # contracting one axis instead of two: XLA on CPU copies the weight for two
        eqn, x, w = "BTF,FD->BTD", x.reshape(*x.shape[:2], -1), w.reshape(-1, w.shape[-1])
    result: Any = _contract(eqn, _REDUCE.get(), jnp.dtype(out or x.dtype), jnp.dtype(w.dtype), x, w)
    return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _contract(eqn: str, reduce: str, out, stored, x: Array, w: Array) -> Array:
    """The derivative of jnp.einsum would round the gradient of w to x's dtype, between the product and the sum over
    devices, and take its cotangents to float32, whose products are slow."""
    return _product(eqn, x, w.astype(x.dtype), x.dtype, jnp.float32).astype(out)


def _contract_forward(eqn, reduce, out, stored, x, w):
    w = w.astype(x.dtype)
    return _product(eqn, x, w, x.dtype, jnp.float32).astype(out), (x, w)


def _contract_backward(eqn, reduce, out, stored, residuals, g):
    (x, w), (of_x, of_w, of_y) = residuals, eqn.replace("->", ",").split(",")
    dx = _product(f"{of_y},{of_w}->{of_x}", g, w, x.dtype, jnp.float32).astype(x.dtype)

    def of_weight(x: Array, g: Array) -> Array:
        eqn = f"{of_x},{of_y}->{of_w}"
        if of_x.startswith("BT"):  # as one axis: XLA on CPU copies x, transposed, to sum over two
            eqn, x, g = eqn.replace("BT", "B"), *(a.reshape(-1, *a.shape[2:]) for a in (x, g))
        return _product(eqn, x, g, x.dtype, jnp.dtype(reduce))

    made = sum_rows(of_weight, (x, g), of_w.find("D")) if of_x.startswith("BT") else of_weight(x, g)
    return dx, made.astype(stored)


_contract.defvjp(_contract_forward, _contract_backward)


def _product(eqn: str, a: Array, b: Array, dtype, made) -> Array:
    """einsum of operands of this dtype, the sums in dtype `made`."""
    return jnp.einsum(eqn, a, b, precision=precision(dtype), preferred_element_type=made)


def dropout(x: Array, rate: float, rng: Array | None) -> Array:
    """Inverted dropout; without an rng, or at rate 0, x itself."""
    if rng is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(rng, 1 - rate, x.shape), x / (1 - rate), 0)
