"""Rotary position embeddings: frequency sets of every scaling rule, and the rotation.

The frequencies are computed once at trace time, in the order of float32 roundings of transformers'
modeling_rope_utils.py: at position 500 one unit in the last place of a frequency is already 3e-5 of angle.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

f32 = np.float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation of the first `dim` features of a head; `scaling` names the rule, the rest are its numbers."""

    theta: float
    dim: int
    interleaved: bool = False  # pairs (2i, 2i + 1) instead of (i, i + dim / 2)
    scaling: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    factor: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin
    original_context: int = 0  # positions the model was first trained on
    ramp: tuple[float, float] = (0.0, 0.0)  # llama3 (low, high) frequency factors; yarn (beta_fast, beta_slow)
    truncate: bool = True  # yarn: round the ends of the ramp
    short_factors: tuple[float, ...] = ()  # longrope
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"RoPE turns pairs of features: {self.dim} of a head is not an even number of them")
        if not (self.theta > 0 and self.factor > 0):
            raise ValueError(f"RoPE needs rope_theta and factor above 0, got {self.theta} and {self.factor}")
        for name, factors in (("short_factor", self.short_factors), ("long_factor", self.long_factors)):
            if self.scaling == "longrope" and len(factors) != self.dim // 2:
                raise ValueError(f"longrope's {name} has {len(factors)} numbers, expected {self.dim // 2}")

    @property
    def depends_on_length(self) -> bool:
        return self.scaling in ("dynamic", "longrope")

    def frequencies(self, length: int) -> np.ndarray:
        """float32 [dim / 2]; `length` is the number of positions of the whole call, used by dynamic and longrope."""
        return _SCALINGS[self.scaling](self, length)


def table(rope: Rope, positions: Array, length: int) -> tuple[Array, Array]:
    """cos and sin, float32 [B, T, dim / 2], for int positions [B, T]."""

    def made(positions: Array) -> tuple[Array, Array]:
        angles = positions[..., None].astype(jnp.float32) * rope.frequencies(length)
        return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor

    def once(positions: Array) -> tuple[Array, Array]:
        # XLA on CPU holds cos and sin for cheap and repeats them in every layer and head (a tenth of a prefill); it
        # does not look into a branch, nor see that this one is always taken.
        return jax.lax.cond(
            positions.ravel()[0] >= -1, made, lambda p: jax.tree.map(jnp.zeros_like, made(p)), positions
        )

    return jax.lax.platform_dependent(positions, cpu=once, default=made)


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotates the leading features of x [B, T, N, H] in float32; features beyond the table's pass through."""
    dim = 2 * cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned, rest = x[..., :dim].astype(jnp.float32), x[..., dim:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else jnp.split(turned, 2, axis=-1)
    ra, rb = a * cos - b * sin, b * cos + a * sin
    turned = jnp.stack([ra, rb], -1).reshape(turned.shape) if interleaved else jnp.concatenate([ra, rb], -1)
    return jnp.concatenate([turned.astype(x.dtype), rest], -1)


def _powers(theta: float, dim: int) -> np.ndarray:
    """theta ** (2i / dim), the exponent rounded to float32 first, as the reference does."""
    exponent = np.arange(0, dim, 2, dtype=f32) / f32(dim)
    return (np.float64(theta) ** exponent.astype(np.float64)).astype(f32)


def _default(r: Rope, length: int) -> np.ndarray:
    return f32(1) / _powers(r.theta, r.dim)


def _linear(r: Rope, length: int) -> np.ndarray:
    return _default(r, length) / f32(r.factor)


def _dynamic(r: Rope, length: int) -> np.ndarray:
    """NTK-aware: theta grows with the length beyond the trained context."""
    stretch = f32(r.factor) * f32(max(length, r.original_context)) / f32(r.original_context) - f32(r.factor - 1)
    theta = f32(r.theta) * f32(np.float64(stretch) ** (r.dim / (r.dim - 2)))
    return f32(1) / _powers(float(theta), r.dim)


def _llama3(r: Rope, length: int) -> np.ndarray:
    """Long wavelengths divided by the factor, short ones kept, a linear blend between (Llama 3.1)."""
    low, high = r.ramp
    freq = _default(r, length)
    wavelength = f32(1) / freq * f32(2 * math.pi)  # torch divides a number by a tensor through its reciprocal
    smooth = (f32(1) / wavelength * f32(r.original_context) - f32(low)) / f32(high - low)
    blend = (1 - smooth) * freq / f32(r.factor) + smooth * freq
    scaled = np.where(wavelength > r.original_context / low, freq / f32(r.factor), freq)
    medium = (wavelength >= r.original_context / high) & (wavelength <= r.original_context / low)
    return np.where(medium, blend, scaled).astype(f32)


def _yarn(r: Rope, length: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071), section 3.2: a ramp over dimensions between interpolation and extrapolation."""

    def dimension(rotations: float) -> float:
        return r.dim * math.log(r.original_context / (rotations * 2 * math.pi)) / (2 * math.log(r.theta))

    low, high = dimension(r.ramp[0]), dimension(r.ramp[1])
    if r.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(r.dim // 2, dtype=f32) - f32(low)) / f32(high - low), 0, 1)
    powers = _powers(r.theta, r.dim)
    keep = 1 - ramp
    return (f32(1) / (f32(r.factor) * powers) * (1 - keep) + f32(1) / powers * keep).astype(f32)


def _longrope(r: Rope, length: int) -> np.ndarray:
    """LongRoPE (arXiv 2402.13753): one searched divisor per dimension, another set beyond the trained context."""
    factors = r.long_factors if length > r.original_context else r.short_factors
    return f32(1) / (np.asarray(factors, f32) * _powers(r.theta, r.dim))


_SCALINGS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
