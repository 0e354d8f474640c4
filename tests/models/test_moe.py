"""Mixture of experts against the definition, expert by expert and token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.config import MlpConfig, MoeConfig
from jaxlm.models.moe import Moe, load_balancing_loss

B, T, D, E, K, F = 2, 5, 6, 4, 2, 7


def build(**changes):
    config = MoeConfig(n_experts=E, top_k=K, expert=MlpConfig(d_ff=F), **({"renormalise": True} | changes))
    module, x = Moe(config, D, 0.5), jax.random.normal(jax.random.key(1), (B, T, D))
    params = jax.tree.map(
        lambda b: b.value, module.init(jax.random.key(0), x)["params"], is_leaf=lambda b: hasattr(b, "names")
    )
    return module, params, x


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(p, x):
    return (silu(x @ p["gate"]["w"]) * (x @ p["up"]["w"])) @ p["down"]["w"]


def by_definition(config, params, x):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    out = np.zeros(x.shape)
    for b, t in np.ndindex(B, T):
        row = np.asarray(x[b, t], np.float64)
        logits = row @ p["router"]["gate"]["w"]
        probs = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-probs)[: config.top_k]
        total = probs[best].sum() if config.renormalise else 1
        for e in best:
            out[b, t] += probs[e] / total * swiglu(jax.tree.map(lambda a, e=e: a[e], p["experts"]), row)
        if config.shared is not None:
            gate = 1 / (1 + np.exp(-row @ p["shared_gate"]["w"])) if config.shared_gate else 1
            out[b, t] += gate * swiglu(p["shared"], row)
    return out


@pytest.mark.parametrize(
    "changes",
    [{}, {"renormalise": False}, {"shared": MlpConfig(d_ff=3)}, {"shared": MlpConfig(d_ff=3), "shared_gate": True}],
    ids=["renormalised", "raw", "shared", "gated"],
)
def test_equals_the_definition(changes):
    module, params, x = build(**changes)
    got, _ = module.apply({"params": params}, x)
    np.testing.assert_allclose(got, by_definition(module.config, params, x), rtol=1e-5, atol=1e-5)


def test_nothing_is_dropped_when_all_tokens_choose_one_expert():
    module, params, x = build()
    x = jnp.broadcast_to(x[:1, :1], x.shape)
    got, statistics = module.apply({"params": params}, x)
    np.testing.assert_allclose(got, by_definition(module.config, params, x), rtol=1e-5, atol=1e-5)
    assert sorted(np.asarray(statistics["router_picks"].sum(0))) == [0, 0, B * T, B * T]


def test_the_router_stays_in_float32():
    module, params, x = build()
    half, _ = module.apply({"params": params}, x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    jaxpr = str(jax.make_jaxpr(lambda x: module.apply({"params": params}, x))(x.astype(jnp.bfloat16)))
    (top_k,) = [line for line in jaxpr.splitlines() if "top_k[" in line]
    assert f"f32[{B},{T},{K}]" in top_k


def test_gradients_equal_those_of_a_dense_mixture():
    module, params, x = build()

    def dense(params, x):
        probs = jax.nn.softmax(x @ params["router"]["gate"]["w"])
        weights, chosen = jax.lax.top_k(probs, K)
        weights = (jax.nn.one_hot(chosen, E) * (weights / weights.sum(-1, keepdims=True))[..., None]).sum(-2)
        p = params["experts"]
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["gate"]["w"])) * jnp.einsum("btd,edf->btef", x, p["up"]["w"])
        return jnp.einsum("btef,efd,bte->btd", h, p["down"]["w"], weights)

    loss = lambda f: lambda p, x: jnp.square(f(p, x)).sum()
    got = jax.grad(loss(lambda p, x: module.apply({"params": p}, x)[0]), (0, 1))(params, x)
    want = jax.grad(loss(dense), (0, 1))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_padding_does_not_count_in_the_loss():
    module, params, x = build()
    valid = jnp.arange(T)[None] < jnp.array([T, 2])[:, None]
    loss = lambda s: load_balancing_loss(*(s[n][None] for n in ("router_picks", "router_probs", "router_tokens")))
    _, masked = module.apply({"params": params}, x, valid)
    apart = [module.apply({"params": params}, x[b : b + 1, :n])[1] for b, n in ((0, T), (1, 2))]
    together = jax.tree.map(lambda *a: sum(a), *apart)
    np.testing.assert_allclose(loss(masked), loss(together), rtol=1e-6)
