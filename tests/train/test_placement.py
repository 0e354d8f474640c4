"""Training over data and fsdp on 8 devices: the losses and parameters of one device, and its bytes spread."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models.registry import family
from jaxlm.parallel.mesh import make_mesh
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.placement import place_batch, state_shardings
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import init_state, make_train_step
from tests.parallel.test_sharding import CONFIG


def run(preset: str | None, name: str = "adamw", accumulate: int = 1):
    config = family("llama").config(CONFIG)
    settings = Optimizer(name=name, rate=1e-2, schedule=Schedule(name="constant", steps=9), decay=0.1)
    optimizer = settings.make()
    values = {"params": decoder.init(dataclasses.replace(config, init_std=0.2), jax.random.key(0))}
    state = init_state(values, optimizer, jax.random.key(1))
    mesh = placed = None
    if preset:
        mesh = make_mesh(preset)
        placed, _ = state_shardings(state, {"params": decoder.logical_axes(config)}, optimizer, mesh)
        state = jax.device_put(state, placed)
    loss = causal_lm(Objective(backbone=decoder, config=config))
    step = make_train_step(loss, optimizer, settings, shardings=placed)
    losses = []
    for i in range(3):
        rng = np.random.default_rng(i)
        shape = (accumulate, 8, 6) if accumulate > 1 else (8, 6)
        tokens = rng.integers(0, 61, shape).astype(np.int32)
        targets = np.where(rng.uniform(size=shape) < 0.3, -100, tokens).astype(np.int32)
        batch = place_batch({"tokens": tokens, "targets": targets}, mesh, lead=int(accumulate > 1))
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def alone():
    return run(None)


@pytest.mark.parametrize(
    "preset",
    ["data=2,fsdp=4", *(pytest.param(p, marks=pytest.mark.slow) for p in ("data=8", "fsdp=8", "data=4,fsdp=2"))],
)
def test_equals_one_device(preset, alone):
    losses, state = run(preset)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(alone[1].trainable), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_accumulated_on_a_mesh():
    np.testing.assert_allclose(run("fsdp=8", accumulate=2)[0], run(None, accumulate=2)[0], rtol=1e-5)


def test_parameters_and_moments_are_spread():
    _, state = run("fsdp=8")
    local = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    whole = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    for tree in (state.trainable, state.optimizer):
        assert local(tree) / whole(tree) < 0.16  # an eighth, and the norms


@pytest.mark.slow
def test_factored_moments_stay_whole():
    losses, _ = run("fsdp=8", "adafactor")
    assert np.isfinite(losses).all()
