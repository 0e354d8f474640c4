"""Attention over a cut sequence, around the ring and by heads, against the reference on whole arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import flash_tpu, xla
from jaxlm.kernels.attention import attention
from jaxlm.kernels.masks import CAUSAL, EVERYTHING, Band, Moved, prefix_lm, window
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.ring import Run, trip

T = 32
SEGMENTS = jnp.cumsum(jax.random.bernoulli(jax.random.key(3), 0.2, (2, T)), 1)
PACKED = {"q_segments": SEGMENTS, "k_segments": SEGMENTS, "k_valid": jnp.arange(T)[None] < jnp.array([[T], [21]])}
AT = jnp.maximum(jnp.arange(T)[None] - jnp.array([[0], [9]]), -1)  # padded on the left


def arrays(heads: int = 8, kv_heads: int = 2):
    draw = lambda i, n: jax.random.normal(jax.random.key(i), (2, T, n, 8))
    return draw(0, heads), draw(1, kv_heads), draw(2, kv_heads)


def outcome(impl, preset, mask, q, k, v, **features):
    """(out, lse), and the gradients of a function of both."""

    def function(smooth):
        out, lse = attention(
            smooth["q"], smooth["k"], smooth["v"], mask, impl=impl, return_lse=True, **features,
            **({"sinks": smooth["sinks"]} if "sinks" in smooth else {}),
        )  # fmt: skip
        seen = jnp.where(lse == -jnp.inf, 0, lse)
        return jnp.sum(out * jnp.cos(jnp.arange(8))) + jnp.sum(jnp.sin(seen)), (out, lse)

    smooth = {"q": q, "k": k, "v": v} | ({"sinks": features.pop("sinks")} if "sinks" in features else {})
    run = jax.jit(jax.value_and_grad(function, has_aux=True))
    if preset is None:
        (_, results), grads = run(smooth)
    else:
        with jax.set_mesh(make_mesh(preset)):
            (_, results), grads = run(smooth)
    return results, grads


CASES = {
    "causal": (CAUSAL, {}),
    "full": (EVERYTHING, {}),
    "window": (window(7), {}),
    "both sides": (Band(-9, 3), {}),
    "prefix": (prefix_lm(11), {}),
    "packed": (CAUSAL, PACKED | {"softcap": 3.0}),
    "positions": (window(12), {"q_pos": AT, "k_pos": AT}),
    "sinks": (CAUSAL, {"sinks": jnp.linspace(-1, 1, 8)}),
}


@functools.cache
def whole(name):
    mask, features = CASES[name]
    return outcome("reference", None, mask, *arrays(), **features)


@pytest.mark.parametrize(
    ("impl", "preset", "name"),
    [
        *(("ring", "sequence=4,tensor=2", name) for name in CASES),
        ("ring", "sequence=2,data=2,tensor=2", "sinks"),
        ("ring", "sequence=8", "window"),
        *(("all_to_all", "sequence=2,data=2,tensor=2", name) for name in ("packed", "sinks", "positions")),
        ("all_to_all", "sequence=8", "window"),  # two key-value heads for eight devices
    ],
)
def test_equals_the_reference(impl, preset, name):
    mask, features = CASES[name]
    got = outcome(impl, preset, mask, *arrays(), **features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, whole(name))


def test_blocks_that_nobody_sees_are_not_visited():
    assert trip(CAUSAL, 16, 8) == (Run(0, 1, CAUSAL, CAUSAL), Run(1, 7, EVERYTHING, None))
    assert trip(EVERYTHING, 16, 8) == (Run(0, 1, EVERYTHING, EVERYTHING), Run(1, 7, EVERYTHING, EVERYTHING))
    assert [run.first for run in trip(window(20), 16, 8)] == [0, 1, 2]
    assert [run.first for run in trip(Band(-20, 0), 16, 8)] == [0, 6, 7]


@pytest.mark.parametrize(
    ("impl", "changes", "message"),
    [
        ("ring", {"bias": jnp.zeros((1, 1, T, T))}, "'ring' has no bias"),
        ("all_to_all", {"heads": 6}, "cannot cut 6 query heads and 2 key-value heads 8 ways"),
        ("ring", {"length": 30}, "cannot cut 30 queries and 32 keys 8 ways"),
    ],
)
def test_refusals(impl, changes, message):
    q, k, v = arrays(changes.pop("heads", 8))
    q = q[:, : changes.pop("length", T)]
    with jax.set_mesh(make_mesh("sequence=8")), pytest.raises(NotImplementedError, match=message):
        attention(q, k, v, CAUSAL, impl=impl, **changes)


def test_without_a_mesh_it_is_refused():
    with pytest.raises(NotImplementedError, match="'ring' is for a mesh with an axis 'sequence'"):
        attention(*arrays(), CAUSAL, impl="ring")


@pytest.mark.parametrize(
    "direct",
    [xla.gradients_xla, functools.partial(flash_tpu.gradients_flash_tpu, interpret=True)],
    ids=["xla", "flash"],
)
@pytest.mark.parametrize("scale", [0.2, -0.2])
def test_gradients_of_some_of_the_keys(direct, scale):
    """Those of two halves of the keys, given the results for all, are those of all."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 128, n, 64)) for i, n in enumerate((2, 1, 1)))
    smooth = {"q": q, "k": k, "v": v, "sinks": jnp.array([0.3, -0.7])}
    run = lambda x: attention(**x, mask=CAUSAL, scale=scale, impl="reference", return_lse=True)
    (out, lse), pull = jax.vjp(run, smooth)
    given = jax.random.normal(jax.random.key(5), out.shape), jax.random.normal(jax.random.key(6), lse.shape)
    (want,) = pull(given)
    half = lambda part, mask, **sinks: direct(q, k[:, part], v[:, part], mask, out, lse, *given, scale=scale, **sinks)
    first = half(slice(0, 64), CAUSAL, sinks=smooth["sinks"])
    second = half(slice(64, 128), Moved(CAUSAL, -64))
    got = {name: jnp.concatenate([first[name], second[name]], 1) for name in ("k", "v")}
    got |= {"q": first["q"] + second["q"], "sinks": first["sinks"]}
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, err_msg=name)
