"""The chunked loss against its definition in float64, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.train.losses import IGNORE, CrossEntropy, cross_entropy

B, T, D, V = 2, 7, 8, 33
SPECS = {
    "plain": CrossEntropy(),
    "chunk 3": CrossEntropy(chunk=3),
    "z": CrossEntropy(chunk=2, z=1e-2),
    "smoothing": CrossEntropy(chunk=4, smoothing=0.1),
    "head": CrossEntropy(chunk=1, scale=0.3, softcap=2.0),
    "all": CrossEntropy(chunk=7, smoothing=0.2, z=1e-3, scale=1.7, softcap=3.0),
}


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(B, T, D)).astype(dtype), rng.normal(size=(V, D)).astype(dtype)
    targets = rng.integers(0, V, (B, T))
    targets[0, 2] = targets[1, -1] = IGNORE
    return hidden, table, targets, rng.uniform(0.5, 2, (B, T)).astype(np.float32)


def defined(spec, hidden, table, targets, weights):
    """The sum of losses in float64, by its definition; and its gradients by that of softmax."""
    products = hidden.astype(np.float64) @ table.astype(np.float64).T
    logits = products * spec.scale
    slope = np.full_like(logits, spec.scale)
    if spec.softcap:
        slope = slope / np.cosh(logits / spec.softcap) ** 2
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    lse = np.log(np.exp(logits).sum(-1))
    wanted = np.full(logits.shape, spec.smoothing / V)
    keep = targets != IGNORE
    np.put_along_axis(wanted, np.where(keep, targets, 0)[..., None], 1 - spec.smoothing + spec.smoothing / V, -1)
    weights = weights.astype(np.float64) * keep
    loss = (weights * (lse - (wanted * logits).sum(-1) + spec.z * lse**2)).sum()
    p = np.exp(logits - lse[..., None])
    g = weights[..., None] * (p * (1 + 2 * spec.z * lse)[..., None] - wanted) * slope
    return loss, g @ table, np.einsum("btv,btd->vd", g, hidden)


@pytest.mark.parametrize("name", SPECS)
def test_value_and_gradients(name):
    spec, (hidden, table, targets, weights) = SPECS[name], inputs()
    run = jax.jit(jax.value_and_grad(lambda h, w: cross_entropy(spec, h, w, targets, weights)[0] * 0.5, (0, 1)))
    value, (dhidden, dtable) = run(hidden, table)
    loss, dh, dw = defined(spec, hidden, table, targets, weights)
    np.testing.assert_allclose(value, loss / 2, rtol=2e-6)
    np.testing.assert_allclose(dhidden, dh / 2, atol=2e-6 * abs(dh).max())
    np.testing.assert_allclose(dtable, dw / 2, atol=2e-6 * abs(dw).max())
    alone = cross_entropy(spec, hidden, table, targets, weights)[0]  # without a gradient
    np.testing.assert_allclose(alone, loss, rtol=2e-6)


def test_the_cotangent_is_not_rounded():
    """777 targets and a loss scale, in bfloat16: the gradient is that without them, times them, rounded once."""
    hidden, table, targets, weights = inputs()
    run = lambda factor: jax.grad(
        lambda h: cross_entropy(CrossEntropy(), h, jnp.asarray(table), targets, weights)[0] * factor
    )(jnp.asarray(hidden, jnp.bfloat16))
    one, many = run(1.0), run(1 / 777)
    np.testing.assert_array_equal(many, (one.astype(jnp.float32) / 777).astype(jnp.bfloat16))


def test_parts():
    hidden, table, targets, weights = inputs()
    spec = CrossEntropy(chunk=3, z=1e-2, smoothing=0.1)
    _, sums = cross_entropy(spec, hidden, table, targets, weights)
    nll, *_ = defined(CrossEntropy(), hidden, table, targets, weights)
    right = ((hidden @ table.T).argmax(-1) == targets) * weights
    np.testing.assert_allclose(sums["nll"], nll, rtol=2e-6)
    np.testing.assert_allclose(sums["correct"], right.sum(), rtol=1e-6)


def test_ignored_positions_have_no_gradient():
    hidden, table, targets, weights = inputs()
    dhidden = jax.grad(lambda h: cross_entropy(CrossEntropy(), h, table, targets, weights)[0])(hidden)
    assert not dhidden[0, 2].any() and not dhidden[1, -1].any() and dhidden[0, 1].any()


def test_bfloat16_is_close():
    hidden, table, targets, weights = inputs()
    value = cross_entropy(CrossEntropy(), hidden.astype(jnp.bfloat16), table, targets, weights)[0]
    assert abs(value / defined(CrossEntropy(), hidden, table, targets, weights)[0] - 1) < 1e-2


def test_memory_stays_far_below_the_logits():
    b, t, d, v = 2, 512, 16, 8192
    shape = jax.ShapeDtypeStruct
    args = shape((b, t, d), jnp.float32), shape((v, d), jnp.float32), shape((b, t), int), shape((b, t), jnp.float32)
    grad = jax.jit(jax.grad(lambda h, w, y, m: cross_entropy(CrossEntropy(chunk=32), h, w, y, m)[0], (0, 1)))
    temporaries = grad.lower(*args).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < b * t * v * 4 / 4


@pytest.mark.parametrize("bad", [{"smoothing": 1.0}, {"z": -1}, {"chunk": -1}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        CrossEntropy(**bad)
