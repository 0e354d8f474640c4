"""What is learnt, as pure functions (variables, batch, rng) -> (sum, weight, metrics).

variables: {"params": the model's, "adapters": optional, "task": the head of a task, optional}. A batch has tokens
[B, T]; targets or labels; and, where sequences are packed or padded, segments (0 is padding) and positions.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.models.decoder import Runtime
from jaxlm.train.losses import IGNORE, CrossEntropy, cross_entropy
from jaxlm.train.step import Batch, Loss, Metrics, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What all objectives share. neftune: noise alpha on the embeddings (arXiv 2310.05914); router: weight of the
    load-balancing loss of mixture-of-experts layers."""

    backbone: ModuleType
    config: Any
    runtime: Runtime = dataclasses.field(default_factory=Runtime)
    neftune: float = 0.0
    router: float = 0.0
    smoothing: float = 0.0
    z: float = 0.0
    chunk: int = 0

    def hidden(self, variables: Tree, batch: Batch, rng: Array | None) -> tuple[Array, Metrics]:
        """The trunk's output [B, T, D], and its aux. Without an rng there is no dropout and no noise."""
        tokens, positions, segments = batch["tokens"], batch.get("positions"), batch.get("segments")
        valid = None if segments is None else segments > 0
        inner, noise = (None, None) if rng is None else jax.random.split(rng)
        params, adapters = variables["params"], variables.get("adapters")
        options: dict[str, Any] = {"positions": positions, "rng": inner, "runtime": self.runtime}
        if adapters is not None:
            options["adapters"] = adapters
        x = self.backbone.embed(self.config, params, tokens, **options)
        if self.neftune and noise is not None:
            size = self.neftune / (x.shape[1] * x.shape[2]) ** 0.5
            x = x + jax.random.uniform(noise, x.shape, x.dtype, -size, size)
        hidden, _, aux = self.backbone.trunk(self.config, params, x, segments=segments, valid=valid, **options)
        return hidden, aux

    def add_router(self, total: Array, weight: Array, aux: Metrics, metrics: Metrics) -> tuple[Array, Array, Metrics]:
        """With the router's loss, weighted like everything else by the targets of its batch, and what it dropped."""
        if self.runtime.expert_capacity is not None and "router_dropped" in aux:
            metrics = metrics | {"router_dropped": aux["router_dropped"] * weight}
        if not self.router or "router_loss" not in aux:
            return total, weight, metrics
        balance = aux["router_loss"] * weight
        return total + self.router * balance, weight, metrics | {"router_loss": balance}


def causal_lm(objective: Objective) -> Loss:
    """Predicts targets [B, T]; -100 is no target; `weights` [B, T] of a batch weigh its targets."""
    c = objective.config
    spec = CrossEntropy(
        smoothing=objective.smoothing,
        z=objective.z,
        chunk=objective.chunk,
        scale=c.logit_scale,
        softcap=c.logit_softcap,
    )

    def loss(variables: Tree, batch: Batch, rng: Array | None):
        hidden, aux = objective.hidden(variables, batch, rng)
        params, targets = variables["params"], batch["targets"]
        table = params["embed" if c.tie_embeddings else "head"]["w"]
        weights = (targets != IGNORE).astype(jnp.float32)
        if "weights" in batch:
            weights = weights * batch["weights"]
        result: Any = cross_entropy(spec, hidden, table, targets, weights)  # custom_vjp hides the type
        total, sums = result
        metrics = {"nll": sums["nll"], "accuracy": sums["correct"]}
        return objective.add_router(total, weights.sum(), aux, metrics)

    return loss
