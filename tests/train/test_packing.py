"""Packing does not leak: an example's loss is what it is alone, whatever its neighbours are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.pipeline import Batches
from jaxlm.models import decoder
from jaxlm.models.registry import family
from jaxlm.train.objectives import Objective, causal_lm
from tests.data.tiny import cache
from tests.parallel.test_sharding import CONFIG

WINDOWED = CONFIG | {"model_type": "mistral", "sliding_window": 5}
LENGTHS = (13, 3, 7, 9, 2, 11, 6, 8, 5)


@pytest.fixture(scope="module", params=[CONFIG, WINDOWED], ids=["llama", "windowed mistral"])
def model(request):
    config = family(request.param["model_type"]).config(request.param)
    params = decoder.init(dataclasses.replace(config, init_std=0.3), jax.random.key(0))
    return config, {"params": params}


def examples(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 61, n) for n in LENGTHS]


def test_every_example_has_its_own_loss(model, tmp_path):
    config, variables = model
    loss = jax.jit(causal_lm(Objective(backbone=decoder, config=config)))
    made = examples()
    packed = Batches(cache(tmp_path / "packed", made), 1, 24, shuffle=False)
    seen = 0
    for step in range(packed.steps_per_epoch):
        batch = packed[step]
        for segment in range(1, int(batch["segments"].max()) + 1):
            inside = batch["segments"] == segment
            tokens = batch["tokens"][inside]
            index = next(i for i, ids in enumerate(made) if np.array_equal(ids, tokens))
            one = batch | {"targets": np.where(inside, batch["targets"], -100)}
            together, weight, _ = loss(variables, one, None)
            ids = made[index]
            padded = np.zeros((1, 24), np.int32)
            padded[0, : len(ids)] = ids
            targets = np.full((1, 24), -100, np.int32)
            targets[0, : len(ids) - 1] = ids[1:]
            alone, count, _ = loss(variables, {"tokens": padded, "targets": targets}, None)
            assert weight == count == len(ids) - 1
            np.testing.assert_allclose(together, alone, rtol=1e-5)
            seen += 1
    assert seen == len(LENGTHS)


def test_a_neighbour_changes_nothing(model):
    config, variables = model
    tokens = np.concatenate(examples()[:3])[None]
    segments = np.repeat([1, 2, 3], LENGTHS[:3])[None]
    positions = np.concatenate([np.arange(n) for n in LENGTHS[:3]])[None]
    segments, positions = jnp.array(segments), jnp.array(positions)
    run = jax.jit(lambda t: decoder.forward(config, variables["params"], t, segments=segments, positions=positions)[0])
    changed = np.where(segments == 2, tokens, (tokens + 7) % 61)
    before, after = np.asarray(run(tokens)), np.asarray(run(changed))
    np.testing.assert_array_equal(before[segments == 2], after[segments == 2])
    assert (before[segments != 2] != after[segments != 2]).any()
