import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.kernels.attention as module
from jaxlm.kernels.attention import attention
from jaxlm.kernels.call import call_of
from jaxlm.kernels.cudnn import cudnn, refuses_cudnn
from jaxlm.kernels.masks import CAUSAL, EVERYTHING, KeysBefore, dense, window

B, T, S, N, K, H = 2, 7, 9, 4, 2, 8


def arrays(seed=0, dtype=np.float32, t=T, s=S, v_dim=H):
    rng = np.random.default_rng(seed)
    shapes = ((B, t, N, H), (B, s, K, H), (B, s, K, v_dim))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def plain(q, k, v, seen, scale, softcap=None, bias=0.0, sinks=None):
    """One row at a time in float64, by the definition."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros((*q.shape[:3], v.shape[-1])), np.full(q.shape[:3], -np.inf)
    bias = np.broadcast_to(bias, (B, N, q.shape[1], k.shape[1]))
    for b, t, n in np.ndindex(*q.shape[:3]):
        logits = k[b, :, n // (N // K)] @ q[b, t, n] * scale
        logits = softcap * np.tanh(logits / softcap) if softcap else logits
        weights = np.where(seen[b, t], np.exp(logits + bias[b, n, t]), 0)
        total = weights.sum() + (np.exp(sinks[n]) if sinks is not None else 0)
        if total:
            out[b, t, n], lse[b, t, n] = weights @ v[b, :, n // (N // K)] / total, np.log(total)
    return out, lse


@pytest.mark.parametrize("mask", [CAUSAL, EVERYTHING, window(3), window(3) | KeysBefore(2)], ids=str)
def test_masks_and_log_sum_exp(mask):
    q, k, v = arrays(v_dim=5)
    seen = np.broadcast_to(dense(mask, T, S), (B, T, S))
    out, lse = attention(q, k, v, mask, return_lse=True, impl="reference")
    want, want_lse = plain(q, k, v, seen, H**-0.5)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_every_option_together():
    q, k, v = arrays(1)
    rng = np.random.default_rng(2)
    q_pos, k_pos = rng.integers(0, 20, (B, T)), rng.integers(-1, 20, (B, S))
    q_seg, k_seg = rng.integers(0, 2, (B, T)), rng.integers(0, 2, (B, S))
    k_valid = rng.random((B, S)) < 0.8
    bias, sinks = rng.normal(size=(1, N, T, S)).astype(np.float32), rng.normal(size=N).astype(np.float32)
    arrays_given = {
        "q_pos": q_pos, "k_pos": k_pos, "q_segments": q_seg, "k_segments": k_seg, "k_valid": k_valid,
        "bias": bias, "sinks": sinks,
    }  # fmt: skip
    given = {name: jnp.asarray(value) for name, value in arrays_given.items()}
    out = attention(q, k, v, window(9), scale=0.3, softcap=1.5, **given)
    distance = q_pos[:, :, None] - k_pos[:, None]
    seen = (distance >= 0) & (distance < 9) & (k_pos >= 0)[:, None] & (q_seg[:, :, None] == k_seg[:, None])
    want, _ = plain(q, k, v, seen & k_valid[:, None], 0.3, 1.5, bias, sinks)
    np.testing.assert_allclose(out, want, atol=2e-6)


def test_a_query_that_sees_nothing_is_zero_with_finite_gradients():
    q, k, v = arrays(t=3)
    nothing = jnp.zeros((B, S), bool)
    run = lambda q, k, v: attention(q, k, v, CAUSAL, k_valid=nothing)
    assert (np.asarray(run(q, k, v)) == 0).all()
    for gradient in jax.grad(lambda *a: run(*a).sum(), argnums=(0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()


def test_dropout_keeps_the_expectation():
    q, k, v = arrays()
    once = jax.jit(lambda key: attention(q, k, v, CAUSAL, dropout=(0.3, key)))
    mean = jnp.mean(jax.vmap(once)(jax.random.split(jax.random.key(0), 4000)), 0)
    np.testing.assert_allclose(mean, attention(q, k, v, CAUSAL), atol=0.1)
    assert not np.array_equal(once(jax.random.key(0)), once(jax.random.key(1)))


def judged(platform="gpu", mask=CAUSAL, given=(), dtype=jnp.bfloat16, v_dim=H, t=T, capability=None, lse=False):
    call = call_of(*arrays(dtype=dtype, v_dim=v_dim, t=t), mask, given, lse, platform)
    return refuses_cudnn(dataclasses.replace(call, capability=capability))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "cpu"}, "NVIDIA GPU, the platform is 'cpu'"),
        ({"dtype": jnp.float32}, "computes in float16 or bfloat16, got float32"),
        ({"given": {"softcap", "sinks"}}, "has no sinks, softcap"),
        ({"mask": CAUSAL | KeysBefore(3)}, "has no exact form of Or"),
        ({"v_dim": 4}, "equal head dims"),
        ({"lse": True}, "rounded to the inputs' dtype and without its gradient"),
        ({"mask": window(3), "t": S + 3}, "undefined where a query sees no key, as with 12 queries and 9 keys"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_cudnn_says_what_it_refuses(change, reason):
    assert reason in judged(**change)


def test_cudnn_takes_wide_heads_from_hopper_on():
    wide = lambda capability: refuses_cudnn(
        dataclasses.replace(
            call_of(*(jax.ShapeDtypeStruct((1, 8, 2, 256), jnp.bfloat16),) * 3, CAUSAL, platform="gpu"),
            capability=capability,
        )
    )
    assert wide((9, 0)) is None
    for capability in ((8, 9), None):
        assert "up to 128, got 256" in wide(capability)


def test_cudnn_accepts_causal_windows_and_says_the_same_to_jax():
    """The arguments that cuDNN would get, given to jax.nn's portable implementation of the same call."""
    q, k, v = arrays(t=S)
    for mask in (CAUSAL, EVERYTHING, window(3)):
        assert judged(mask=mask) is None
        run = functools.partial(cudnn, scale=0.3, implementation="xla")
        np.testing.assert_allclose(run(q, k, v, mask), attention(q, k, v, mask, scale=0.3), atol=2e-6)


def test_a_named_implementation_never_falls_back():
    q, k, v = arrays()
    with pytest.raises(NotImplementedError, match=r"'cudnn' needs an NVIDIA GPU"):
        attention(q, k, v, CAUSAL, impl="cudnn")
    with pytest.raises(ValueError, match=r"unknown attention implementation 'flsh'; there are .*cudnn, .*reference"):
        attention(q, k, v, CAUSAL, impl="flsh")


def test_the_choice_is_logged_once(caplog):
    module._logged.clear()
    q, k, v = arrays(t=20)
    with caplog.at_level("INFO", logger="jaxlm"):
        attention(q, k, v, CAUSAL)
        attention(q, k, v, CAUSAL)
        attention(q[:, :18], k, v, CAUSAL)  # nor once for every length
    (record,) = caplog.records
    assert record.getMessage().startswith("attention uses reference; ")
    assert "; cudnn needs an NVIDIA GPU, the platform is 'cpu'" in record.getMessage()


def test_an_implementation_of_another_platform_is_not_imported():
    elsewhere = module.Implementation("mosaic", "no.such.module", "tpu")
    call = call_of(*arrays(), CAUSAL, platform="gpu")
    assert elsewhere.refuses(call) == "needs a TPU, the platform is 'gpu'"


def test_bad_shapes_are_named():
    """What a user gets; in tests the annotations of `attention` would refuse these first."""
    q, k, v = arrays()
    check = module._check_shapes
    with pytest.raises(ValueError, match=r"q\.shape=\(2, 7, 3, 8\) k\.shape=\(2, 9, 2, 8\)"):
        check(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="q BTNH, k BSKH"):
        check(q[0], k, v)
    with pytest.raises(ValueError, match="given together"):
        attention(q, k, v, CAUSAL, q_segments=jnp.zeros((B, T), int))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sinks": (3,)}, r"sinks must have shape \(4,\), or 1 where it broadcasts; got \(3,\)"),
        ({"alibi": (1,)}, r"alibi must have shape \(4,\)"),
        ({"bias": (1, 2, T, S)}, r"bias must have shape \(2, 4, 7, 9\)"),
        ({"q_pos": (T,)}, r"q_pos must have shape \(2, 7\)"),
        ({"k_valid": (B, T)}, r"k_valid must have shape \(2, 9\)"),
    ],
    ids=str,
)
def test_features_that_do_not_fit_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        module._check_features((B, T, N, H), S, {name: jnp.zeros(shape) for name, shape in given.items()})


def test_a_dropout_rate_of_one_is_refused():
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"got 1\.0"):
        attention(q, k, v, CAUSAL, dropout=(1.0, jax.random.key(0)))


def test_models_compute_no_attention_of_their_own():
    models = Path(module.__file__).parent.parent / "models"
    texts = {path.name: path.read_text() for path in models.rglob("*.py")}
    assert {name for name, text in texts.items() if "softmax" in text} == {"moe.py"}  # its router
    assert not [name for name, text in texts.items() if "dot_product_attention" in text]


def test_alibi_is_the_slope_times_how_far_the_key_lies_ahead():
    """transformers' BLOOM adds slope * k_pos, which differs by a constant of the row."""
    q, k, v = arrays(t=S)
    slopes = jnp.asarray([0.5, 0.25, -0.1, 0.0])
    by_key = slopes[:, None, None] * jnp.arange(S, dtype=jnp.float32)
    out, lse = attention(q, k, v, CAUSAL, alibi=slopes, return_lse=True, impl="reference")
    want, want_lse = attention(q, k, v, CAUSAL, bias=by_key[None], return_lse=True, impl="reference")
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(lse, want_lse - slopes * jnp.arange(S)[:, None], atol=2e-6)
