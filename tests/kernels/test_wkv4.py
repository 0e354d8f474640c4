"""RWKV-4's recurrence against float64, as its paper sums it; cut, reset, and with numbers that would overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.wkv4 import wkv4
from tests.kernels.recurrences import error, slope

B, T, C = 2, 37, 5
CHUNKS = [1, 16]  # token by token, and two chunks in parallel with a rest
unchecked = getattr(wkv4, "__wrapped__", wkv4)  # the tests' import hook would refuse shapes first
run = jax.jit(wkv4, static_argnames="chunk")


def exact(k, v, log_w, bonus, resets):
    """Peng et al. 2023, eq. 16, over the tokens from the last reset on; of each the largest exponent is taken out."""
    out = np.zeros(k.shape)
    for b in range(B):
        for t in range(T):
            start = max([i for i in range(t + 1) if resets[b, i]], default=0)
            past = np.arange(start, t)
            logs = np.concatenate([k[b, past] + (t - 1 - past)[:, None] * log_w, (bonus + k[b, t])[None]])
            weights = np.exp(logs - logs.max(0))
            out[b, t] = (weights * v[b, start : t + 1]).sum(0) / weights.sum(0)
    return out


@functools.cache
def inputs(size=1.0):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    arrays = {"k": size * draw(B, T, C), "v": draw(B, T, C), "log_w": -np.exp(2 * draw(C)), "bonus": draw(C)}
    return arrays, rng.random((B, T)) < 0.1


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("size", [1.0, 300.0])
def test_outputs(size, chunk):
    arrays, resets = inputs(size)
    out, state = run(**arrays, resets=resets, chunk=chunk)
    assert error(out, exact(**arrays, resets=resets)) < 2e-6
    assert np.isfinite(state).all()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_tokens_that_are_not_there_leave_the_state_as_it_is(chunk):
    """Between, before and after the others, one at a time and many, with a state to begin from and without."""
    arrays, _ = inputs()
    valid = np.ones((B, T), bool)
    valid[0, [0, 1, 2, 9, 20, 21, 36]] = valid[1, 14:37] = False
    for size in (None, 3.0):
        state = None if size is None else size * np.random.default_rng(2).random((B, 3, C)).astype(np.float32)
        out, last = run(**arrays, state=state, valid=valid, chunk=chunk)
        for b, real in enumerate(valid):
            one = {name: x[b : b + 1, real] if name in "kv" else x for name, x in arrays.items()}
            want, end = run(**one, state=None if state is None else state[b : b + 1], chunk=1)
            assert error(out[b, real], want[0]) < 2e-6
            assert error(last[b], end[0]) < 2e-6
        assert np.isfinite(out).all()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradients_are_the_slopes_of_float64(chunk):
    arrays, resets = inputs()
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((B, T, C))
    loss = lambda arrays: (wkv4(**arrays, resets=jnp.asarray(resets), chunk=chunk)[0] * jnp.asarray(weights)).sum()
    for name, gradient in jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, arrays)).items():
        gradient = np.asarray(gradient, np.float64)
        direction = gradient + rng.standard_normal(gradient.shape) * gradient.std()
        want = slope(lambda x: (exact(**x, resets=resets) * weights).sum(), arrays, name, direction)
        assert abs((direction * gradient).sum() - want) < 3e-6 * want, name


def test_cut_in_two_with_the_state_carried():
    arrays, resets = inputs()
    static = {name: arrays[name] for name in ("log_w", "bonus")}
    part = lambda *at: {
        "k": arrays["k"][:, slice(*at)],
        "v": arrays["v"][:, slice(*at)],
        "resets": resets[:, slice(*at)],
    }
    want, end = run(**part(None), **static, chunk=16)
    early, state = run(**part(20), **static, chunk=16)
    late, last = run(**part(20, None), **static, state=state, chunk=1)
    assert error(jnp.concatenate([early, late], 1), np.asarray(want)) < 2e-6
    numerator, denominator, scale = (np.asarray(x[:, i], np.float64) for i in range(3) for x in (last,))
    wanted = np.asarray(end, np.float64)
    # The scale may differ where the sums make up for it.
    assert error(numerator / denominator, wanted[:, 0] / wanted[:, 1]) < 2e-6
    assert error(np.log(denominator) + scale, np.log(wanted[:, 1]) + wanted[:, 2]) < 2e-6


def test_what_cannot_be_is_refused():
    arrays = jax.tree.map(jnp.asarray, inputs()[0])
    with pytest.raises(ValueError, match=r"bonus of wkv4 must have shape \(5,\), got \(4,\)"):
        unchecked(**arrays | {"bonus": jnp.zeros(4)})
    with pytest.raises(ValueError, match=r"state of wkv4 must have shape \(2, 3, 5\)"):
        unchecked(**arrays, state=jnp.zeros((2, 2, 5)))
