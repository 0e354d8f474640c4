"""Training over data and fsdp on 8 devices: the losses and parameters of one device, and its bytes spread."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.models import decoder
from jaxlm.models.registry import family
from jaxlm.parallel import hosts
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.sharding import Replicated
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.placement import gradient_shardings, place_batch, state_shardings, within
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


def test_frozen_parameters_lie_as_those_that_train():
    """In host memory too; and what does not divide is listed, once, of frozen ones and of ZeRO's parts too."""
    width = {"fine": 16, "less": 12, "whole": 6, "frozen": 6}
    axes = {name: {"w": ("embed", "mlp")} for name in width}
    optimizer, mesh = (
        Optimizer(rate=1.0, schedule=Schedule(name="constant", steps=1)).make(),
        make_mesh("data=2,fsdp=4"),
    )
    start = lambda: init_state(
        {name: {"w": jnp.zeros((n, 2))} for name, n in width.items()}, optimizer, jax.random.key(0),
        trainable=("fine", "less", "whole"),
    )  # fmt: skip
    state, cut = jax.eval_shape(start), lambda name, over: Replicated(f"{name}/w", "embed", width[name], over)
    placed, whole = state_shardings(state, axes, optimizer, mesh, offload=("params",))
    assert whole == [cut("whole", 4), cut("frozen", 4)]
    assert {s.memory_kind for s in jax.tree.leaves((placed.trainable, placed.frozen))} == {"pinned_host"}
    assert {s.memory_kind for s in jax.tree.leaves(placed.optimizer)} == {"device"}
    _, whole = state_shardings(state, axes, optimizer, mesh, zero=1)
    assert whole == [cut("whole", 4), cut("frozen", 4), cut("less", 8), cut("whole", 8)]
    gradients = gradient_shardings(state, axes, mesh, 1)
    assert gradients.summed["fine"]["w"].spec == P("fsdp", None)
    assert gradients.used["fine"]["w"].spec == P(("fsdp", "data"), None)


def test_within_a_mesh():
    inside = lambda: dict(jax.sharding.get_abstract_mesh().shape)
    assert within(make_mesh("fsdp=8"), inside)()["fsdp"] == 8 and within(None, inside)() == {}


def test_the_rows_of_several_hosts(monkeypatch):
    """Each gives its own, and the whole shape."""
    monkeypatch.setattr(hosts, "share_of_rows", lambda mesh: (1, 4))
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda sharding, rows, shape: (rows.shape, shape))
    placed = place_batch({"tokens": np.zeros((3, 2, 5))}, make_mesh("fsdp=8"), lead=1)
    assert placed == {"tokens": ((3, 2, 5), (3, 8, 5))}
