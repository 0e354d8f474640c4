"""The training step as an abstract program, for plans: the real step over shapes alone."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import Family
from jaxlm.parallel.flops import flops_of
from jaxlm.parallel.pipeline import Pipeline
from jaxlm.parallel.plan import Program, place
from jaxlm.parallel.sharding import batch_shardings
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.placement import gradient_shardings, state_shardings
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import TrainState, init_state, make_train_step

FIELDS = ("tokens", "targets", "segments", "positions")  # of a packed batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained: `batch` rows of `seq` packed tokens over all devices, float32 weights, computed in `precision`
    under a remat policy; over the axis pipe, by a pipeline of these microbatches and repeats."""

    family: Family
    config: Any
    batch: int
    seq: int
    remat: str = "full"
    precision: str = "bfloat16"
    attention: str | None = None
    optimizer: str = "adamw"
    microbatches: int = 0
    repeats: int = 1

    def objective(self, remat: str | None = None) -> Objective:
        runtime = Runtime(
            dtype=self.precision,
            attention=self.attention,
            remat=remat or self.remat,
            layers=Pipeline(self.microbatches, self.repeats),
        )
        return Objective(backbone=self.family.backbone, config=self.config, runtime=runtime)

    def abstract(self) -> tuple[Any, Optimizer, TrainState, dict[str, jax.ShapeDtypeStruct]]:
        """The optimizer, its settings, and the shapes of state and batch."""
        settings = Optimizer(name=self.optimizer, rate=1e-4, schedule=Schedule(name="constant", steps=1), decay=0.1)
        backbone = self.family.backbone
        optimizer = settings.make({"params": backbone.logical_axes(self.config)})
        made = lambda key: init_state({"params": backbone.init(self.config, key)}, optimizer, key)
        state = jax.eval_shape(made, jax.random.key(0))
        batch = {name: jax.ShapeDtypeStruct((self.batch, self.seq), jnp.int32) for name in FIELDS}
        return optimizer, settings, state, batch

    def program(self, mesh: Mesh | AbstractMesh) -> Program:
        """The step that trains, its arguments laid out over the mesh."""
        optimizer, settings, state, batch = self.abstract()
        axes = {"params": self.family.backbone.logical_axes(self.config)}
        placed, _ = state_shardings(state, axes, optimizer, mesh)
        # Without devices nothing is compiled, and the step is traced as for one.
        gradients = gradient_shardings(state, axes, mesh) if isinstance(mesh, Mesh) else None
        state, batch = place(state, placed), place(batch, batch_shardings(batch, mesh))
        step = make_train_step(
            causal_lm(self.objective()), optimizer, settings, clip=1.0, shardings=placed, gradients=gradients
        )  # fmt: skip
        kinds = {
            "parameters": state.trainable,
            "optimizer": state.optimizer,
            "batch": batch,
        }
        return Program("train step", step, (state, batch), kinds, self.model_flops(), self.batch * self.seq)

    def model_flops(self) -> float:
        """Of one step over the whole batch, nothing computed twice; from one row, as rows cost alike."""
        _, _, state, batch = self.abstract()
        row = {name: jax.ShapeDtypeStruct((1, self.seq), a.dtype) for name, a in batch.items()}
        loss = causal_lm(self.objective("none"))
        gradient = jax.grad(lambda variables, batch: loss(variables, batch, None)[0])
        return flops_of(gradient, state.trainable, row).total * self.batch

    def activations(self) -> float:
        """Bytes that one row of the batch keeps for its backward pass."""
        _, _, state, batch = self.abstract()
        loss = causal_lm(self.objective())

        def kept(rows: int) -> int:
            some = {name: jax.ShapeDtypeStruct((rows, self.seq), a.dtype) for name, a in batch.items()}
            saved = lambda variables, batch: jax.vjp(lambda v: loss(v, batch, None)[0], variables)[1]
            leaves = jax.tree.leaves(jax.eval_shape(saved, state.trainable, some))
            return sum(math.prod(a.shape) * a.dtype.itemsize for a in leaves)

        return kept(2) - kept(1)  # what does not grow with the batch is weights
