"""The recurrence against float64, token by token: outputs, states, gradients, numbers that grow or vanish, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.recurrence import recurrence
from jaxlm.kernels.recurrence_xla import inverse
from tests.kernels.recurrences import Case, error, exact, inputs, slope

CASES = [
    Case(("a", "state", "resets")),
    Case(("bonus", "state", "resets")),
    Case(("a", "state", "resets"), decay="scalar"),
    Case(decay="scalar"),
    Case(("a",), decay="bounded", repeated=True),
]
IMPLS = {"serial": {"impl": "serial"}, "xla": {"impl": "xla", "chunk": 32}}


@functools.partial(jax.jit, static_argnames=("impl", "chunk"))
def run(arrays, **how):
    return recurrence(**arrays, **how)


def weighted(results, weights):
    """A number that depends on all of the outputs and of the state."""
    return sum((x * w).sum() for x, w in zip(results, weights, strict=True))


@functools.partial(jax.jit, static_argnames=("impl", "chunk"))
def gradients(arrays, weights, **how):
    smooth = {name: x for name, x in arrays.items() if x.dtype != bool}
    rest = {name: x for name, x in arrays.items() if x.dtype == bool}
    return jax.grad(lambda x: weighted(recurrence(**x, **rest, **how), weights))(smooth)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_state(case, impl):
    arrays = inputs(case)
    got, want = run(arrays, **IMPLS[impl]), exact(**arrays)
    assert [x.dtype for x in got] == [jnp.float32] * 2
    assert max(map(error, got, want)) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_the_slopes_of_float64(case, impl):
    arrays, rng = inputs(case), np.random.default_rng(1)
    weights = tuple(rng.standard_normal(x.shape).astype(np.float32) for x in exact(**arrays))
    got = gradients(arrays, weights, **IMPLS[impl])
    for name, gradient in got.items():
        gradient = np.asarray(gradient, np.float64)
        direction = gradient + rng.standard_normal(gradient.shape) * gradient.std()  # along it nothing can cancel
        want = slope(lambda x: weighted(exact(**x), weights), arrays, name, direction)
        assert abs((direction * gradient).sum() - want) < 1e-6 * want, name


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_cut_in_two_with_the_state_carried(case):
    arrays, at = inputs(case), 41  # the first part is a chunk and a part of one
    per_token = {name for name in arrays if name not in ("state", "bonus")}
    whole, state = run(arrays, impl="xla", chunk=32)
    out, middle = run({n: x[:, :at] if n in per_token else x for n, x in arrays.items()}, impl="xla", chunk=32)
    rest = {n: x[:, at:-1] if n in per_token else x for n, x in arrays.items()} | {"state": middle}
    more, late = run(rest, impl="xla", chunk=32)
    last = {n: x[:, -1:] if n in per_token else x for n, x in arrays.items()} | {"state": late}
    one, end = run(last)  # a single token
    assert (
        error(jnp.concatenate([out, more, one], 1), np.asarray(whole)) < 2e-6 and error(end, np.asarray(state)) < 2e-6
    )


def test_a_reset_forgets_exactly():
    """What comes before is infinite, and leaves no trace after."""
    for features in (("a", "resets", "state"), ("bonus", "resets", "state")):
        arrays = inputs(Case(features))
        arrays["resets"] = np.arange(75)[None].repeat(2, 0) == 37
        spoilt = {name: x.copy() for name, x in arrays.items()}
        spoilt["v"][:, :37] *= 1e30
        a, b = (run(x, impl="xla", chunk=32) for x in (arrays, spoilt))
        np.testing.assert_array_equal(a[0][:, 37:], b[0][:, 37:])
        np.testing.assert_array_equal(a[1], b[1])


# Numbers: what chunks of any size make of decays that are strong and of keys that come again and again.

NUMBERS = {
    "RWKV-7": Case(("a",), decay="bounded", b=1, t=512, h=1, k=64, v=64),
    "RWKV-7, keys repeated": Case(("a",), decay="none", b=1, t=512, h=1, k=64, v=64, repeated=True),
    "RWKV-6": Case(("bonus",), b=1, t=512, h=1, k=64, v=64),
    "unbounded, with a and b": Case(("a",), b=1, t=512, h=1, k=64, v=64),
}


@functools.cache
def number_case(name):
    arrays = inputs(NUMBERS[name])
    return arrays, exact(**arrays)


@pytest.mark.parametrize("chunk", [16, 32, 64, 128])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name, chunk):
    arrays, want = number_case(name)
    assert max(map(error, run(arrays, impl="xla", chunk=chunk), want)) < 1e-5


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_bfloat16(name):
    arrays, _ = number_case(name)
    arrays = {n: x if n in ("log_w", "bonus") else jnp.asarray(x, jnp.bfloat16) for n, x in arrays.items()}
    want = exact(**arrays)
    out, state = run(arrays, impl="xla", chunk=None)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert error(out, want[0]) < 1e-2 and error(state, want[1]) < 1e-5


@pytest.mark.parametrize("size", [2, 16, 64])
def test_inverse(size):
    """Of matrices whose powers overflow."""
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((3, 4))[rng.integers(0, 3, size)]
    x = np.tril(-keys @ keys.T / (keys**2).sum(-1), -1)[None]
    found, pull = jax.vjp(inverse, jnp.asarray(x, jnp.float32))
    want = np.linalg.inv(np.eye(size) - x)
    assert error(found, want) < 1e-5
    g = rng.standard_normal(x.shape)
    (grad,) = pull(jnp.asarray(g, jnp.float32))
    assert error(grad, np.tril(want.swapaxes(1, 2) @ g @ want.swapaxes(1, 2), -1)) < 1e-5


def test_backward_keeps_one_state_of_each_chunk():
    case = Case(("a",), b=1, t=1024, h=2, k=32, v=32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs(case))
    weights = [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((1, 1024, 2, 32), (1, 2, 32, 32))]

    def temporaries(**how):
        return gradients.lower(shapes, weights, **how).compile().memory_analysis().temp_size_in_bytes

    states, arrays = 1024 * 2 * 32 * 32 * 4, 7 * 1024 * 2 * 32 * 4  # one of each token; the inputs and an output
    assert temporaries(impl="serial") > states
    assert temporaries(impl="xla") < states / 64 + 4 * arrays < states


def test_what_cannot_be_is_refused():
    arrays = jax.tree.map(jnp.asarray, inputs(Case(("a", "state", "resets"), t=4)))
    wrong = [
        ({"k": arrays["k"][:, :3]}, r"k of the recurrence must have shape \(2, 4, 3, 4\), got \(2, 3, 3, 4\)"),
        ({"log_w": arrays["log_w"][..., :2]}, "log_w of the recurrence must have shape"),
        ({"state": arrays["state"][:1]}, "state of the recurrence must have shape"),
        ({"a": None}, "a and b of the recurrence must be given together"),
        ({"bonus": jnp.ones((3, 4))}, "either a and b or a bonus"),
        ({"chunk": 0}, "chunk of at least one token"),
        ({"chunk": 24}, "power of two of tokens, got 24"),
        ({"impl": "cuda"}, "unknown impl='cuda' of the recurrence; there are auto"),
        ({name: arrays[name][:, :0] for name in ("r", "k", "v", "log_w", "a", "b", "resets")}, "at least one token"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            plain(**(arrays | change))


# The import hook of the tests checks shapes before the function can.
plain = getattr(recurrence, "__wrapped__", recurrence)
