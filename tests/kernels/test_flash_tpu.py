"""What the suite leaves out of flash attention on TPU: blocks, races, what it refuses, its split over a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlm.kernels import masks
from jaxlm.kernels.attention import attention
from jaxlm.kernels.call import call_of, visible
from jaxlm.kernels.flash_tpu import flash_tpu, refuses_flash_tpu
from jaxlm.kernels.flash_tpu_fwd import FIRST, LAST, MASKED, Blocks, choose_blocks, flat_plan
from tests.kernels.float64 import close, exact
from tests.kernels.interpret import STRICT, run_strictly

SMALL = Blocks(q=128, k=128, heads=2)


def inputs(b=1, t=256, s=256, n=2, kh=1, h=64, dv=64, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return make(b, t, n, h) * 2, make(b, s, kh, h) * 2, make(b, s, kh, dv)


def wanted(q, k, v, mask, *, scale, q_segments=None, k_segments=None, **features):
    """Output and log-sum-exp in float64."""
    (t, s), hiding = (q.shape[1], k.shape[1]), {"q_segments": q_segments, "k_segments": k_segments}
    seen = visible(mask, jnp.arange(t)[None], jnp.arange(s)[None], **hiding)
    return exact(q, k, v, np.asarray(seen)[:, None], scale=scale, **features)


def check(got, want):
    out, lse = got
    assert out.dtype == lse.dtype == jnp.float32
    close(out, want.out)
    close(lse, want.lse)


SEGMENTS = jnp.asarray(np.repeat(np.arange(5), 60)[None], jnp.int32)
RAGGED = {"t": 300, "s": 300}
STRICTLY = ("causal", "segments")
# Beside those of the suite.
CASES = {
    "causal": (masks.CAUSAL, RAGGED | {"b": 2, "n": 4, "kh": 2}, {}),
    "segments": (masks.CAUSAL, RAGGED, {"q_segments": SEGMENTS, "k_segments": SEGMENTS}),
    "several tiles of queries a head": (masks.CAUSAL, {"t": 512, "s": 512, "blocks": Blocks(256, 128, 1)}, {}),
    "a row of tiles that sees nothing": (masks.Band(lo=150), {"t": 384, "s": 384}, {}),
    "several groups a step": (masks.longformer(60, 10), {"n": 8, "kh": 4, "blocks": Blocks(128, 128, 8)}, {}),
    "a part of a group a step": (masks.window(200), {"n": 8, "kh": 1, "blocks": Blocks(128, 256, 2)}, {}),
    "chosen blocks": (masks.chunked_local(90), RAGGED | {"n": 4, "blocks": None}, {}),
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRICTLY])
def test_values(name):
    mask, shape, features = CASES[name]
    shape = dict(shape)
    blocks = shape.pop("blocks", SMALL)
    q, k, v = inputs(**shape)
    got = flash_tpu(q, k, v, mask, scale=0.1, return_lse=True, interpret=True, blocks=blocks, **features)
    check(got, wanted(q, k, v, mask, scale=0.1, **features))


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_scale_may_be_negative_or_zero(scale):
    q, k, v = inputs()
    got = flash_tpu(q, k, v, masks.CAUSAL, scale=scale, return_lse=True, interpret=True, blocks=SMALL)
    check(got, wanted(q, k, v, masks.CAUSAL, scale=scale))


@pytest.mark.parametrize("name", STRICTLY)
def test_no_race_and_nothing_uninitialized(name):
    mask, shape, features = CASES[name]
    q, k, v = inputs(**shape)
    call = lambda: flash_tpu(q, k, v, mask, scale=0.1, return_lse=True, interpret=STRICT, blocks=SMALL, **features)
    got, race = run_strictly(call)
    assert not race
    check(got, wanted(q, k, v, mask, scale=0.1, **features))


def copies(x, out, buffer, semaphore, *, waits: bool):
    copy = pltpu.make_async_copy(x, buffer, semaphore)
    copy.start()
    if waits:
        copy.wait()
    out[...] = buffer[...] * 2
    if not waits:
        copy.wait()


def doubled(x, waits, interpret):
    return pl.pallas_call(
        functools.partial(copies, waits=waits),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=interpret,
    )(x)


def test_the_check_for_races_bites():
    """A kernel that reads before the copy has landed passes the plain interpreter, and not the detector of races.

    Whenever the copy lands: when it is waited for, so that NaN was read, or at once, so that nothing else shows it.
    """
    x = jnp.ones((8, 128))
    assert (doubled(x, False, True) == 2).all()
    for mode, read in (("on_wait", np.nan), ("eager", 2)):
        run = functools.partial(doubled, x, interpret=dataclasses.replace(STRICT, dma_execution_mode=mode))
        result, race = run_strictly(functools.partial(run, True))
        assert (result == 2).all() and not race
        result, race = run_strictly(functools.partial(run, False))
        np.testing.assert_array_equal(result, read)
        assert race


def test_nan_stays_in_its_row():
    q, k, v = inputs(b=2, n=2, kh=2)
    q = q.at[0, 3, 0, 0].set(jnp.nan)
    out = np.array(flash_tpu(q, k, v, masks.CAUSAL, scale=0.1, interpret=True, blocks=SMALL))
    assert np.isnan(out[0, 3, 0]).all()
    out[0, 3, 0] = 0
    assert np.isfinite(out).all()


@pytest.mark.slow
def test_splits_over_the_mesh():
    q, k, v = inputs(b=4, n=4, kh=2)
    sinks = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    mesh = jax.make_mesh((2, 2, 2), ("fsdp", "tensor", "expert"), axis_types=(jax.sharding.AxisType.Auto,) * 3)

    def loss(q, k, v, sinks):
        return (flash_tpu(q, k, v, masks.CAUSAL, scale=0.1, interpret=True, blocks=SMALL, sinks=sinks) ** 2).sum()

    both = jax.value_and_grad(loss, argnums=(0, 3))
    alone = both(q, k, v, sinks)
    with jax.set_mesh(mesh):
        split = jax.jit(both)(q, k, v, sinks)
        with pytest.raises(ValueError, match=r"key-value heads 1 do not split .*tensor.* 2 devices"):
            jax.jit(loss)(q, k[:, :, :1], v[:, :, :1], sinks)
        with pytest.raises(ValueError, match=r"examples 2 do not split .*fsdp.*expert.* 4 devices"):
            jax.jit(loss)(q[:2], k[:2], v[:2], sinks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), split, alone)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "gpu"}, "needs a TPU, the platform is 'gpu'"),
        ({"given": {"bias", "q_pos", "sinks"}}, "has no bias, q_pos"),
        ({"h": 48}, "needs head dims that are multiples of 8 from 64 to 256, got 48 and 64"),
        ({"dtype": jnp.float16}, "computes in bfloat16 or float32 throughout, got float16"),
        ({"mask": masks.BlockLayout(64, ((0,),))}, "looks up a table"),
    ],
)
def test_refuses(change, reason):
    q, k, v = inputs(t=64, s=64, **{name: change[name] for name in ("h", "dtype") if name in change})
    call = call_of(
        q, k, v, change.get("mask", masks.CAUSAL), change.get("given", ()), platform=change.get("platform", "tpu")
    )
    assert reason in (refuses_flash_tpu(call) or "")


def test_entry_refuses_it_elsewhere():
    q, k, v = inputs(t=8, s=8)
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        attention(q, k, v, masks.CAUSAL, impl="flash_tpu")
    assert refuses_flash_tpu(call_of(q, k, v, masks.CAUSAL, platform="tpu")) is None


def visited(mask, t, n=8, group=1) -> float:
    blocks = choose_blocks(mask, t, t, n, group, 2)
    return len(flat_plan(mask, t, t, blocks.q, blocks.k).row) * blocks.q * blocks.k / t**2


def test_visits_little_more_than_it_must():
    assert visited(masks.CAUSAL, 16384) <= 0.51 + 512 / 16384
    assert visited(masks.window(1024), 16384) <= 0.08
    assert visited(masks.window(1024), 16384, n=32, group=4) <= 0.08


def test_plan_is_flat_and_every_row_has_an_end():
    pairs = flat_plan(masks.window(100), 1024, 1024, 128, 128)
    assert list(zip(pairs.row, pairs.column, strict=True)) == [(0, 0)] + [
        (i, j) for i in range(1, 8) for j in (i - 1, i)
    ]
    assert [bool(f & FIRST) for f in pairs.flags] == [True] + [True, False] * 7
    assert [bool(f & LAST) for f in pairs.flags] == [True] + [False, True] * 7
    assert not (flat_plan(masks.EVERYTHING, 256, 256, 128, 128).flags & MASKED).any()
    assert list(flat_plan(masks.Band(lo=150), 384, 384, 128, 128).column) == [0, 0, 0, 1]
