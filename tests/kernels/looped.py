"""A kernel with a loop, in a module that another process may import (see tests/aot.py)."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def loop_kernel(x, out, *, trips):
    out[...] = jnp.zeros_like(out)

    def body(i, _):
        out[...] += jnp.exp(x[pl.ds(i * 8, 8), :])

    jax.lax.fori_loop(0, trips, body, None)


def looped(x, *, trips, steps):
    return pl.pallas_call(
        functools.partial(loop_kernel, trips=trips),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        grid=(steps,),
        in_specs=[pl.BlockSpec((128, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
        name="looped",
    )(x)
