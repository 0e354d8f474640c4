"""The pipeline: that it is the loop over layers, how many steps it takes, what it keeps, and what it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder, stack
from jaxlm.models.decoder import REMAT
from jaxlm.models.stack import Layer
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.pipeline import Pipeline, deals
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


@pytest.mark.parametrize(("stages", "repeats", "m"), [(4, 2, 4), (4, 2, 6), (2, 3, 3), (2, 2, 2)])
def test_repeats_equal_the_loop_over_layers(stages, repeats, m):
    """With gradients, in chunks of two layers of one kind and stack, and one of another."""
    layers = (*(Layer("a", "one", "s"),) * 2, Layer("b", "two", "s")) * (stages * repeats)
    x, ct = jax.random.normal(jax.random.key(0), (2, 12, 3, 1))
    w = jnp.linspace(0.5, 1.5, len(layers))
    given = (jnp.arange(len(x)) / 7,)

    def block(kind, p, x, state, depth, given):
        y = jnp.sin(x) * p["w"] if kind == "a" else jnp.cos(x) + p["w"] * x
        return y + given[:, None, None] * (depth + 1) / 9, state, {"total": jnp.sin(x).sum(), kind: p["w"] * depth}

    def both(pipeline, w, x):
        params = {"one": {"w": w.reshape(-1, 3)[:, :2].ravel()}, "two": {"w": w[2::3]}}
        y, _, extras = pipeline(block, layers, params, x, given=given)
        return (y * ct).sum() + jnp.square(stack.collect(extras, "total")).sum(), extras

    def values(pipeline):
        loss = lambda w, x: both(pipeline, w, x)[0]
        found = {name: stack.collect(both(pipeline, w, x)[1], name) for name in ("total", "a", "b")}
        return jax.value_and_grad(loss, (0, 1))(w, x), found

    want = jax.jit(lambda: values(stack.run))()
    with jax.set_mesh(make_mesh(f"pipe={stages}", jax.devices()[:stages])):
        got = jax.jit(lambda: values(Pipeline(m, repeats)))()
    want = (want[0], want[1] | {name: m * want[1][name] for name in "ab"})  # summed over micro-batches
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()), got, want)


def test_deals_are_matchings():
    """In every round every device sends a chunk of its own and gets one; at the end all are where they belong."""
    for stages in range(1, 13):
        for repeats in range(1, 13):
            sent = deals(stages, repeats)
            assert sorted(sent.ravel()) == list(range(stages * repeats))
            assert (sent // repeats == np.arange(stages)).all()
            assert (np.sort(sent % stages) == np.arange(stages)).all(), (stages, repeats)


def test_every_micro_batch_draws_its_own_noise():
    with jax.set_mesh(make_mesh("pipe=2", jax.devices()[:2])):
        got, _ = jax.jit(lambda x, key: run(Pipeline(2), x, key, w=jnp.zeros(4)))(
            jnp.zeros((4, 1, 1)), jax.random.key(0)
        )
    noise = np.asarray(got[:, 0, 0]) - 4 * np.arange(4) / 7
    assert noise[0] == pytest.approx(noise[2], abs=1e-6) and abs(noise[0] - noise[1]) > 1e-3


def test_noise_is_the_same_whatever_the_repeats():
    """By micro-batch and depth."""

    def noise(kind, p, x, state, depth, key):
        return x + p["w"] * jax.random.normal(jax.random.fold_in(key, depth)), state, {}

    def drawn(repeats):
        w = 10.0 ** -jnp.arange(4)  # tells the layers apart
        function = lambda key: Pipeline(2, repeats)(noise, FOUR, {"": {"w": w}}, jnp.zeros((2, 1, 1)), given=(key,))[0]
        with jax.set_mesh(make_mesh("pipe=2", jax.devices()[:2])):
            return np.asarray(jax.jit(function)(jax.random.key(0))).ravel()

    np.testing.assert_allclose(drawn(2), drawn(1), rtol=1e-6)


def test_micro_batches_that_are_chosen():
    """The most that rows split into over the devices, up to four a stage."""
    shape = jax.ShapeDtypeStruct((24, 3, 1), jnp.float32)
    for preset, stages, m in (("pipe=4,data=2", 4, 12), ("pipe=2,fsdp=4", 2, 6), ("pipe=2,expert=2,data=2", 2, 6)):
        with jax.set_mesh(make_mesh(preset)):
            text = str(jax.make_jaxpr(lambda x: run(Pipeline(), x)[0])(shape))
        assert re.findall(r"length=(\d+)", text)[0] == str(m + stages - 1), preset


def scans(jaxpr):
    """Every scan of a jaxpr, the outermost first."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from scans(inner)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_steps_and_what_they_keep(repeats, remat):
    """P - 1 idle steps of a chunk, forward and backward, and no copy of any weight for every step."""
    stages, m, rows, width = 2, 4, 8, 5

    def block(kind, p, x, state, depth):
        return x + jnp.tanh(x @ p["w"].astype(x.dtype)), state, {}

    def loss(w, x):
        y, _, _ = Pipeline(m, repeats)(block, (Layer("a", "", "s"),) * 12, {"": {"w": w}}, x, remat=REMAT[remat])
        return y.astype(jnp.float32).sum()

    w, x = jnp.zeros((12, width, width)), jnp.zeros((rows, 3, width), jnp.bfloat16)
    with jax.set_mesh(make_mesh("pipe=2,data=2", jax.devices()[:4])):
        found = list(scans(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr))
    steps = repeats * m + stages - 1
    schedules = [eqn for eqn in found if eqn.params["length"] == steps]
    assert len(schedules) == 2
    for eqn in schedules:
        kept = [out.aval.shape for out in eqn.outvars if out.aval.shape[:1] == (steps,)]
        assert not [shape for shape in kept if shape[-2:] == (width, width)]


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("pipe=8", {}, "4 layers do not split over pipe=8"),
        ("pipe=2,data=4", {"pipeline": Pipeline(2), "rows": 4}, "4 rows do not split into 2 micro-batches over 4"),
        ("pipe=4,data=2", {"layers": (*FOUR[:3], Layer("b", "", "s"))}, "layer 0 of the first 1 is a, and layer 3 b"),
        ("pipe=4,data=2", {"pipeline": Pipeline(repeats=2)}, "4 layers do not split over pipe=4 with 2 repeats"),
        ("pipe=2,data=4", {"pipeline": Pipeline(1, 2)}, "repeats=2 over pipe=2 needs 2 micro-batches or more: 1 of 8"),
        (
            "pipe=2,data=4",
            {"pipeline": Pipeline(2, 2), "layers": (*FOUR[:2], *(Layer("b", "", "s"),) * 2)},
            "layer 0 of the first 1 is a, and layer 2 b",
        ),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [({"repeats": 0}, "repeats=0: expected 1 or more"), ({"microbatches": -1}, "microbatches=-1: expected 1 or more")],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(**options)


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
