"""What the suite leaves out of decoding on TPU: races, which blocks it reads, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import decode_tpu as module
from jaxlm.kernels import masks
from jaxlm.kernels.call import call_of, visible
from jaxlm.kernels.decode_tpu import declines_decode_tpu, decode_tpu, refuses_decode_tpu
from tests.kernels.float64 import close, exact
from tests.kernels.interpret import STRICT, run_strictly

RING = jnp.asarray(np.where(np.arange(640) < 500, (np.arange(640) + 200) % 640, -1)[None], jnp.int32)
STRICTLY = ("ring buffer", "hidden keys, keys not whole blocks")
# Beside those of the suite, which has no batch of one, whose blocks are split in two.
CASES = {
    "all of it": (masks.EVERYTHING, {}, {}),
    "ring buffer": (masks.window(300), {"b": 2, "t": 2}, {"q_pos": jnp.asarray([[450, 451]]), "k_pos": RING}),
    "hidden keys, keys not whole blocks": (masks.EVERYTHING, {"s": 600}, {"k_valid": jnp.arange(600)[None] > 300}),
    "eight key heads": (masks.CAUSAL, {"n": 8, "kh": 8}, {"q_pos": jnp.asarray([[600]])}),
}


def both(name, monkeypatch, interpret=True):
    monkeypatch.setattr(module, "CACHE_ROWS", 256)  # blocks of 128 keys: several of them
    mask, shape, features = CASES[name]
    shape = {"b": 1, "t": 1, "s": 640, "n": 4, "kh": 2, "h": 64, "dv": 64} | shape
    b, t, s, n, kh = (shape[x] for x in ("b", "t", "s", "n", "kh"))
    rng = np.random.default_rng(0)
    make = lambda *size: jnp.asarray(rng.standard_normal(size), jnp.float32)
    q, k, v = make(b, t, n, shape["h"]) * 2, make(b, s, kh, shape["h"]) * 2, make(b, s, kh, shape["dv"])
    hiding = {"q_pos": jnp.arange(t)[None], "k_pos": jnp.arange(s)[None]}
    hiding |= {x: y for x, y in features.items() if x not in ("softcap", "sinks")}
    rest = {x: features[x] for x in ("softcap", "sinks") if x in features}
    want = exact(q, k, v, np.asarray(visible(mask, **hiding))[:, None], scale=0.1, **rest)
    return lambda: decode_tpu(q, k, v, mask, scale=0.1, return_lse=True, interpret=interpret, **features), want


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRICTLY])
def test_values(name, monkeypatch):
    call, want = both(name, monkeypatch)
    out, lse = call()
    close(out, want.out)
    close(lse, want.lse)


@pytest.mark.parametrize("name", STRICTLY)
def test_no_race_and_nothing_uninitialized(name, monkeypatch):
    call, want = both(name, monkeypatch, interpret=STRICT)
    (out, lse), race = run_strictly(call)
    assert not race
    close(out, want.out)
    close(lse, want.lse)


def test_blocks_that_nobody_sees_are_not_read(monkeypatch):
    """NaN where no visible key lies does not reach the result."""
    monkeypatch.setattr(module, "CACHE_ROWS", 256)
    make = lambda *size: jnp.asarray(np.random.default_rng(0).standard_normal(size), jnp.float32)
    q, k, v = make(2, 1, 4, 64), make(2, 640, 2, 64), make(2, 640, 2, 64)
    position = jnp.asarray([[300], [500]])
    unread = (jnp.arange(640)[None] < jnp.asarray([[128], [384]])) | (
        jnp.arange(640)[None] >= jnp.asarray([[384], [512]])
    )
    hide = lambda x: jnp.where(unread[:, :, None, None], jnp.nan, x)
    run = lambda k, v: decode_tpu(q, k, v, masks.window(100), scale=0.1, q_pos=position, interpret=True)
    np.testing.assert_array_equal(run(hide(k), hide(v)), run(k, v))


def test_splits_over_the_mesh(monkeypatch):
    monkeypatch.setattr(module, "CACHE_ROWS", 256)
    make = lambda *size: jnp.asarray(np.random.default_rng(0).standard_normal(size), jnp.float32)
    q, k, sinks = make(2, 1, 4, 64), make(2, 300, 2, 64), make(4)
    run = lambda q, k, sinks: decode_tpu(
        q, k, k, masks.CAUSAL, scale=0.1, q_pos=jnp.asarray([[200]]), sinks=sinks, interpret=True
    )
    alone = run(q, k, sinks)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(jax.jit(run)(q, k, sinks), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "needs a TPU, the platform is 'cpu'"),
        ({"given": {"bias", "q_pos"}}, "has no bias"),
        ({"dtype": jnp.float16}, "computes in bfloat16 or float32, got float16"),
        ({"t": 17}, "decodes up to 16 tokens and 256 tokens times heads, got 17 tokens of 4 heads"),
    ],
)
def test_refuses(change, reason):
    q, k = (
        jax.ShapeDtypeStruct((1, t, n, 64), change.get("dtype", jnp.bfloat16))
        for t, n in ((change.get("t", 1), 4), (4096, 2))
    )
    call = call_of(q, k, k, masks.CAUSAL, change.get("given", ()), platform=change.get("platform", "tpu"))
    assert reason in (refuses_decode_tpu(call) or "")


def test_is_not_the_choice_for_as_many_queries_as_keys():
    shape = lambda t: jax.ShapeDtypeStruct((1, t, 4, 64), jnp.bfloat16)
    call = call_of(shape(16), shape(16), shape(16), masks.CAUSAL, platform="tpu")
    assert refuses_decode_tpu(call) is None
    assert declines_decode_tpu(call) == "is for many more keys than queries, got 16 and 16"
    assert declines_decode_tpu(call_of(shape(1), shape(4096), shape(4096), masks.CAUSAL, platform="tpu")) is None
