"""Optimizers from optax: by name, with a decay mask, a schedule and learning rates of their own for some parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.train.partition import by_path, check, decays, join, matches
from jaxlm.train.schedules import Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """name: one of NAMES. rate: the peak learning rate, which `schedule` multiplies.

    decay: decoupled weight decay of matrices. rates: ((pattern of paths, factor), ...), the first match counts.
    momentum is that of sgd. muon's updates have the size of Adam's (RMS 0.2), so that its rates carry over.
    """

    name: str = "adamw"
    rate: float = 5e-5
    schedule: Schedule
    decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    rates: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        if self.name not in _MAKE:
            raise ValueError(f"unknown optimizer {self.name!r}; there are {', '.join(_MAKE)}")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}: expected a learning rate above 0")
        for name in ("decay", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 <= {name} < 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 <= {name} < 1")
        for name in ("beta1", "beta2", "eps", "momentum"):
            if getattr(self, name) != getattr(Optimizer, name) and name not in _USES[self.name]:
                raise ValueError(f"{name}={getattr(self, name)}: {self.name} has none")

    def make(self, axes: Mapping[str, Any] | None = None) -> optax.GradientTransformation:
        """The optax transformation; `axes` are the logical axes of the variables, which muon needs."""
        rate = lambda step: self.rate * self.schedule(step)
        mask = lambda tree: by_path(tree, decays)
        made = _MAKE[self.name](self, rate, mask, axes)
        return optax.chain(made, _by_rate(self.rates)) if self.rates else made


def _by_rate(rates: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiplies updates by the factor of their path: every optimizer here is linear in its learning rate."""

    def factor(path: str) -> float:
        return next((f for pattern, f in rates if matches(path, [pattern])), 1.0)

    def init(params):
        check(params, [pattern for pattern, _ in rates], "rates")
        return optax.EmptyState()

    def update(updates, state, params=None):
        scaled = jax.tree_util.tree_map_with_path(lambda path, u: u * jnp.asarray(factor(join(path)), u.dtype), updates)
        return scaled, state

    return optax.GradientTransformation(init, update)


def _by_layer(made: optax.GradientTransformation) -> optax.GradientTransformation:
    """A stateless transformation that goes by the norm of a leaf, for each layer of a stack on its own."""

    def update(updates, state, params=None):
        alone = lambda u, p: made.update(u, state, p)[0]
        one = lambda path, u, p: (jax.vmap(alone) if "layers" in join(path).split("/") else alone)(u, p)
        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(made.init, update)


def _adamw(o: Optimizer, rate, mask, axes):
    return optax.adamw(rate, o.beta1, o.beta2, o.eps, weight_decay=o.decay, mask=mask)


def _lion(o: Optimizer, rate, mask, axes):
    return optax.lion(rate, o.beta1, o.beta2, weight_decay=o.decay, mask=mask)


def _lamb(o: Optimizer, rate, mask, axes):
    return optax.chain(
        optax.scale_by_adam(o.beta1, o.beta2, o.eps),
        optax.add_decayed_weights(o.decay, mask),
        _by_layer(optax.scale_by_trust_ratio()),
        optax.scale_by_learning_rate(rate),
    )


def _sgd(o: Optimizer, rate, mask, axes):
    decay = [optax.add_decayed_weights(o.decay, mask)] if o.decay else []
    return optax.chain(*decay, optax.sgd(rate, o.momentum or None))


def _adafactor(o: Optimizer, rate, mask, axes):
    # Decay is added apart: optax's own is not multiplied by the learning rate.
    decay = [_decoupled(rate, o.decay, mask)] if o.decay else []
    return optax.chain(
        optax.scale_by_factored_rms(epsilon=1e-30),
        _by_layer(optax.clip_by_block_rms(1.0)),
        optax.scale_by_learning_rate(rate),
        *decay,
    )


def _muon(o: Optimizer, rate, mask, axes):
    """Matrices of the layers by muon; embeddings, heads, norms and biases by Adam, as its authors advise."""
    if axes is None:
        raise ValueError("muon needs the logical axes of the parameters, to know each matrix's rows and columns")
    names = {join(path): tuple(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_axes)}
    dimensions = lambda tree: by_path(tree, lambda path: _matrix(path, names.get(path, ())))
    return optax.contrib.muon(
        rate, beta=0.95, adam_b1=o.beta1, adam_b2=o.beta2, weight_decay=o.decay, weight_decay_mask=mask,
        adam_weight_decay=o.decay, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2,
    )  # fmt: skip


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


def _matrix(path: str, axes: tuple[str | None, ...]) -> Any:
    """Which dims of a layer's weight are rows and columns of a matrix: "embed" on one side, the rest on the other."""
    batch = [i for i, name in enumerate(axes) if name in ("layers", "experts")]
    inner = [i for i in range(len(axes)) if i not in batch]
    embed = [i for i in inner if axes[i] == "embed"]
    if "layers" not in axes or path.rsplit("/", 1)[-1] != "w" or len(embed) != 1 or len(inner) < 2:
        return None
    rest = [i for i in inner if i != embed[0]]
    rows, columns = (embed, rest) if embed[0] < rest[0] else (rest, embed)
    return optax.contrib.MuonDimensionNumbers(tuple(rows), tuple(columns))


def _decoupled(rate: Callable, decay: float, mask) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        on = mask(params)
        shrink = lambda u, p, m: u - (rate(state) * decay * p).astype(u.dtype) if m else u
        return jax.tree.map(shrink, updates, params, on), state + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


_MAKE = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion, "sgd": _sgd, "lamb": _lamb, "muon": _muon}
_ADAM = {"beta1", "beta2", "eps"}
_USES: dict[str, set[str]] = {
    "adamw": _ADAM, "adafactor": set(), "lion": {"beta1", "beta2"}, "sgd": {"momentum"}, "lamb": _ADAM,
    "muon": {"beta1", "beta2"},
}  # fmt: skip
NAMES = tuple(_MAKE)
