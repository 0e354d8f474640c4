"""Adapters: fresh ones change nothing, merging is exact, only they get gradients, virtual tokens are seen by all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.checkpoints.load import flatten, unflatten
from jaxlm.models import adapters as adapting
from jaxlm.models import decoder, layers
from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import family
from jaxlm.train.adapters import (
    Lora,
    Prefix,
    Prompt,
    column_norms,
    count,
    init,
    is_trainable,
    merge,
    modules_of,
    unmerge,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-3,
    "hidden_act": "silu",
    "initializer_range": 0.2,
}
PHI3 = LLAMA | {"model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 48}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 5}
MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 31,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 48,
    "layer_norm_epsilon": 1e-3,
    "activation_function": "gelu_new",
    "initializer_range": 0.2,
}
MODELS = {"llama": LLAMA, "phi3": PHI3, "mistral": MISTRAL, "qwen3_moe": MOE, "gpt2": GPT2}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 8))
forward = jax.jit(decoder.forward, static_argnums=0, static_argnames=("runtime", "taps"))


@functools.cache
def model(name="llama"):
    return jaxlm.init(MODELS[name], key=jax.random.key(0))


@functools.cache
def drawn(name, config, seed=1):
    """Adapters with every learned number drawn; those of DoRA's m near what they were."""
    m = model(name)
    flat = flatten(init(config, m.family, m.config, m.params, jax.random.key(seed)))
    for i, path in enumerate(filter(is_trainable, list(flat))):
        noise = 0.3 * jax.random.normal(jax.random.key(100 * seed + i), flat[path].shape)
        flat[path] = flat[path] + noise if "/m" in path else noise
    return unflatten(flat)


def run(name, adapters=None, tokens=TOKENS, params=None, **options):
    m = model(name)
    return forward(m.config, m.params if params is None else params, tokens, adapters=adapters, **options)[0]


def close(got, want, tolerance=3e-6):
    assert np.abs(np.asarray(got) - np.asarray(want)).max() <= tolerance * np.abs(np.asarray(want)).max()


def differ(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-2 * np.abs(np.asarray(b)).max()


SOME = Lora(rank=3, alpha=5, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
EACH = {
    "llama": SOME,
    "llama-dora": dataclasses.replace(SOME, dora=True),
    "phi3": Lora(rank=3, targets=("qkv_proj", "gate_up_proj"), dora=True),
    "gpt2": Lora(rank=3),
    "qwen3_moe": Lora(rank=3, targets=("k_proj", "layers.1.mlp.up_proj"), rslora=True),
}


# What is there without adapters


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


# Fresh adapters


@pytest.mark.parametrize("case", EACH)
def test_fresh_adapters_change_nothing(case):
    name = case.split("-")[0]
    m = model(name)
    tree = init(EACH[case], m.family, m.config, m.params, jax.random.key(0))
    close(run(name, tree), run(name))
    assert differ(run(name, drawn(name, EACH[case])), run(name))


def test_fresh_pairs_are_those_of_peft():
    """kaiming_uniform with a = sqrt(5) is uniform within 1 / sqrt(inputs); b is zero; every layer is drawn anew."""
    fam = family("llama")
    config = fam.config(LLAMA | {"hidden_size": 256, "intermediate_size": 512})
    shapes = jax.eval_shape(lambda: fam.backbone.init(config, jax.random.key(0)))
    adapter = Lora(rank=16, targets=("q_proj", "o_proj", "down_proj"))
    made = flatten(init(adapter, fam, config, shapes, jax.random.key(0)))
    assert made["layers/attn/o/a"].shape == (2, 4, 64, 16) and made["layers/mlp/down/b"].shape == (2, 16, 256)
    for path, inputs in (("attn/q", 256), ("attn/o", 256), ("mlp/down", 512)):
        a = np.asarray(made[f"layers/{path}/a"])
        assert 0.97 < np.abs(a).max() * inputs**0.5 <= 1 and abs(a.std() * (3 * inputs) ** 0.5 - 1) < 0.03
        assert not np.array_equal(a[0], a[1]) and not np.asarray(made[f"layers/{path}/b"]).any()
    assert not np.array_equal(made["layers/attn/q/a"].reshape(-1), made["layers/attn/o/a"].reshape(-1))


def test_ranks_and_scales_by_layer():
    """A lower rank is zeros beyond it, a layer without the adapter a scale of 0; and neither ever learns."""
    adapter = Lora(
        rank=2, alpha=6, targets=r".*(q_proj|layers\.1.*v_proj)", rank_pattern=((r"layers\.1\..*q_proj", 4),)
    )
    m = model()
    tree = init(adapter, m.family, m.config, m.params, jax.random.key(0))
    q, v = tree["layers"]["attn"]["q"], tree["layers"]["attn"]["v"]
    assert q["a"].shape == (2, 16, 4) and not np.asarray(q["a"][0, :, 2:]).any() and np.asarray(q["a"][1]).all()
    np.testing.assert_allclose(q["scale"], [3.0, 1.5])
    np.testing.assert_allclose(v["scale"], [0.0, 3.0])
    rs = init(dataclasses.replace(adapter, rslora=True), m.family, m.config, m.params, jax.random.key(0))
    np.testing.assert_allclose(rs["layers"]["attn"]["q"]["scale"], [6 / 2**0.5, 3.0])
    for _ in range(2):  # after one step b is not zero where it may learn
        grads = jax.grad(lambda t: run("llama", t).var())(tree)
        tree = jax.tree.map(lambda x, g: x - 0.1 * g, tree, grads)
        flat = flatten(grads)
        assert not any(np.asarray(leaf).any() for path, leaf in flat.items() if not is_trainable(path))
    q, v = tree["layers"]["attn"]["q"], tree["layers"]["attn"]["v"]
    assert not np.asarray(q["a"][0, :, 2:]).any() and not np.asarray(q["b"][0, 2:]).any()
    assert not np.asarray(v["b"][0]).any() and np.asarray(v["b"][1]).any() and np.asarray(q["b"][1, 2:]).any()


# Merging


@pytest.mark.parametrize("case", EACH)
def test_merged_weights_compute_the_same(case):
    name = case.split("-")[0]
    tree, params = drawn(name, EACH[case]), model(name).params
    merged = merge(params, tree)
    close(run(name, params=merged), run(name, tree))
    norms = column_norms(params, tree)
    back = flatten(unmerge(merged, tree, norms))
    assert bool(norms) == EACH[case].dora
    touched = [path for path, leaf in flatten(merged).items() if leaf is not flatten(params)[path]]
    assert len(touched) == sum(len(adapting.members(*pair)) for pair in adapting.pairs(tree["layers"]))
    for path, leaf in flatten(params).items():
        np.testing.assert_allclose(back[path], leaf, rtol=1e-4, atol=2e-6)
        assert path in touched or back[path] is leaf


def test_merging_half_precision_rounds_once():
    params = jax.tree.map(lambda x: x.astype("bfloat16"), model().params)
    tree = drawn("llama", SOME)
    merged = merge(params, tree)["layers"]["attn"]["q"]["w"]
    pair = tree["layers"]["attn"]["q"]
    exact = params["layers"]["attn"]["q"]["w"].astype("float32") + 5 / 3 * jnp.einsum(
        "ldr,lrnh->ldnh", pair["a"], pair["b"]
    )
    assert merged.dtype == jnp.bfloat16 and np.mean(np.asarray(merged == exact.astype("bfloat16"))) > 0.99


def test_what_cannot_be_merged():
    m = model()
    tree = drawn("llama", EACH["llama-dora"])
    with pytest.raises(ValueError, match="DoRA is unmerged with norms=column_norms"):
        unmerge(merge(m.params, tree), tree)
    with pytest.raises(ValueError, match="only low-rank pairs can be merged"):
        merge(m.params, drawn("llama", Prefix(tokens=2)))
    with pytest.raises(ValueError, match="adapters for layers/attn/x/w, and the parameters have no such weight"):
        merge(m.params, {"layers": {"attn": {"x": tree["layers"]["attn"]["q"]}}})


# How layers run


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


# Gradients


def dots(jaxpr, out=None) -> int:
    """Matrix products in a jaxpr and what it calls, or those whose result has one of these shapes, sorted."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += out is None or tuple(sorted(eqn.outvars[0].aval.shape)) in out
        for sub in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            sub = getattr(sub, "jaxpr", sub)
            total += dots(sub, out) if hasattr(sub, "eqns") else 0
    return total


@pytest.mark.parametrize("dora", [False, True])
def test_frozen_weights_get_no_gradient(dora):
    """No product makes the gradient of a weight, and the compiled step holds none."""
    wide = jaxlm.init(LLAMA | {"hidden_size": 64, "intermediate_size": 200, "num_hidden_layers": 4})
    params, config = wide.params, wide.config
    adapter = Lora(rank=2, targets=("q_proj", "v_proj"), dora=dora)
    tree = init(adapter, wide.family, config, params, jax.random.key(0))
    loss = lambda params, tree: decoder.forward(config, params, TOKENS, adapters=tree)[0].var()
    some, full = jax.grad(loss, argnums=1), jax.grad(loss, argnums=(0, 1))
    own = [leaf.shape[1:] for path, leaf in flatten(params["layers"]).items() if path.endswith("/w")]
    weights = {tuple(sorted(shape)) for shape in own} | {(64, 64), (32, 64)}
    counted = [jax.make_jaxpr(f)(params, tree).jaxpr for f in (loss, some, full)]
    forward_only, of_some, of_full = (dots(jaxpr, weights) for jaxpr in counted)
    assert forward_only == 2 * dora  # DoRA's norms need the products a b
    assert of_some == forward_only, "a gradient of a weight is computed"
    assert of_full == forward_only + 7  # of q, k, v, o, gate, up and down, once in the scan
    assert dots(counted[1]) < dots(counted[2])
    if dora:
        return
    temp = [jax.jit(f).lower(params, tree).compile().memory_analysis() for f in (some, full)]
    stacked = sum(leaf.nbytes for path, leaf in flatten(params).items() if path.startswith("layers/"))
    held = [memory.temp_size_in_bytes + memory.output_size_in_bytes for memory in temp]
    assert held[1] - held[0] > 0.9 * stacked, (held, stacked)


# Virtual tokens

VIRTUAL = {"prefix": Prefix(tokens=3), "prompt": Prompt(tokens=3)}


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "lora"), ("llama", "prefix"), ("mistral", "prefix"), ("mistral", "prompt"), ("gpt2", "prompt")],
)
def test_generation_is_greedy_with_adapters(name, kind):
    """Cache, ring and merged weights against whole passes; and logprobs are of the same model."""
    config = VIRTUAL.get(kind, Lora(rank=3))
    base, tree = model(name), drawn(name, config)
    adapted = base.with_adapters(tree, config)
    got = adapted.generate(TOKENS, max_new_tokens=6, temperature=0.0)
    tokens = np.concatenate([TOKENS, np.zeros((2, 6), int)], 1)
    for i in range(8, 14):  # what comes later changes nothing
        tokens[:, i] = np.asarray(run(name, tree, tokens))[:, i - 1].argmax(-1)
    assert np.array_equal(got, tokens[:, 8:])
    logits = jax.nn.log_softmax(run(name, tree, tokens)[:, :7])
    want = np.take_along_axis(np.asarray(logits), TOKENS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(adapted.logprobs(TOKENS), want, atol=2e-5)
    close(adapted(TOKENS), run(name, tree, tokens)[:, :8])
    if name == "gpt2":
        return
    session = adapted.session(temperature=0.0, max_new_tokens=6)
    ids = TOKENS[0].tolist()
    turns = [session.answer(ids, 3).tokens.tolist()]
    turns += session.answer(ids + turns[0], 3).tokens.tolist()
    assert turns[0] + turns[1:] == tokens[0, 8:].tolist() and session.reused > 0


# The model


@pytest.mark.parametrize("kind", ["stacked", "unrolled"])
def test_a_model_with_merged_adapters_is_saved(kind, tmp_path):
    base = jaxlm.init(LLAMA, key=jax.random.key(0), layers=kind)
    adapted = base.with_adapters(drawn("llama", SOME), SOME)
    want = run("llama", drawn("llama", SOME))
    close(adapted(TOKENS), want)
    with pytest.raises(ValueError, match=r"merge_adapters\(\).save\(\) or save_adapters\(\)"):
        adapted.save(tmp_path / "out")
    adapted.merge_adapters().save(tmp_path / "out")
    close(jaxlm.load(tmp_path / "out")(TOKENS), want)
    assert adapted.merge_adapters().adapters is None
    close(adapted.with_adapters(None)(TOKENS), run("llama"))


def test_new_parameters_are_merged_anew():
    adapted = jaxlm.init(LLAMA, key=jax.random.key(0)).with_adapters(drawn("llama", SOME), SOME)
    before = adapted.generate(TOKENS, max_new_tokens=4, temperature=0.0)
    other = jaxlm.init(LLAMA, key=jax.random.key(9)).params
    adapted.params = other
    after = adapted.generate(TOKENS, max_new_tokens=4, temperature=0.0)
    want = jaxlm.init(LLAMA).with_params(other).with_adapters(drawn("llama", SOME), SOME)
    assert not np.array_equal(before, after)
    assert np.array_equal(after, want.generate(TOKENS, max_new_tokens=4, temperature=0.0))


def pair(**changes):
    made = {"a": jnp.zeros((2, 16, 2)), "b": jnp.zeros((2, 2, 4, 4)), "scale": jnp.ones(2)}
    return made | changes


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers": {"attn": {"qq": pair()}}}, "adapters for layers/attn/qq, where .* no weight, did you mean attn/q"),
        ({"layers": {"moe": {"attn": {"q": pair()}}}}, "adapters for layers/moe, expected some of"),
        ({"layer": {}}, "an adapters tree has layers and prompt, and this one 'layer'"),
        (
            {"layers": {"attn": {"q": pair(b=jnp.zeros((2, 2, 5, 4)))}}},
            r"fit a weight \(16, 5, 4\), it is \(2, 16, 4, 4\)",
        ),
        (
            {
                "prompt": {"w": jnp.zeros((2, 16))},
                "layers": {"attn": {"prefix": {"k": jnp.zeros((2, 2, 2, 4)), "v": 0}}},
            },
            "one prompt, or a prefix of one length",
        ),
    ],
    ids=["path", "group", "top", "shape", "both"],
)
def test_trees_that_do_not_fit(tree, message):
    with pytest.raises(ValueError, match=message):
        model().with_adapters(tree)


def test_refusals():
    m = model()
    adapted = m.with_adapters(drawn("llama", SOME))
    with pytest.raises(ValueError, match="has adapters already"):
        adapted.with_adapters(drawn("llama", SOME))
    with pytest.raises(ValueError, match="adapters without a config cannot be written"):
        adapted.save_adapters("nowhere")
    with pytest.raises(ValueError, match="has no adapters"):
        m.merge_adapters()
    with pytest.raises(ValueError, match="only low-rank pairs can be merged"):
        m.with_adapters(drawn("llama", Prefix(tokens=3))).merge_adapters()
    with pytest.raises(ValueError, match="46 tokens beside 3 virtual ones do not fit the model's context of 48"):
        m.with_adapters(drawn("llama", Prompt(tokens=3)))(np.ones((1, 46), int))
    with pytest.raises(ValueError, match="do not fit the model's context of 45"):
        m.with_adapters(drawn("llama", Prompt(tokens=3))).generate(TOKENS, max_new_tokens=38)
    with pytest.raises(ValueError, match="with a cache, virtual tokens are in it"):
        cache = decoder.init_cache(m.config, m.params, 2, 12)
        decoder.forward(
            m.config,
            m.params,
            TOKENS,
            positions=jnp.arange(8)[None],
            cache=cache,
            adapters=drawn("llama", Prefix(tokens=3)),
        )


def test_experts_and_routers_take_no_adapters():
    m = model("qwen3_moe")
    for target in ("experts.0.up_proj", "mlp.gate"):
        with pytest.raises(ValueError, match="experts and their routers take no adapters"):
            count(Lora(targets=(target,)), m.family, m.config)
    shape = m.params["layers"]["moe"]["mlp"]["experts"]["up"]["w"].shape
    node = {"a": jnp.zeros((*shape[:-1], 2)), "b": jnp.zeros((shape[0], 2, shape[-1])), "scale": jnp.ones(shape[0])}
    with pytest.raises(NotImplementedError, match="mlp/experts/up: experts take none"):
        run("qwen3_moe", {"layers": {"moe": {"mlp": {"experts": {"up": node}}}}})
    names = {name.rsplit(".", 1)[1] for name in modules_of(m.family, m.config).by_name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: expected a whole number"),
        ({"alpha": -1}, "alpha=-1: expected a number above 0"),
        ({"dropout": 1.0}, "dropout=1.0: expected a rate"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": "q.*", "layers": (1,)}, "needs targets by name"),
    ],
)
def test_configs_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


# Counts


def test_published_counts():
    """Of the LoRA classification post, from shapes alone; it prints r=2 for Mistral, and the count of r=4."""
    llama = LLAMA | {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    mistral = llama | {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }
    head = 2 * 4096
    for hf, rank, trainable, total in (
        (llama, 16, 8_404_992, 6_615_748_608),
        (mistral, 4, 1_720_320, 7_112_380_416),
    ):
        fam = family(hf["model_type"])
        adapter = Lora(rank=rank, alpha=16, targets=("q_proj", "v_proj"))
        counted = count(adapter, fam, fam.config(hf), head=head, peft_convention=True)
        assert (counted.trainable, counted.total) == (trainable, total)
        once = count(adapter, fam, fam.config(hf), head=head)
        assert (once.trainable, once.total) == (trainable - head, total - head)
    assert f"{100 * counted.share:.5f}" == "0.02419"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["lora", "dora", "prefix", "prompt"])
def test_counts_are_of_what_learns(name, kind):
    m = model(name)
    adapter = VIRTUAL.get(kind) or Lora(rank=3, dora=kind == "dora")
    tree = flatten(init(adapter, m.family, m.config, m.params, jax.random.key(0)))
    counted = count(adapter, m.family, m.config)
    assert counted.trainable == sum(leaf.size for path, leaf in tree.items() if is_trainable(path))
    assert counted.total == counted.trainable + sum(leaf.size for leaf in jax.tree.leaves(m.params))
