"""The parity check catches the mistakes that other implementations made: each is put in on purpose, and must show.

A mistake is a change of the loaded model's config or parameters, or of a function. The check is that of test_parity.py,
and the error must be more than ten times what it lets pass.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from jaxlm.api import Model
from jaxlm.kernels import masks
from jaxlm.models import decoder, self_attention
from jaxlm.models.layers import Norm
from tests.models.cases import CASES
from tests.models.reference import reference
from tests.models.test_parity import TOLERANCE, error, loaded

replace = dataclasses.replace
Mistake = Callable[[Model], Model]


# Changes of the config.


def config(**changes) -> Mistake:
    """Top-level fields, or those of a nested config given as a dict."""

    def change(model: Model) -> Model:
        c = model.config
        new = {k: replace(getattr(c, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
        return replace(model, config=replace(c, **new))

    return change


def kinds(change: Callable) -> Mistake:
    """change(kind) for every layer."""
    return lambda model: config(kinds=tuple(map(change, model.config.kinds)))(model)


def window(by: int) -> Mistake:
    return kinds(lambda kind: replace(kind, window=kind.window and kind.window + by))


def rope(**changes) -> Mistake:
    return kinds(lambda kind: replace(kind, rope=replace(kind.rope, **changes)))


def order(change: Callable) -> Mistake:
    """Another order of the layers' kinds over the same parameters."""
    return lambda model: config(kinds=tuple(change(list(model.config.kinds))))(model)


# Changes of the parameters.


def params(*edits: tuple[str, Callable]) -> Mistake:
    """Each edit is a path and what to make of the array there, or of all arrays below it."""

    def change(model: Model) -> Model:
        tree = jax.tree.map(lambda a: a, model.params)
        for path, edit in edits:
            *parents, last = path.split("/")
            node = tree
            for parent in parents:
                node = node[parent]
            node[last] = jax.tree.map(edit, node[last])
        return model.with_params(tree)

    return change


def swap_gate_and_up(model: Model) -> Model:
    mlp = model.params["layers"]["mlp"]
    swapped = mlp | {"gate": mlp["up"], "up": mlp["gate"]}
    return model.with_params(model.params | {"layers": model.params["layers"] | {"mlp": swapped}})


def untie(model: Model) -> Model:
    made = decoder.init(replace(model.config, tie_embeddings=False), jax.random.key(0))
    return config(tie_embeddings=False)(model).with_params(model.params | {"head": made["head"]})


zero = jnp.zeros_like
interleave_heads = lambda w: w.reshape(*w.shape[:2], w.shape[3], w.shape[2]).swapaxes(2, 3)  # (h n) read as (n h)
regroup_heads = lambda w: w[:, :, jnp.array([0, 2, 1, 3])]  # the queries of a key-value head taken alternately


# Changes of a function, undone by monkeypatch.


class PerHeadNorm(Norm):
    """The scale of all heads together, the statistics of each."""

    def __call__(self, x):
        y = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.config.eps)
        return y * self.get_variable("params", "scale")


def in_bfloat16(table):
    return lambda *args: tuple(t.astype(jnp.bfloat16).astype(jnp.float32) for t in table(*args))


PATCHES = {
    "rope-table-in-bfloat16": ("llama", decoder, "table", in_bfloat16(decoder.table)),
    "qk-norm-over-each-head": ("olmo2", self_attention, "Norm", PerHeadNorm),
    "sees-the-next-token": ("llama", self_attention, "CAUSAL", masks.Band(lo=-1)),
    "position-from-one-in-learned-table": (
        "gpt2",
        decoder,
        "_position_embed",
        lambda c: type("Shifted", (decoder.Embed,), {"table": lambda self: jnp.roll(decoder.Embed.table(self), 1, 0)})(
            (c.context, c.d_model), ("positions", "embed")
        ),
    ),
}

MISTAKES: list[tuple[str, str, Mistake]] = [
    ("window-one-longer", "mistral", window(1)),
    ("window-one-shorter", "mistral", window(-1)),
    ("window-one-longer", "gemma3_text", window(1)),
    ("window-ignored", "phi3", kinds(lambda kind: replace(kind, window=None))),
    ("windows-on-the-first-layers", "qwen2", order(lambda ks: ks[::-1])),
    ("global-layer-one-too-early", "gemma3_text", order(lambda ks: [*ks[1:], ks[0]])),
    ("one-theta-for-all-layers", "gemma3_text", rope(theta=1733.0)),
    ("theta-ignored", "llama", rope(theta=10_000.0)),
    ("linear-ignored", "rope-linear-4.x", rope(scaling="default")),
    ("dynamic-ignored", "rope-dynamic", rope(scaling="default")),
    ("llama3-ignored", "rope-llama3", rope(scaling="default")),
    ("yarn-ignored", "rope-yarn", rope(scaling="default")),
    ("yarn-truncated", "rope-yarn-untruncated", rope(truncate=True)),
    ("yarn-default-betas", "rope-yarn-factor-betas", rope(ramp=(32.0, 1.0))),
    ("yarn-mscale-ignored", "rope-yarn-mscale", rope(attention_factor=1.1386)),
    ("longrope-short-set", "rope-longrope-long", rope(original_context=64)),
    ("longrope-factor-ignored", "phi3-longrope-long", rope(attention_factor=1.0)),
    ("partial-rotary-ignored", "rope-partial", rope(dim=12)),
    ("rope-interleaved", "llama", rope(interleaved=True)),
    ("gelu-tanh-for-exact", "llama-biases-tied-gelu-4.x", config(mlp={"act": "gelu_tanh"})),
    ("gelu-exact-for-tanh", "gemma", config(mlp={"act": "gelu"})),
    ("gelu-exact-for-tanh", "gpt2", config(mlp={"act": "gelu"})),
    ("gate-and-up-swapped", "llama", swap_gate_and_up),
    ("norm-offset-forgotten", "gemma2", config(norm={"kind": "rms"})),
    ("norm-offset-added", "llama", config(norm={"kind": "rms1p"})),
    ("norm-without-mean", "gpt2", config(norm={"kind": "rms"})),
    ("post-norm-dropped", "gemma2", config(post_norm=False)),
    ("pre-norm-for-post-norm", "olmo2", lambda m: pre_normed(m)),
    ("eps-default", "llama", config(norm={"eps": 1e-6})),
    ("eps-a-little-off", "gpt2", config(norm={"eps": 2.9e-3})),
    ("qk-norm-dropped", "qwen3", config(attention={"qk_norm": None})),
    ("attention-scale-dropped", "gemma2", config(attention={"scale": None})),
    ("attention-scale-dropped", "granite", config(attention={"scale": None})),
    ("attention-scale-kept", "gpt2-unscaled-4.x", config(attention={"scale": None})),
    ("inverse-depth-scale-dropped", "gpt2-variant", config(attention={"divide_by_depth": False})),
    ("attention-softcap-dropped", "gemma2", config(attention={"softcap": None})),
    ("logit-softcap-dropped", "gemma2", config(logit_softcap=None)),
    ("embed-scale-dropped", "gemma", config(embed_scale=1.0)),
    ("residual-scale-dropped", "granite", config(residual_scale=1.0)),
    ("logit-scale-dropped", "granite", config(logit_scale=1.0)),
    ("heads-transposed-in-fused-qkv", "phi3", params(("layers/attn/q/w", interleave_heads))),
    ("heads-transposed-in-fused-qkv", "gpt2", params(("layers/attn/v/w", interleave_heads))),
    ("grouped-heads-alternating", "llama", params(("layers/attn/q/w", regroup_heads))),
    ("query-bias-dropped", "qwen2", params(("layers/attn/q/b", zero))),
    ("value-bias-dropped", "gpt2", params(("layers/attn/v/b", zero))),
    ("output-bias-dropped", "llama-biases-tied-gelu-4.x", params(("layers/attn/o/b", zero))),
    ("mlp-bias-dropped", "llama-biases-tied-gelu-4.x", params(("layers/mlp/gate/b", zero))),
    ("norm-bias-dropped", "gpt2", params(("final_norm/bias", zero))),
    ("square-matrix-transposed", "gpt2", params(("layers/attn/o/w", lambda w: transposed(w)))),
    ("tied-head-untied", "qwen3", untie),
    ("experts-not-renormalised", "mixtral", config(moe={"renormalise": False})),
    ("experts-renormalised", "qwen3_moe-mlp-only-4.x", config(moe={"renormalise": True})),
    ("one-expert-fewer", "mixtral", config(moe={"top_k": 1})),
]


def pre_normed(model: Model) -> Model:
    """Olmo 2's norms, which follow each branch, used before it as in Llama."""
    layers = dict(model.params["layers"])
    layers |= {"attn_norm": layers["attn_post_norm"], "mlp_norm": layers["mlp_post_norm"]}
    return config(pre_norm=True, post_norm=False)(model).with_params(model.params | {"layers": layers})


def transposed(w: jax.Array) -> jax.Array:
    """[L, N, H, D] with N H = D, as if the checkpoint's matrix were stored the other way round."""
    layers, *heads, d = w.shape
    return w.reshape(layers, d, d).swapaxes(1, 2).reshape(layers, *heads, d)


def parity_error(model: Model, case) -> float:
    want = reference(case)
    forward = lambda params, tokens: model.family.backbone.forward(model.config, params, tokens)[0]
    return error(jax.jit(forward)(model.params, want.tokens), want.logits)


def find(case_id: str):
    (case,) = [case for case in CASES if case.id == case_id]
    return case


@pytest.mark.slow
@pytest.mark.parametrize(("case_id", "mistake"), [m[1:] for m in MISTAKES], ids=[f"{m[0]}-{m[1]}" for m in MISTAKES])
def test_mistake_is_caught(case_id, mistake):
    case = find(case_id)
    assert parity_error(mistake(loaded(case)), case) > 10 * TOLERANCE


@pytest.mark.parametrize("name", PATCHES)
def test_mistake_in_a_function_is_caught(name, monkeypatch):
    case_id, module, attribute, wrong = PATCHES[name]
    case = find(case_id)
    model = loaded(case)
    monkeypatch.setattr(module, attribute, wrong)
    assert parity_error(model, case) > 10 * TOLERANCE


def test_the_check_passes_without_a_mistake():
    case = find("gemma2")
    assert parity_error(config(mlp={"act": "gelu_tanh"})(loaded(case)), case) <= TOLERANCE
