"""Learning-rate schedules: the multiplier of the learning rate at every optimizer step, as transformers defines them.

All warm up linearly from 0, so that the first of several warm-up updates changes nothing. transformers' cosine rises
again past the last step; these stay at their last value.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """name: one of NAMES. steps: optimizer updates in all. warmup: of them, how many the rate rises.

    cycles: of the cosine; 0.5 falls once (cosine), 1 also (cosine_with_restarts). end: what a polynomial or cosine
    decay ends at, as a share of the learning rate. decay: the steps of the final fall of warmup_stable_decay.
    timescale: of inverse_sqrt, default the warm-up.
    """

    name: str = "linear"
    steps: int = 0
    warmup: int = 0
    cycles: float | None = None
    power: float = 1.0
    end: float = 0.0
    decay: int = 0
    timescale: int | None = None

    def __post_init__(self):
        if self.name not in _SHAPES:
            raise ValueError(f"unknown schedule {self.name!r}; there are {', '.join(_SHAPES)}")
        if self.steps < 1 or not 0 <= self.warmup <= self.steps:
            raise ValueError(f"steps={self.steps} warmup={self.warmup}: expected 0 <= warmup <= steps, steps >= 1")
        if not 0 <= self.end < 1:
            raise ValueError(f"end={self.end}: expected a share of the learning rate, 0 <= end < 1")
        for name in ("warmup", "cycles", "power", "end", "decay", "timescale"):
            if getattr(self, name) != getattr(Schedule, name) and name not in _USES[self.name]:
                hint = ": constant_with_warmup has" if name == "warmup" else ""
                raise ValueError(f"{name}={getattr(self, name)}: the schedule {self.name} has none{hint}")
        if self.name == "warmup_stable_decay" and not self.decay:
            raise ValueError("warmup_stable_decay needs decay: for how many steps the rate falls at the end")
        if self.warmup + self.decay > self.steps:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} do not fit steps={self.steps}")

    def __call__(self, step: Array | int) -> Array:
        """float32 multiplier for the update after `step` others."""
        step = jnp.minimum(jnp.asarray(step, jnp.float32), self.steps)
        shape = _SHAPES[self.name](self, step)
        if self.name == "constant":
            return shape
        return jnp.where(step < self.warmup, step / max(1, self.warmup), shape)

    def progress(self, step: Array) -> Array:
        """0 at the end of the warm-up, 1 at the last step."""
        return (step - self.warmup) / max(1, self.steps - self.warmup)


def _constant(s: Schedule, step: Array) -> Array:
    return jnp.ones_like(step)


def _linear(s: Schedule, step: Array) -> Array:
    return jnp.maximum(0.0, (s.steps - step) / max(1, s.steps - s.warmup))


def _cosine(s: Schedule, step: Array) -> Array:
    cycles = 0.5 if s.cycles is None else s.cycles
    falling = jnp.maximum(0.0, 0.5 * (1 + jnp.cos(jnp.pi * 2 * cycles * s.progress(step))))
    return s.end + (1 - s.end) * falling


def _cosine_with_restarts(s: Schedule, step: Array) -> Array:
    cycles, progress = 1 if s.cycles is None else s.cycles, s.progress(step)
    falling = jnp.maximum(0.0, 0.5 * (1 + jnp.cos(jnp.pi * ((cycles * progress) % 1.0))))
    return jnp.where(progress >= 1, 0.0, falling)


def _polynomial(s: Schedule, step: Array) -> Array:
    left = 1 - s.progress(step)
    return s.end + (1 - s.end) * jnp.maximum(left, 0.0) ** s.power


def _inverse_sqrt(s: Schedule, step: Array) -> Array:
    timescale = s.timescale or s.warmup or 10_000
    return 1 / jnp.sqrt(jnp.maximum(step + timescale - s.warmup, 1) / timescale)


def _warmup_stable_decay(s: Schedule, step: Array) -> Array:
    fall = jnp.clip((s.steps - step) / max(1, s.decay), 0, 1)
    return s.end + (1 - s.end) * fall


_SHAPES: dict[str, Callable[[Schedule, Array], Array]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
    # Its factor is set from outside, after evaluations (step.TrainState.lr_scale).
    "reduce_on_plateau": _constant,
}
_USES = {
    "constant": set(),
    "constant_with_warmup": {"warmup"},
    "linear": {"warmup"},
    "cosine": {"warmup", "cycles", "end"},
    "cosine_with_restarts": {"warmup", "cycles"},
    "polynomial": {"warmup", "power", "end"},
    "inverse_sqrt": {"warmup", "timescale"},
    "warmup_stable_decay": {"warmup", "decay", "end"},
    "reduce_on_plateau": {"warmup"},
}
NAMES = tuple(_SHAPES)
