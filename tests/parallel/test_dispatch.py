"""Experts with a capacity: what is dropped, by the definition, on one device and over a mesh."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models.decoder import Runtime
from jaxlm.models.dispatch import Dispatch, dispatch
from jaxlm.parallel.mesh import make_mesh
from tests.parallel.test_equality import batch, model

B, T, D, F, E, K = 8, 4, 6, 5, 4, 2
CAPACITY = 1.0


def case():
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (B, T, D))
    # Skewed, so that some experts are asked for much more than their share.
    weights, chosen = jax.lax.top_k(jax.random.uniform(keys[1], (B, T, E)) + jnp.array([0.6, 0.3, 0, 0]), K)
    shapes = {"up": (E, D, F), "gate": (E, D, F), "down": (E, F, D)}
    matrices = {name: jax.random.normal(k, s) for k, (name, s) in zip(keys[2:], shapes.items(), strict=True)}
    valid = jnp.arange(T)[None] < jnp.array([4, 4, 2, 4, 4, 3, 4, 1])[:, None]
    return x, weights, chosen, matrices, valid


def by_definition(x, weights, chosen, matrices, valid, devices: int):
    """Row by row: each device's tokens in order, first choices before second ones, until an expert is full."""
    out, dropped, length = np.zeros(x.shape), 0, x.shape[1]
    p = {name: np.asarray(w, np.float64) for name, w in matrices.items()}
    for own in np.split(np.arange(B), devices):
        left = np.full(E, int(np.ceil(CAPACITY * len(own) * length * K / E)))
        for k, b, t in itertools.product(range(K), own, range(length)):
            if not valid[b, t]:
                continue
            e = int(chosen[b, t, k])
            left[e] -= 1
            if left[e] < 0:
                dropped += 1
                continue
            row = np.asarray(x[b, t], np.float64)
            gate = row @ p["gate"][e]
            h = gate / (1 + np.exp(-gate)) * (row @ p["up"][e])
            out[b, t] += weights[b, t, k] * (h @ p["down"][e])
    return out, dropped


@pytest.mark.parametrize(
    ("preset", "rows", "lengths"),
    [
        (None, 1, 1),
        ("expert=2,fsdp=2,data=2", 8, 1),
        ("expert=4,sequence=2", 4, 2),
        ("tensor=2,expert=4", 4, 1),  # 5 features stay whole
    ],
)
def test_what_does_not_fit_is_dropped(preset, rows, lengths):
    """rows and lengths: how many ways those are cut."""
    x, weights, chosen, matrices, valid = case()
    how = Dispatch(E, jax.nn.silu, CAPACITY)
    with contextlib.nullcontext() if preset is None else jax.set_mesh(make_mesh(preset)):
        got, dropped = jax.jit(lambda *a: dispatch(*a[:4], how, a[4]))(x, weights, chosen, matrices, valid)
    pieces = [np.split(np.asarray(a), lengths, axis=1) for a in (x, weights, chosen, valid)]
    parts = [by_definition(x, w, c, matrices, v, rows) for x, w, c, v in zip(*pieces, strict=True)]
    np.testing.assert_allclose(got, np.concatenate([part for part, _ in parts], 1), rtol=1e-5, atol=1e-5)
    assert dropped == sum(count for _, count in parts) > 0


@pytest.mark.slow
def test_the_model_says_what_was_dropped():
    config, params = model("moe")
    tokens = batch()["tokens"]
    share = lambda capacity: decoder.forward(config, params, tokens, runtime=Runtime(expert_capacity=capacity))[2]
    assert 0.05 < share(0.5)["router_dropped"] < 0.95
    assert share(None)["router_dropped"] == share(4.0)["router_dropped"] == 0
    with pytest.raises(ValueError, match=r"expert_capacity=0\.0: expected a number above 0"):
        Runtime(expert_capacity=0.0)
