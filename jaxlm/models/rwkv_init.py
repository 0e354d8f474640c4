"""How RWKV's parameters start: as the published training code has it, with normal matrices for orthogonal ones.

Many start as a curve over the channels that changes with the depth, which may be traced. Each function gives an
initializer (key, shape, dtype) -> array. Sources: RWKV-LM (Apache-2.0), RWKV-v4neo, v5 and v7.
"""

import math

import jax
import jax.numpy as jnp

from jaxlm.models.rwkv_config import RwkvConfig

ZEROS = jax.nn.initializers.zeros
SMALL = lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -0.01, 0.01)
EMBED_STD = 1e-4 / math.sqrt(3)

# The power of a channel's place that a blend starts as.
_TIME = {
    4: {"k": 1, "v": 1, "r": 0.5},
    5: {"k": 1, "v": 1, "r": 0.5, "g": 0.5},
    6: {"x": 1, "w": 1, "k": 1, "v": 1, "r": 0.5, "g": 0.5},
    7: {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2},
}


def std(c: RwkvConfig) -> float:
    """Of the matrices that do not start at zero, and of the head."""
    return 0.5 * c.d_model**-0.5


def constant(value: float):
    return jax.nn.initializers.constant(value)


def time_mix(c: RwkvConfig, depth, name: str):
    """The share of this token (to version 5) or of the one before (from 6)."""
    curve = _place(c.d_model, 0) ** (_TIME[int(c.version)][name] * _left(c, depth))
    curve = curve + 0.3 * _done(c, depth) if name == "v" and c.version < 7 else curve
    return _fixed(curve if c.version < 6 else 1 - curve)


def channel_mix(c: RwkvConfig, depth, name: str):
    curve = _place(c.d_model, 0) ** (_left(c, depth) ** (4 if c.version == 7 else 1))
    return _fixed(curve if c.version < 6 else 1 - curve)


def decay(c: RwkvConfig, depth):
    """The logarithm of minus the logarithm of the decay: slow channels first."""
    place = _place(c.heads if c.version in (5.0, 5.1) else c.d_attn)
    power = 0.7 + 1.3 * _done(c, depth)
    return _fixed(-5 + 8 * place**power if c.version == 4 else -6 + 5 * place**power)


def bonus(c: RwkvConfig, depth):
    """Of the present token; its logarithm in version 4, and where it is stored so."""
    n = c.heads if c.version in (5.0, 5.1) else c.d_attn
    zigzag = (jnp.arange(n) + 1) % 3 - 1
    if c.version == 4 or c.log_bonus:
        return _fixed(math.log(0.3) + 0.5 * zigzag)
    return _fixed(_done(c, depth) * (1 - _place(n)) + 0.1 * zigzag)


def norm(c: RwkvConfig, depth):
    """The scale of the norm of the heads."""
    grown = ((depth + 1) / c.n_layers) ** 0.7
    return lambda key, shape, dtype=jnp.float32: jnp.full(shape, grown, dtype)


def bias(c: RwkvConfig, depth, name: str):
    """What version 7 adds to a product of low rank: of the decay w, the rate a, the share v of the first values."""
    middle = (c.head_dim - 1) / 2 or 1
    zigzag = (jnp.arange(c.d_attn) % c.head_dim - middle) / middle
    zigzag, line = zigzag * jnp.abs(zigzag), _place(c.d_attn) - 0.5
    curve = -6 + 6 * _place(c.d_attn) ** (1 + _done(c, depth) ** 0.3)
    curves = {"w": curve + 0.5 + 2.5 * zigzag, "a": -0.19 + 0.3 * zigzag + 0.4 * line, "v": 0.73 - 0.4 * line}
    return _fixed(curves[name])


def removal(c: RwkvConfig):
    return _fixed(0.71 - 0.1 * (_place(c.d_attn) - 0.5))


def _place(n: int, last: int = 1):
    """0 at the first of n channels; 1 at the last, or (last=0) just beyond it."""
    return jnp.arange(n) / max(n - last, 1)


def _done(c: RwkvConfig, depth):
    """The share of the layers that lie before: 0 to 1."""
    return depth / max(c.n_layers - 1, 1)


def _left(c: RwkvConfig, depth):
    """1 to nearly 0."""
    return 1 - depth / c.n_layers


def _fixed(array):
    return lambda key, shape, dtype=jnp.float32: array.astype(dtype).reshape(shape)
