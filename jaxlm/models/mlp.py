"""The dense feed-forward branch."""

import flax.linen as nn
from jax import Array

from jaxlm.models.config import MlpConfig
from jaxlm.models.layers import ACTIVATIONS, Einsum


class Mlp(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) when not gated."""

    config: MlpConfig
    d_model: int
    std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        widen = lambda name: Einsum(
            "BTD,DF->BTF", (self.d_model, c.d_ff), ("embed", "mlp"), "F" if c.bias else None, self.std, name=name
        )(x)
        act = ACTIVATIONS[c.act]
        h = act(widen("gate")) * widen("up") if c.gated else act(widen("up"))
        return Einsum(
            "BTF,FD->BTD", (c.d_ff, self.d_model), ("mlp", "embed"), "D" if c.bias else None, self.std, name="down"
        )(h)
