"""The dense feed-forward branch."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from jaxlm.models.config import MlpConfig
from jaxlm.models.layers import ACTIVATIONS, Einsum
from jaxlm.parallel.sharding import constrain


class Mlp(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) when not gated."""

    config: MlpConfig
    d_model: int
    std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        widen = lambda name, width: Einsum(
            "BTD,DF->BTF", (self.d_model, width), ("embed", "mlp"), "F" if c.bias else None, self.std, name=name
        )(x)
        act = ACTIVATIONS[c.act]
        if "gate_up" in self.variables.get("params", ()):  # joined for decoding (view.py)
            gate, up = jnp.split(widen("gate_up", 2 * c.d_ff), 2, axis=-1)
            h = act(gate) * up
        else:
            h = act(widen("gate", c.d_ff)) * widen("up", c.d_ff) if c.gated else act(widen("up", c.d_ff))
        h = constrain(h, "batch", "length", "mlp")
        return Einsum(
            "BTF,FD->BTD", (c.d_ff, self.d_model), ("mlp", "embed"), "D" if c.bias else None, self.std, name="down"
        )(h)
