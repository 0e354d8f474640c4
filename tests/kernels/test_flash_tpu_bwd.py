"""What the suite leaves out of the backward kernel of flash attention on TPU: chunks, races, blocks, its plan."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import masks
from jaxlm.kernels.flash_tpu_bwd import TILES, Blocks, _plan, backward, choose_blocks
from jaxlm.kernels.plan import tile_kinds
from tests.kernels.float64 import close, exact
from tests.kernels.interpret import STRICT, run_strictly

ONE, TWO = Blocks(q=128, k=128, chunk=512), Blocks(q=128, k=128, chunk=256)  # keys in one chunk, or in several
SEGMENTS = jnp.asarray(np.repeat(np.arange(5), 60)[None], jnp.int32)
STRICTLY = ("causal, three chunks", "segments")
# Beside those of the suite.
CASES = {
    "causal, groups of two": (masks.CAUSAL, {"b": 2, "n": 4, "kh": 2}, {}),
    "causal, three chunks": (masks.CAUSAL, {"t": 300, "s": 700, "n": 2, "kh": 1, "blocks": TWO}, {}),
    "segments": (masks.CAUSAL, {}, {"q_segments": SEGMENTS, "k_segments": SEGMENTS}),
    "keys that nobody sees": (masks.KeysBefore(100), {"blocks": TWO}, {}),
    "queries that see nothing": (masks.Band(lo=150), {}, {}),
    "chosen blocks": (masks.chunked_local(90), {"t": 200, "s": 200, "n": 4, "kh": 2, "blocks": None}, {}),
}


def inputs(b=1, t=300, s=300, n=2, kh=2, h=64, dv=64, dtype=np.float32):
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return make(b, t, n, h) * 2, make(b, s, kh, h) * 2, make(b, s, kh, dv), make(b, t, n, dv), make(b, t, n)


def counts(mask, t, s, q_segments=None, k_segments=None, k_valid=None):
    seen = masks.dense(mask, t, s)[None, None]
    if q_segments is not None:
        seen = seen & (np.asarray(q_segments)[:, None, :, None] == np.asarray(k_segments)[:, None, None, :])
    return seen if k_valid is None else seen & np.asarray(k_valid)[:, None, None, :]


def both(name, dtype=np.float32, interpret=True):
    """What the kernel finds and what is exact."""
    mask, shape, features = CASES[name]
    shape = dict(shape)
    blocks = shape.pop("blocks", ONE)
    q, k, v, dout, dlse = inputs(**shape, dtype=dtype)
    hiding = {x: features[x] for x in ("q_segments", "k_segments", "k_valid") if x in features}
    rest = {x: features[x] for x in ("softcap", "sinks") if x in features}
    seen = counts(mask, q.shape[1], k.shape[1], **hiding)
    want = exact(q, k, v, seen, scale=0.1, dout=dout, dlse=dlse, **rest)
    out, lse = (jnp.asarray(x, y) for x, y in ((want.out, dtype), (want.lse, jnp.float32)))
    dlse = dlse.astype(jnp.float32)
    call = lambda: backward(
        q, k, v, out, lse, dout, dlse, mask, scale=0.1, interpret=interpret, blocks=blocks, **features
    )
    return call, want


def check(got, want, tolerance=1e-5):
    for gradient, exactly in zip(got[:3], (want.dq, want.dk, want.dv), strict=True):
        close(gradient, exactly, tolerance)
    if got[3] is not None:
        close(got[3], want.dsinks, tolerance)


@pytest.mark.parametrize("name", [name for name in CASES if name not in STRICTLY])
def test_gradients(name):
    call, want = both(name)
    check(call(), want)


def test_bfloat16():
    call, want = both("causal, groups of two", jnp.bfloat16)
    got = call()
    assert {x.dtype for x in got[:3]} == {jnp.dtype(jnp.bfloat16)}
    check(got, want, 2e-2)


@pytest.mark.parametrize("name", STRICTLY)
def test_no_race_and_nothing_uninitialized(name):
    call, want = both(name, interpret=STRICT)
    got, race = run_strictly(call)
    assert not race
    check(got, want)


def test_the_log_sum_exp_may_have_no_gradient():
    q, k, v, dout, dlse = inputs(t=128, s=128)
    want = exact(q, k, v, 1, scale=0.1, dout=dout, dlse=0 * dlse)
    out, lse = jnp.asarray(want.out, jnp.float32), jnp.asarray(want.lse, jnp.float32)
    check(backward(q, k, v, out, lse, dout, None, masks.EVERYTHING, scale=0.1, interpret=True), want)


def test_blocks_follow_the_work_and_fit():
    long = choose_blocks(masks.EVERYTHING, 16384, 16384, 256, 2, False)
    assert (long.q, long.k) == min(TILES, key=lambda tile: TILES[tile])
    assert choose_blocks(masks.window(64), 4096, 4096, 256, 2, False).q == 512
    assert choose_blocks(masks.CAUSAL, 200, 300, 256, 2, False) == Blocks(256, 384, 384)
    assert choose_blocks(masks.CAUSAL, 4096, 4096, 256, 2, False) == Blocks(512, 512, 4096)
    assert choose_blocks(masks.CAUSAL, 32768, 32768, 512, 2, True) == Blocks(512, 512, 1024)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("s", [2048, 4096, 32768])
def test_blocks_fit(s, width, itemsize, segmented):
    """Two buffers of everything that is read or written, the sums in float32, and the products of a tile, in 16 MiB."""
    blocks = choose_blocks(masks.EVERYTHING, s, s, 2 * width, itemsize, segmented)
    assert blocks.chunk % blocks.k == 0
    keys = 2 * (4 * width * itemsize + (512 if segmented else 0)) + 2 * width * 4
    dq = 2 * width * itemsize if blocks.chunk >= s else 2 * 2 * width * 4
    queries = 2 * 2 * width * itemsize + dq + width * 4
    assert blocks.chunk * keys + blocks.q * (queries + 8 * blocks.k + 4 * width) < 15.8 * 2**20


@pytest.mark.parametrize("mask", [masks.CAUSAL, masks.window(1024), masks.prefix_lm(700), masks.EVERYTHING])
def test_the_plan_visits_each_tile_once(mask):
    blocks, t = Blocks(512, 512, 2048), 5000
    plan, seen = _plan(mask, t, t, blocks), np.zeros((10, 10), int)
    for (number, rows), row, bounds, columns in zip(*plan.scalars, strict=True):
        for i in range(rows):
            full, partial, end = bounds[3 * i : 3 * i + 3]
            at = number * (blocks.chunk // blocks.k) + columns[full:end]
            seen[row[i], at] += 1 + (np.arange(full, end) >= partial)
    kinds = masks.FULL + 1 - seen  # visited without the predicate once, with it twice
    want = tile_kinds(mask, t, t, 512, 512)
    assert ((seen == 0) == (want == masks.SKIP)).all()
    assert (kinds[seen > 0] == want[seen > 0]).all()


def test_padding_stays_out_where_every_logit_is_far_below_zero():
    """A key of padding would have the logit 0 among logits of -300: a probability past float32."""
    q, k, v, dout, dlse = inputs()
    q, k = q.at[..., 0].set(30.0), k.at[..., 0].set(-100.0)
    want = exact(q, k, v, 1, scale=0.1, dout=dout, dlse=dlse)
    out, lse = jnp.asarray(want.out, jnp.float32), jnp.asarray(want.lse, jnp.float32)
    got = backward(q, k, v, out, lse, dout, dlse, masks.EVERYTHING, scale=0.1, interpret=True, blocks=ONE)
    check(got, want, 1e-3)  # the logits have lost three digits
