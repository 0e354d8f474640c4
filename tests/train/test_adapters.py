"""Adapters as parameters: fresh ones change nothing, merging is exact, only they get gradients, counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

import jaxlm
from jaxlm.checkpoints.load import flatten
from jaxlm.models import adapters as adapting
from jaxlm.models import decoder
from jaxlm.models.registry import family
from jaxlm.train.adapters import (
    Lora,
    Prefix,
    column_norms,
    count,
    init,
    is_trainable,
    merge,
    modules_of,
    unmerge,
)
from tests.adapters import EACH, LLAMA, MODELS, SOME, TOKENS, VIRTUAL, close, differ, drawn, model, run


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
    made = [jax.make_jaxpr(f)(params, tree).jaxpr for f in (loss, some, full)]
    counted = [dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0] for jaxpr in made]  # as before it is compiled
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


# Configs and counts


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
    for hf, rank, learnt, total in (
        (llama, 16, 8_404_992, 6_615_748_608),
        (mistral, 4, 1_720_320, 7_112_380_416),
    ):
        fam = family(hf["model_type"])
        adapter = Lora(rank=rank, alpha=16, targets=("q_proj", "v_proj"))
        counted = count(adapter, fam, fam.config(hf), head=head, peft_convention=True)
        assert (counted.trainable, counted.total) == (learnt, total)
        once = count(adapter, fam, fam.config(hf), head=head)
        assert (once.trainable, once.total) == (learnt - head, total - head)
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
