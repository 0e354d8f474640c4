"""Every implementation on every case of the suite; then what is particular to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.kernels import decode, xla
from jaxlm.kernels.attention import IMPLS, attention, reference
from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.call import call_of, dropout_seed, kept
from jaxlm.kernels.masks import CAUSAL, EVERYTHING, Band, window
from tests.kernels.cases import CASES, Table
from tests.kernels.suite import IMPLEMENTATIONS, check

PORTABLE = {"decode", "xla", "reference"}


# The others are slow: seconds each of the kernels in the interpreter, half a second of the portable ones.
QUICK = ("causal", "ragged", "segments", "k_valid", "sinks", "table", "table-holes", "bfloat16", "one-query", "all")


def marked(implementation, case):
    marks = () if str(case) in QUICK else pytest.mark.slow
    return pytest.param(implementation, case, id=f"{implementation}-{case}", marks=marks)


@pytest.mark.parametrize(("implementation", "case"), [marked(i, c) for i in IMPLEMENTATIONS for c in CASES])
def test_suite(implementation, case):
    check(implementation, case)


def test_names_of_cases_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def shapes(t, s, *, b=1, n=2, k=1, h=16):
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((b, t, n, h), (b, s, k, h), (b, s, k, h))]


def positions(t):
    return {"q_pos": jnp.arange(t)[None], "k_pos": jnp.arange(t)[None]}


# The choice.


@pytest.mark.parametrize(
    ("t", "s", "platform", "given", "name"),
    [
        (64, 64, "cpu", (), "reference"),
        (64, 4096, "cpu", (), "reference"),
        (128, 128, "cpu", (), "xla"),
        (512, 512, "tpu", (), "reference"),
        (1024, 1024, "gpu", (), "xla"),
        (1, 512, "cpu", (), "reference"),
        (1, 4096, "cpu", (), "reference"),
        (1, 16384, "cpu", ("k_pos", "q_pos"), "decode"),
        (1, 16384, "cpu", ("dropout",), "reference"),
        (1, 2**20, "gpu", (), "reference"),
        (64, 2**20, "gpu", (), "xla"),
    ],
)
def test_choice_by_size(t, s, platform, given, name):
    """Among the portable ones, in their order; the kernels of an accelerator come before them."""
    call = call_of(*shapes(t, s), CAUSAL, given, platform=platform)
    free = (i for i in IMPLS.values() if i.name in PORTABLE and i.refuses(call) is None and i.declines(call) is None)
    assert next(free).name == name


def test_a_declined_implementation_runs_when_named():
    q, k = normal(1, 4, 2, 8), normal(1, 6, 1, 8)
    want = attention(q, k, k, CAUSAL, impl="reference")
    for impl in ("xla", "decode"):
        np.testing.assert_allclose(attention(q, k, k, CAUSAL, impl=impl), want, atol=2e-6)


# What is not visited.


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_skipped_tiles_are_never_read(dynamic):
    """NaN in the values of hidden tiles: a product with a probability of 0 would spread it."""
    q, k = normal(1, 64, 2, 8), normal(1, 96, 1, 8)
    v = k.at[:, 64:].set(jnp.nan)
    given = {"q_pos": jnp.arange(64)[None], "k_pos": jnp.arange(96)[None]} if dynamic else {}
    run = functools.partial(xla.xla, mask=CAUSAL, scale=0.3, block_q=16, block_k=16, **given)
    out, back = jax.vjp(lambda q, k, v: run(q, k, v), q, k, v)
    np.testing.assert_allclose(out, reference(q, k[:, :64], k[:, :64], CAUSAL, scale=0.3), atol=2e-6)
    assert all(np.isfinite(grad).all() for grad in back(jnp.ones_like(out)))


def test_hidden_splits_of_a_cache_are_never_read():
    q, k = normal(2, 1, 2, 8), normal(2, 80, 1, 8)
    hidden = (np.arange(80) < 32) | (np.arange(80) >= 64)  # behind the window, and the empty end
    k_pos = jnp.where(np.arange(80) < 64, np.arange(80), -1)[None]
    given = {"q_pos": jnp.full((2, 1), 55), "k_pos": k_pos, "scale": 0.3}
    want = reference(q, k, k, window(20), **given)
    v = jnp.where(hidden[:, None, None], jnp.nan, k)
    np.testing.assert_allclose(decode.decode(q, k, v, window(20), split=16, **given), want, atol=2e-6)


def test_segments_hide_tiles_too():
    """Four packed documents of 32 tokens: the causal tiles between documents are not visited."""
    segments = jnp.repeat(jnp.arange(4), 32)[None]
    spec = xla.Spec(mask=CAUSAL, scale=1.0, softcap=None, rate=0.0, queries=128, block_q=16, block_k=16)
    x = dict(zip("qkv", (normal(1, 128, 1, 4),) * 3, strict=True))
    _, full, partial = xla._steps(xla.Tiles(spec, x | {"q_segments": segments, "k_segments": segments}))
    assert (int(full), int(partial)) == (4, 8)
    assert xla._steps(xla.Tiles(spec, x))[1:] == (28, 8)


def test_a_mask_that_hides_everything():
    q = normal(1, 20, 2, 8)
    out, back = jax.vjp(lambda q: xla.xla(q, q, q, Band(lo=50), scale=1.0, block_q=8, block_k=8), q)
    assert (out == 0).all() and (back(jnp.ones_like(out))[0] == 0).all()


def test_padding_of_a_ragged_length_stays_finite():
    """The last tile's padded queries lie before every key, so that a steep slope would lift them to infinity."""
    q = normal(1, 20, 2, 8)
    run = lambda q, alibi: xla.xla(q, q, q, EVERYTHING, scale=1.0, alibi=alibi, block_q=16, block_k=16)
    for grad in jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1))(q, jnp.full(2, 50.0)):
        assert np.isfinite(grad).all()


# Memory.


def temporary_bytes(t: int, given=lambda t: {}, mask=lambda t: CAUSAL) -> int:
    """What a compiled forward and backward pass allocates beside arguments and results."""

    def both(q, k, v, table):
        out, back = jax.vjp(lambda *x: xla.xla(*x, mask(t) if table is None else table, scale=1.0, **given(t)), q, k, v)
        return back(out)

    table = mask(t) if isinstance(mask(t), BlockTable) else None
    return jax.jit(both).lower(*shapes(t, t), table).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"given": positions},
        {"given": lambda t: {"dropout": (0.1, jax.random.key(0)), "k_valid": jnp.ones((1, t), bool)}},
        {"mask": lambda t: Table(block=64).make(t, t)},
        {"mask": lambda t: Table(heads=2, block=64, full_rows=()).make(t, t)},
    ],
    ids=["static", "positions", "features", "table", "table-by-head"],
)  # fmt: skip
def test_memory_grows_with_the_length(case):
    short, long = (temporary_bytes(t, **case) for t in (4096, 16384))
    assert long < 4.2 * short
    assert long < 16384**2 / 4  # bytes; all logits of one head are sixteen times that


# Numerics and sharding.


def products(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("run", [reference, xla.xla, decode.decode], ids=["reference", "xla", "decode"])
def test_float32_products_are_not_rounded(run):
    """Full precision whatever the default is; bfloat16 is added up in float32."""

    def both(q):
        out, back = jax.vjp(lambda *x: run(*x, CAUSAL, scale=1.0), q, q, q)
        return back(out)

    for dtype in (jnp.float32, jnp.bfloat16):
        with jax.default_matmul_precision("bfloat16"):
            found = list(products(jax.make_jaxpr(both)(normal(1, 8, 2, 8).astype(dtype)).jaxpr))
        assert len(found) >= 6
        for params in found:
            assert params["preferred_element_type"] == jnp.float32
            assert dtype == jnp.bfloat16 or params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_dropout_draws():
    """The rate asked for, other draws for other keys, rows and columns, and the same ones for any cut of the whole."""
    seed = dropout_seed(jax.random.key(0))
    rows, columns = np.arange(600)[:, None], np.arange(500)
    whole = np.asarray(kept(seed, 0.3, rows, columns))
    assert abs(whole.mean() - 0.7) < 0.004
    for axis in (0, 1):
        assert abs(whole.mean(axis) - 0.7).max() < 0.12
        neighbours = np.corrcoef(whole.reshape(-1)[:-1], whole.reshape(-1)[1:])[0, 1]
        assert abs(neighbours) < 0.01
    np.testing.assert_array_equal(whole[7:9, 11:40], kept(seed, 0.3, rows[7:9], columns[11:40]))
    other = np.asarray(kept(dropout_seed(jax.random.key(1)), 0.3, rows, columns))
    assert abs((whole == other).mean() - 0.58) < 0.01  # 0.7 ** 2 + 0.3 ** 2
    assert np.asarray(kept(seed, 0.0, rows, columns)).all()


@pytest.mark.parametrize("given", [{}, positions(64)], ids=["static", "dynamic"])
def test_batch_and_heads_shard_without_communication(given):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k = normal(2, 64, 4, 8), normal(2, 64, 2, 8)

    def both(q, k):
        out, back = jax.vjp(lambda q, k: xla.xla(q, k, k, CAUSAL, scale=0.3, block_q=16, block_k=16, **given), q, k)
        return out, back(out)

    want = both(q, k)
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    compiled = jax.jit(both).lower(*(jax.device_put(x, split) for x in (q, k))).compile()
    text = compiled.as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if f" {op}(" in text]
    got = compiled(*(jax.device_put(x, split) for x in (q, k)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), got, want)


@pytest.mark.parametrize(("run", "t"), [(xla.xla, 64), (decode.decode, 8)], ids=["xla", "decode"])
def test_inside_of_shard_map(run, t):
    """With the checks of what varies on: sinks are the same for every shard of the batch, so their gradients add up."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, sinks, pos = normal(2, t, 4, 8), normal(2, 64, 2, 8), normal(4), jnp.arange(64 - t, 64)[None]
    local = lambda q, k, sinks: run(q, k, k, CAUSAL, scale=0.3, q_pos=pos, sinks=sinks)
    arrays = PartitionSpec("data", None, "tensor", None)
    split = jax.shard_map(local, mesh=mesh, in_specs=(arrays, arrays, PartitionSpec("tensor")), out_specs=arrays)
    both = lambda f: jax.jit(lambda *x: (f(*x), jax.vjp(f, *x)[1](q)))(q, k, sinks)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=3e-6), both(split), both(local))


@pytest.mark.slow
def test_maps_over_examples():
    q, k = normal(3, 1, 20, 2, 8), normal(3, 1, 20, 1, 8)
    pos = jnp.arange(20)[None] - jnp.asarray([0, 3, 7])[:, None, None]
    run = lambda q, k, pos: xla.xla(
        q, k, k, CAUSAL, scale=1.0, k_pos=jnp.maximum(pos, -1), q_pos=pos, block_q=8, block_k=8
    )
    want = jnp.stack([run(*x) for x in zip(q, k, pos, strict=True)])
    np.testing.assert_allclose(jax.vmap(run)(q, k, pos), want, atol=2e-6)


@pytest.mark.parametrize(
    ("length", "heads", "block"), [(8192, 2, 512), (700, 2, 352), (5, 1, 16), (8192, 16, 256), (8192, 64, 128)]
)
def test_default_blocks_pad_little(length, heads, block):
    assert xla._block(length, heads) == block
