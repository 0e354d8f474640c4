"""What the suite leaves out of block tables on TPU: tilings, races, the work they do, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import sparse_tpu_kernels as module
from jaxlm.kernels.bigbird import bigbird, random_blocks
from jaxlm.kernels.block_table import BlockTable, multiplicity
from jaxlm.kernels.call import call_of
from jaxlm.kernels.masks import CAUSAL, BlockLayout
from jaxlm.kernels.sparse_tpu import _lists, refuses_sparse_tpu, sparse_tpu
from jaxlm.kernels.sparse_tpu_kernels import Tiling
from tests.kernels.float64 import close, exact
from tests.kernels.interpret import STRICT, run_strictly

SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (2, 320)), 1), jnp.int32)


def drawn(heads, rows, slots, key_blocks, block, full_rows=(), seed=0):
    blocks = np.random.default_rng(seed).integers(-1, key_blocks, (heads, rows, slots))
    return BlockTable(jnp.asarray(blocks, jnp.int32), block, full_rows)


STRICTLY = "segments, full row, odd rows"
# Beside those of the suite.
CASES = {
    STRICTLY: (drawn(4, 5, 7, 5, 64, (1,)), {}, {"q_segments": SEGMENTS, "k_segments": SEGMENTS}),
    "bigbird, evaluation": (bigbird(1024, block=128), {"b": 1, "n": 2}, {}),
    "blocks of 128, more keys": (drawn(1, 2, 3, 3, 128), {"n": 2, "kh": 1, "s": 384, "h": 128, "dv": 72}, {}),
    "blocks of 32": (drawn(2, 12, 5, 12, 32), {"n": 2, "kh": 2}, {}),
    "several passes": (drawn(2, 3, 7, 24, 64), {"n": 2, "kh": 2, "b": 1, "s": 1536}, {}),
    "an empty row": (BlockTable(jnp.asarray([[[0, 0], [-1, -1]]], jnp.int32), 64), {"n": 2}, {}),
}


def both(name, interpret=True):
    table, shape, features = CASES[name]
    shape = {"b": 2, "n": 4, "kh": 2, "h": 64, "dv": 64} | shape
    b, n, kh = shape["b"], shape["n"], shape["kh"]
    t = table.blocks.shape[1] * table.block
    s = shape.get("s", t)
    rng = np.random.default_rng(0)
    make = lambda *size: jnp.asarray(rng.standard_normal(size), jnp.float32)
    q, k, v = make(b, t, n, shape["h"]) * 2, make(b, s, kh, shape["h"]) * 2, make(b, s, kh, shape["dv"])
    dout, dlse = make(b, t, n, shape["dv"]), make(b, t, n)
    counts = np.asarray(multiplicity(table, t, s))[None]
    if "q_segments" in features:
        same = features["q_segments"][:, :, None] == features["k_segments"][:, None, :]
        counts = counts * np.asarray(same)[:, None]
    if "k_valid" in features:
        counts = counts * np.asarray(features["k_valid"])[:, None, None, :]
    rest = {x: features[x] for x in ("softcap", "sinks") if x in features}
    want = exact(q, k, v, counts, scale=0.1, dout=dout, dlse=dlse, **rest)
    sinks = features.get("sinks")

    def run(q, k, v, sinks):
        given = features | ({} if sinks is None else {"sinks": sinks})
        return sparse_tpu(q, k, v, table, scale=0.1, return_lse=True, interpret=interpret, **given)

    @jax.jit
    def call(q, k, v, sinks):
        (out, lse), vjp = jax.vjp(run, q, k, v, sinks)
        return (out, lse, *vjp((dout, dlse)))

    return lambda: call(q, k, v, sinks), want


def check(got, want):
    for x, exactly in zip(got, (want.out, want.lse, want.dq, want.dk, want.dv, want.dsinks), strict=True):
        if x is not None:
            close(x, exactly)


@pytest.mark.parametrize("name", [name for name in CASES if name != STRICTLY])
def test_values_and_gradients(name, monkeypatch):
    if name == "several passes":
        monkeypatch.setattr(module, "MOST_KEYS", 256)
    call, want = both(name)
    check(call(), want)


def test_no_race_and_nothing_uninitialized():
    call, want = both(STRICTLY, interpret=STRICT)
    got, race = run_strictly(call)
    assert not race
    check(got, want)


def test_tables_scan_over_layers():
    layers = [drawn(2, 4, 3, 4, 64, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 256, 2, 64)), jnp.float32)
    one = functools.partial(sparse_tpu, scale=0.1, interpret=True)
    got, _ = jax.jit(lambda q: jax.lax.scan(lambda x, table: (one(x, x, x, table), None), q, stacked))(q)
    want = q
    for layer in layers:
        want = one(want, want, want, layer)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.slow
def test_splits_over_the_mesh():
    table = drawn(4, 4, 2, 4, 64)
    make = lambda n, seed: jnp.asarray(np.random.default_rng(seed).standard_normal((2, 256, n, 64)), jnp.float32)
    q, k, v = make(4, 0), make(2, 1), make(2, 2)
    sinks = jnp.arange(4.0)
    run = lambda q, sinks, k: (sparse_tpu(q, k, v, table, scale=0.1, sinks=sinks, interpret=True) ** 2).sum()
    both = jax.value_and_grad(run, argnums=(0, 1, 2))
    alone = both(q, sinks, k)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        split = jax.jit(both)(q, sinks, k)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), split, alone)


def visited(table, t) -> float:
    """The share of dense work that the passes over a table's tiles do, its full rows included, largest over heads."""
    rows = table.blocks.shape[1]
    full = np.flatnonzero(table.full())
    work = 0
    for blocks in (table.blocks.at[:, full].set(-1), jnp.broadcast_to(jnp.arange(rows), (1, len(full), rows))):
        tiling = Tiling.of(table.block, blocks.shape[1], rows, blocks.shape[2])
        lists, _ = _lists(blocks, tiling, table.block, rows)
        passes = np.asarray(lists).reshape(len(lists), tiling.tiles, -1)[:, :, 0]
        groups = passes.reshape(len(lists), -1, tiling.together)  # tiles that run together wait for each other
        tile = tiling.group * tiling.width * table.block**2
        work += (np.maximum(groups.max(2), 1) * tiling.together).sum(1).max() * tile
    return work / t**2


@pytest.mark.parametrize(("t", "most"), [(4096, 0.24), (16384, 0.065)])
def test_bigbird_visits_little(t, most):
    table = bigbird(t, random_blocks(t, heads=2, seed=3))
    assert visited(table, t) <= most
    assert visited(bigbird(t), t) <= most  # evaluation


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "gpu"}, "needs a TPU, the platform is 'gpu'"),
        ({"mask": CAUSAL}, "runs block tables and masks of whole blocks, not Band"),
        ({"given": {"bias", "q_pos", "sinks"}}, "has no bias, q_pos"),
        ({"dtype": jnp.float16}, "computes in bfloat16 or float32, got float16"),
        ({"block": 48}, "needs blocks of 32, 64 or a multiple of 128 up to 1024, got 48"),
        ({"mask": BlockLayout(64, ((0,),)) & CAUSAL}, "runs block tables and masks of whole blocks, not And("),
        ({"mask": BlockLayout(80, ((0,),))}, "of 384 queries and 384 keys"),
        ({"mask": drawn(1, 2048, 64, 64, 64), "t": 1 << 17, "s": 4096}, "in scalar memory: 1544 KB of 1000"),
        ({"t": 1 << 20}, "keeps 1048576 keys and their gradients in VMEM: 1544 MB of"),
    ],
)
def test_refuses(change, reason):
    block, t = change.get("block", 64), change.get("t", 384)
    q, k = (
        jax.ShapeDtypeStruct((1, length, 2, 64), change.get("dtype", jnp.bfloat16))
        for length in (t, change.get("s", t))
    )
    mask = change.get("mask", drawn(1, t // block, 3, t // block, block))
    call = call_of(q, k, k, mask, change.get("given", ()), platform=change.get("platform", "tpu"))
    assert reason in (refuses_sparse_tpu(call) or "")


def test_takes_what_it_should():
    shape = jax.ShapeDtypeStruct((1, 384, 2, 64), jnp.bfloat16)
    call = call_of(shape, shape, shape, drawn(1, 6, 3, 6, 64), {"k_valid", "sinks"}, platform="tpu")
    assert refuses_sparse_tpu(call) is None
