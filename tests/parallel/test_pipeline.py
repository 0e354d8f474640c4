"""The pipeline: what it refuses, and how many steps it takes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder, stack
from jaxlm.models.stack import Layer
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.pipeline import Pipeline
from tests.parallel.test_equality import PIPELINE, batch, model

FOUR = (Layer("a", "", "s"),) * 4


def add(kind, p, x, state, depth, given, key):
    """Everything that a layer may depend on, and a sum over rows beside the stream."""
    noise = jax.random.uniform(key) if key is not None else 0
    return jnp.sin(x) * p["w"] + given[:, None, None] * (depth + 1) + noise, state, {"total": x.sum()}


def run(pipeline, x, key=None, layers=FOUR, w=None, **options):
    """The stream, and each layer's sum."""
    params = {"": {"w": jnp.linspace(0.5, 1.5, len(layers)) if w is None else w}}
    x, _, extras = pipeline(add, layers, params, x, given=(jnp.arange(len(x)) / 7, key), **options)
    return x, stack.collect(extras, "total")


@pytest.mark.parametrize("m", [1, 2, 6])
def test_equals_the_loop_over_layers(m):
    x = jax.random.normal(jax.random.key(0), (6, 3, 1))
    want = run(stack.run, x)
    with jax.set_mesh(make_mesh("pipe=4", jax.devices()[:4])):
        got = jax.jit(lambda x: run(Pipeline(m), x))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, want)


def test_every_micro_batch_draws_its_own_noise():
    with jax.set_mesh(make_mesh("pipe=2", jax.devices()[:2])):
        got, _ = jax.jit(lambda x, key: run(Pipeline(2), x, key, w=jnp.zeros(4)))(
            jnp.zeros((4, 1, 1)), jax.random.key(0)
        )
    noise = np.asarray(got[:, 0, 0]) - 4 * np.arange(4) / 7
    assert noise[0] == pytest.approx(noise[2], abs=1e-6) and abs(noise[0] - noise[1]) > 1e-3


def test_micro_batches_that_are_chosen():
    """The most that rows split into over the devices, up to four a stage."""
    shape = jax.ShapeDtypeStruct((24, 3, 1), jnp.float32)
    for preset, stages, m in (("pipe=4,data=2", 4, 12), ("pipe=2,fsdp=4", 2, 6), ("pipe=2,expert=2,data=2", 2, 6)):
        with jax.set_mesh(make_mesh(preset)):
            text = str(jax.make_jaxpr(lambda x: run(Pipeline(), x)[0])(shape))
        assert re.findall(r"length=(\d+)", text)[0] == str(m + stages - 1), preset


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("pipe=8", {}, "4 layers do not split over pipe=8"),
        ("pipe=2,data=4", {"pipeline": Pipeline(2), "rows": 4}, "4 rows do not split into 2 micro-batches over 4"),
        ("pipe=4,data=2", {"layers": (*FOUR[:3], Layer("b", "", "s"))}, "layer 0 of the first is a, and of stage 3 b"),
        ("pipe=4,data=2", {"cache": {"s": ()}}, "keeps no cache"),
        ("pipe=4,data=2", {"w": (0, 0, 0, 0)}, "needs stacked parameters"),
    ],
)
def test_refusals(preset, options, message):
    pipeline, x = options.pop("pipeline", Pipeline()), jnp.zeros((options.pop("rows", 8), 3, 1))
    with jax.set_mesh(make_mesh(preset)), pytest.raises(ValueError, match=message):
        if isinstance(options.get("w"), tuple):
            pipeline(add, FOUR, {"": options["w"]}, x)
        else:
            run(pipeline, x, **options)


def test_taps_are_refused():
    config, params = model("dense")
    with pytest.raises(ValueError, match="not returned from a pipeline"):
        decoder.forward(config, params, batch()["tokens"], taps=("residual",), runtime=PIPELINE)


def test_without_the_axis_it_is_the_loop_over_layers():
    config, params = model("dense")
    tokens = batch()["tokens"][:1]
    want = decoder.forward(config, params, tokens)[0]
    np.testing.assert_array_equal(decoder.forward(config, params, tokens, runtime=PIPELINE)[0], want)
    assert dataclasses.replace(PIPELINE, layers=None) == decoder.Runtime()
