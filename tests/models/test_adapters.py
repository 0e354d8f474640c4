"""Adapters in the trunk: however layers run, with dropout, and with virtual tokens that all see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.checkpoints.load import flatten
from jaxlm.models import adapters as adapting
from jaxlm.models import decoder, layers
from jaxlm.models.decoder import Runtime
from jaxlm.train.adapters import Lora, Prompt, init, is_trainable
from tests.adapters import EACH, MODELS, SOME, TOKENS, VIRTUAL, close, differ, drawn, model, run


@pytest.mark.parametrize("name", MODELS)
def test_without_adapters_nothing_of_them_runs(name, monkeypatch):
    """So that the program is the same: every function that adds to it is replaced by an error."""
    m = model(name)

    def never(*args, **kwargs):
        raise AssertionError("adapters=None ran code of adapters")

    for function in ("beside", "of_layer", "make_room"):
        monkeypatch.setattr(adapting, function, never)
    monkeypatch.setattr(layers, "adapted", never)
    monkeypatch.setattr("jaxlm.models.self_attention.SelfAttention._prefixed", never)
    segments = jnp.ones(TOKENS.shape, jnp.int32)
    plain = jax.make_jaxpr(lambda p: decoder.forward(m.config, p, TOKENS, segments=segments)[0])(m.params)
    given = jax.make_jaxpr(lambda p: decoder.forward(m.config, p, TOKENS, segments=segments, adapters=None)[0])
    assert str(plain) == str(given(m.params))


# How layers run


@pytest.mark.slow
@pytest.mark.parametrize(("case", "remat"), [("llama-dora", "dots"), ("phi3", "full"), ("qwen3_moe", "full")])
def test_remat_gives_the_same_gradients(case, remat):
    name = case.split("-")[0]
    tree = drawn(name, EACH[case])
    loss = lambda t, runtime: run(name, t, runtime=runtime).var()
    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(tree, Runtime(remat=r)) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, again)
    assert all(np.asarray(g).any() for path, g in flatten(plain).items() if is_trainable(path))


@pytest.mark.parametrize("case", ["llama-dora", "phi3", "qwen3_moe"])
def test_unrolled_layers_compute_the_same(case):
    """The parameters as tuples of layers; joined for decoding they take no adapters, and say so."""
    name = case.split("-")[0]
    m, tree = model(name), drawn(name, EACH[case])
    grouped = adapting.grouped(m.params["layers"])
    layer = lambda stack, i: jax.tree.map(lambda x: x[i], stack)
    depth = lambda stack: len(jax.tree.leaves(stack)[0])
    unrolled = {group: tuple(layer(s, i) for i in range(depth(s))) for group, s in grouped.items()}
    params = m.params | {"layers": unrolled.get("", unrolled)}
    close(run(name, tree, params=params), run(name, tree))
    joined = jaxlm.init(MODELS[name], key=jax.random.key(0)).weights.unrolled
    with pytest.raises(ValueError, match="no weight; merge adapters before parameters are joined for decoding"):
        run(name, tree, params=joined)


# Dropout


def test_dropout_needs_an_rng_and_happens_at_its_rate():
    adapter = dataclasses.replace(SOME, dropout=0.5)
    tree = drawn("llama", adapter)
    close(run("llama", tree), run("llama", drawn("llama", SOME)))
    first, again = (run("llama", tree, rng=jax.random.key(i)) for i in (0, 1))
    assert differ(first, again) and differ(first, run("llama", tree))
    np.testing.assert_array_equal(first, run("llama", tree, rng=jax.random.key(0)))
    np.testing.assert_array_equal(
        run("llama", drawn("llama", SOME), rng=jax.random.key(0)), run("llama", drawn("llama", SOME))
    )


def test_dropout_is_of_the_inputs_of_the_pair_alone():
    node = {"a": jnp.eye(400), "b": jnp.eye(400), "scale": jnp.float32(2), "dropout": jnp.float32(0.25)}
    x, w = jnp.ones((1, 1, 400)), jnp.zeros((400, 400))
    y = layers.adapted(x, w, jnp.full((1, 1, 400), 7.0), node | {"key": jax.random.key(0)})
    values, counts = np.unique(np.asarray(y), return_counts=True)
    np.testing.assert_allclose(values, [7, 7 + 2 / 0.75], rtol=1e-6)
    assert abs(counts[0] / 400 - 0.25) < 0.07


def test_a_fused_pair_drops_once_and_layers_and_pairs_apart():
    tree = drawn("phi3", Lora(rank=2, dropout=0.5, targets=("qkv_proj", "o_proj")))["layers"]
    one = jax.tree.map(lambda leaf: leaf[0], tree)
    data = lambda node: tuple(jax.random.key_data(node["key"]).tolist())
    first, second = (adapting.of_layer(one, jax.random.key(0), depth)["attn"] for depth in (0, 1))
    assert data(first["q"]) == data(first["k"]) == data(first["v"]) != data(first["o"])
    assert data(first["q"]) != data(second["q"])
    assert all("key" not in node for node in adapting.of_layer(one, None, 0)["attn"].values())


# Virtual tokens


@pytest.mark.parametrize(
    ("name", "kind"), [("mistral", "prefix"), ("gpt2", "prompt"), ("gpt2", "prefix"), ("qwen3_moe", "prompt")]
)
def test_packed_examples_all_see_virtual_tokens(name, kind):
    """Each example of a packed row gets what it gets alone, with padding, and nothing of its neighbour."""
    tree = drawn(name, VIRTUAL[kind])
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]] * 2)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, -1]] * 2)
    packed = run(name, tree, segments=segments, positions=positions)
    alone = lambda first, last: np.pad(TOKENS[:, first:last], ((0, 0), (0, 8 - last + first)))
    close(packed[:, :5], run(name, tree, alone(0, 5))[:, :5])
    close(packed[:, 5:7], run(name, tree, alone(5, 7))[:, :2])
    assert packed.shape == (*TOKENS.shape, 31)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_padding_on_the_left(kind):
    tree, tokens = drawn("gpt2", VIRTUAL[kind]), np.pad(TOKENS, ((0, 0), (2, 0)))
    got = run("gpt2", tree, tokens, valid=jnp.arange(10) >= jnp.array([[2], [2]]))
    close(got[:, 2:], run("gpt2", tree))


def test_a_prompt_is_in_no_result():
    m, tree = model(), drawn("llama", Prompt(tokens=3))
    x = decoder.embed(m.config, m.params, TOKENS)
    hidden, _, aux = decoder.trunk(m.config, m.params, x, taps=("residual",), adapters=tree)
    assert hidden.shape == x.shape and aux["residual"].shape == (2, *x.shape)


def test_a_prompt_of_embeddings_is_those_tokens():
    m = model()
    tree = {"prompt": {"w": m.params["embed"]["w"][np.array([4, 5, 6])]}}
    before = np.concatenate([np.array([[4, 5, 6]] * 2), TOKENS], 1)
    close(run("llama", tree), run("llama", tokens=before)[:, 3:])
    drew = init(Prompt(tokens=5, init="vocabulary"), m.family, m.config, m.params, jax.random.key(0))["prompt"]["w"]
    table = np.asarray(m.params["embed"]["w"])
    assert all((row == table).all(1).any() for row in np.asarray(drew))


def test_a_prefix_of_keys_is_those_tokens():
    """The keys and values that a pass over some tokens leaves in the cache, as a prefix, are those tokens."""
    m = model()
    first, at = np.array([[4, 5, 6]]), jnp.arange(3)[None]
    cache = decoder.init_cache(m.config, m.params, 1, 3)
    state = decoder.forward(m.config, m.params, first, positions=at, cache=cache)[1]["attention"]
    tree = {"layers": {"attn": {"prefix": {"k": state["k"][:, 0], "v": state["v"][:, 0]}}}}
    before = np.concatenate([np.repeat(first, 2, 0), TOKENS], 1)
    close(run("llama", tree), run("llama", tokens=before)[:, 3:])
