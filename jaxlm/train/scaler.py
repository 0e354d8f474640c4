"""Loss scaling for float16, as DeepSpeed does it: a pytree, so that overflow is handled on the device."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """scale multiplies the loss. After `window` good updates in a row it doubles and the tolerance is refilled; an
    overflow first uses up the tolerance, then halves it, down to `least` (deepspeed/runtime/fp16/loss_scaler.py)."""

    scale: Array
    good: Array  # updates in a row without overflow
    patience: Array  # overflows left before the scale halves
    window: int = dataclasses.field(default=1000, metadata={"static": True})
    hysteresis: int = dataclasses.field(default=2, metadata={"static": True})
    least: float = dataclasses.field(default=1.0, metadata={"static": True})

    def update(self, finite: Array) -> "LossScale":
        """The scale after an update whose gradients were finite, or not."""
        halve = ~finite & (self.patience <= 1)
        full = finite & ((self.good + 1) % self.window == 0)
        scale = jnp.where(halve, jnp.maximum(self.scale / 2, self.least), self.scale)
        return dataclasses.replace(
            self,
            scale=jnp.where(full, scale * 2, scale),
            good=jnp.where(finite, self.good + 1, 0),
            patience=jnp.where(full, self.hysteresis, jnp.where(finite | halve, self.patience, self.patience - 1)),
        )


def loss_scale(initial: float = 2.0**16, **settings) -> LossScale:
    """A fresh scale; settings are window, hysteresis and least."""
    made = LossScale(jnp.float32(initial), jnp.int32(0), jnp.int32(2), **settings)
    return dataclasses.replace(made, patience=jnp.int32(made.hysteresis))
