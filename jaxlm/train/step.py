"""One optimizer update as a pure function: gradients summed over micro-batches, divided once, clipped, applied.

Everything stays on the device: overflow, NaN and the loss scale are handled by selection, and metrics are arrays that
nobody waits for.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxlm.train.optimizer import Optimizer
from jaxlm.train.partition import merge, split
from jaxlm.train.scaler import LossScale

Tree = Any
Batch = dict[str, Array]
Metrics = dict[str, Array]
Loss = Callable[[Tree, Batch, Array | None], tuple[Array, Array, Metrics]]
"""(variables, batch, rng) -> (sum, weight, metrics): float32 scalars; metrics are sums over the same weights."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "trainable", "frozen", "optimizer", "key", "scale", "lr_scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes. trainable and frozen are the variables, each None where the other has the leaf;
    optimizer is optax's state; step counts updates asked for; lr_scale multiplies updates (reduce_on_plateau)."""

    step: Array
    trainable: Tree
    frozen: Tree
    optimizer: Tree
    key: Array
    scale: LossScale | None
    lr_scale: Array

    @property
    def variables(self) -> Tree:
        return merge(self.trainable, self.frozen)


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Shardings of the gradients: `summed`, while they are summed over micro-batches; `used`, in the update."""

    summed: Tree
    used: Tree


def init_state(
    variables: Tree,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    trainable: Sequence[str] = ("*",),
    scale: LossScale | None = None,
) -> TrainState:
    """A state at step 0; `trainable` are patterns of paths. Frozen leaves get no optimizer state."""
    train, frozen = split(variables, trainable)
    return TrainState(
        jnp.int32(0), train, frozen, optimizer.init(train), key, scale, jnp.float32(1)
    )  # fmt: skip


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    settings: Optimizer,
    *,
    clip: float | None = 1.0,
    shardings: TrainState | None = None,
    gradients: Gradients | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted update; the state's buffers are donated. shardings and gradients: where on a mesh they lie; what lies
    in host memory visits the device.

    A batch whose arrays are [A, B, ...] is accumulated over its A micro-batches; their losses and weights are summed
    and divided once, so that every target counts the same however targets fall into micro-batches. clip is the
    greatest global norm of the gradient, None for no limit. An update with a gradient that is not finite is skipped:
    parameters, optimizer and schedule stay as they are.
    """

    summed, used = (None, None) if gradients is None else (gradients.summed, gradients.used)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        variables = on_device((state.trainable, state.frozen))
        state = dataclasses.replace(state, trainable=variables[0], frozen=variables[1])
        key, use = jax.random.split(state.key)
        total, weight, found, grads = _gradients(loss, state, batch, use, summed)
        grads = _laid_out(grads, used)
        norm = optax.tree.norm(grads)
        state = dataclasses.replace(state, optimizer=on_device(state.optimizer, once=norm))
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        if clip is not None:
            shrink = jnp.minimum(1.0, jnp.asarray(clip) / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        # Laid out like the moments, so that what each device gathers is the new parameters and nothing else.
        before = _laid_out(state.trainable, used)

        def update(trainable: Tree, moments: Tree) -> tuple[Tree, Tree]:
            updates, moments = optimizer.update(grads, moments, trainable)
            updates = jax.tree.map(lambda u: u * state.lr_scale.astype(u.dtype), updates)
            return optax.apply_updates(trainable, updates), moments

        # A branch and not a selection: to select, XLA on CPU copies all moments when a step begins (four times slower).
        trainable, moments = jax.lax.cond(finite, update, lambda *kept: kept, before, state.optimizer)
        after = dataclasses.replace(
            state,
            step=state.step + 1,
            trainable=_laid_out(trainable, used),
            optimizer=moments,
            key=key,
            scale=state.scale.update(finite) if state.scale else None,
        )
        metrics = jax.tree.map(lambda value: value / weight, found)
        metrics |= {
            "loss": total / weight,
            "weight": weight,
            "grad_norm": norm,
            "skipped": 1 - finite.astype(jnp.float32),
            "learning_rate": settings.rate * settings.schedule(_count(state.optimizer)) * state.lr_scale,
        }
        if state.scale:
            metrics["loss_scale"] = state.scale.scale
        return after, metrics

    placed: dict[str, Any] = {"out_shardings": (shardings, None)} if shardings is not None else {}
    return jax.jit(step, donate_argnums=0, **placed)


def make_eval_step(loss: Loss) -> Callable[[TrainState, Batch], Metrics]:
    """Sums of a batch [B, ...], not yet divided: {"loss", "weight", ...the objective's metrics}."""

    def step(state: TrainState, batch: Batch) -> Metrics:
        total, weight, metrics = loss(on_device(state.variables), batch, None)  # type: ignore[arg-type]
        return metrics | {"loss": total, "weight": weight}

    return jax.jit(step)


def on_device(tree: Tree, once: Array | None = None) -> Tree:
    """The arrays, those in host memory brought to the devices, where alone something can be computed.

    once: when this is known, and not before: moments are of no use until the gradients are there.
    """

    def one(x: Array) -> Array:
        if jax.typeof(x).memory_space != jax.memory.Space.Host:
            return x
        if once is not None:
            x, _ = jax.lax.optimization_barrier((x, once))
        return jax.device_put(x, jax.memory.Space.Device)

    return jax.tree.map(one, tree)


def _laid_out(tree: Tree, shardings: Tree | None) -> Tree:
    return tree if shardings is None else jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)


def _gradients(loss: Loss, state: TrainState, batch: Batch, key: Array, shardings: Tree | None):
    """Sums of loss, weight and metrics, and the float32 gradient of their quotient."""
    scale = state.scale.scale if state.scale else jnp.float32(1)

    def scaled(trainable: Tree, micro: Batch, rng: Array):
        total, weight, metrics = loss(merge(trainable, state.frozen), micro, rng)
        # Scaled per target, so that the size of a batch does not bring float16 nearer to its limits.
        return total * (scale / jnp.maximum(weight, 1)), (total, weight, metrics)

    def one(micro: Batch, rng: Array):
        (_, (total, weight, metrics)), grads = jax.value_and_grad(scaled, has_aux=True)(state.trainable, micro, rng)
        back = jnp.maximum(weight, 1) / scale
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        return total, weight, metrics, jax.tree.map(lambda g: g * back, _laid_out(grads, shardings))

    if batch["tokens"].ndim == 2:
        sums = one(batch, key)
    else:
        shapes = jax.eval_shape(one, jax.tree.map(lambda a: a[0], batch), key)
        start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        start = (*start[:3], _laid_out(start[3], shardings))
        add = lambda carry, new: (jax.tree.map(jnp.add, carry, new), None)
        n = batch["tokens"].shape[0]
        sums, _ = jax.lax.scan(
            lambda carry, x: add(carry, one(x[0], jax.random.fold_in(key, x[1]))), start, (batch, jnp.arange(n))
        )
    total, weight, metrics, grads = sums
    weight = jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
    return total, weight, metrics, jax.tree.map(lambda g: g / weight, grads)


def _count(optimizer: Tree) -> Array:
    """How many updates the optimizer has made: what its schedule goes by."""
    return optax.tree_utils.tree_get_all_with_path(optimizer, "count")[0][1]
