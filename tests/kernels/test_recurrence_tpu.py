"""The TPU kernels of the recurrence in the interpreter: against float64, with the memory of a TPU, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.recurrence import recurrence, serial
from jaxlm.kernels.recurrence_tpu import recurrence_tpu, refuses
from jaxlm.parallel.mesh import make_mesh
from tests.kernels.interpret import STRICT, run_strictly
from tests.kernels.recurrences import Case, error, exact, inputs

# Two chunks, the second of them ragged; two heads side by side, or one alone.
CASES = [
    Case(("a", "state", "resets"), t=27, h=4, k=64, v=64),
    Case(("bonus", "state", "resets"), t=27, h=2, k=64, v=128, b=1),
    Case(("a",), decay="scalar", t=27, h=1, k=128, v=128, b=1, repeated=True),
]


def arrays_of(case, dtype=jnp.float32):
    arrays = {name: jnp.asarray(x) for name, x in inputs(case).items()}
    cast = {name: x.astype(dtype) for name, x in arrays.items() if name in ("r", "k", "v", "a", "b")}
    return {"state": jnp.zeros((case.b, case.h, case.k, case.v))} | arrays | cast


def gradients(run, arrays):
    """Of all that is not whole numbers, of a sum of every number of the results, each with its weight."""
    smooth = {name: x for name, x in arrays.items() if x.dtype != bool}
    rest = {name: x for name, x in arrays.items() if x.dtype == bool}
    weigh = lambda x: (jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) * x).sum()

    @jax.jit
    def both(smooth):
        return jax.value_and_grad(lambda x: (lambda y: (sum(map(weigh, y)), y))(run(x | rest)), has_aux=True)(smooth)

    (_, results), grads = both(smooth)
    return results, grads


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_state_and_gradients(case):
    arrays = arrays_of(case)
    results, grads = gradients(functools.partial(recurrence_tpu, chunk=16, interpret=True), arrays)
    assert max(map(error, results, exact(**arrays))) < 2e-6
    _, want = gradients(serial, arrays)
    errors = {name: error(grads[name], np.asarray(want[name], np.float64)) for name in want}
    assert max(errors.values()) < 1e-5, errors


def test_bfloat16_in_a_chunk_of_the_default_size():
    arrays = arrays_of(Case(("a",), decay="bounded", t=130, h=2, k=64, v=64, b=1), jnp.bfloat16)
    results, grads = gradients(functools.partial(recurrence_tpu, interpret=True), arrays)
    assert results[0].dtype == jnp.bfloat16 and grads["k"].dtype == jnp.bfloat16
    assert max(map(error, results, exact(**arrays))) < 1e-2
    _, want = gradients(serial, jax.tree.map(lambda x: x.astype(jnp.float32), arrays))
    assert max(error(grads[name], np.asarray(want[name], np.float64)) for name in want) < 2e-2


@pytest.mark.parametrize("which", ["forward", "gradient"])
def test_no_races_and_nothing_unwritten_is_read(which):
    case = CASES[0] if which == "gradient" else CASES[1]
    arrays = arrays_of(case)
    run = functools.partial(recurrence_tpu, chunk=16, interpret=STRICT)
    if which == "forward":
        results, raced = run_strictly(lambda: run(arrays))
        assert max(map(error, results, exact(**arrays))) < 2e-6
    else:
        (_, grads), raced = run_strictly(lambda: gradients(run, arrays))
        _, want = gradients(serial, arrays)
        assert max(error(grads[name], np.asarray(want[name], np.float64)) for name in want) < 1e-5
    assert not raced


def test_over_a_mesh():
    """Examples over fsdp, heads over tensor; the gradient of a bonus adds up over both."""
    arrays = arrays_of(Case(("bonus", "resets"), t=20, h=4, k=64, v=64))
    run = functools.partial(recurrence_tpu, chunk=16, interpret=True)
    results, grads = gradients(run, arrays)
    with jax.set_mesh(make_mesh("fsdp=2,tensor=2", jax.devices()[:4])):
        sharded, sharded_grads = gradients(run, arrays)
    for x, y in zip((*results, *grads.values()), (*sharded, *sharded_grads.values()), strict=True):
        assert error(y, np.asarray(x, np.float64)) < 1e-6


def test_refusals():
    def why(platform="tpu", chunk=None, **change):
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in inputs(CASES[0]).items()}
        return refuses(shapes | change, chunk, platform)

    assert why() is None and why(chunk=128) is None
    narrow = jax.ShapeDtypeStruct((2, 27, 4, 40), jnp.float32)
    odd = dict.fromkeys(("r", "k", "v"), jax.ShapeDtypeStruct((2, 27, 3, 64), jnp.float32))
    for reason, expected in [
        (why(platform="cpu"), "needs a TPU, the platform is 'cpu'"),
        (why(k=jax.ShapeDtypeStruct((2, 27, 4, 64), jnp.bfloat16)), "throughout, got bfloat16, float32"),
        (why(r=narrow), "as wide as one of .*, got 40 and 64"),
        (why(chunk=8), "16, 32, 64 or 128 tokens at once, got 8"),
        (why(**odd), "2 heads of 64 keys at once, which do not divide 3 over 1 devices"),
    ]:
        assert reason is not None
        with pytest.raises(ValueError, match=expected):
            raise ValueError(reason)
    with pytest.raises(ValueError, match="recurrence implementation 'tpu' needs a TPU, the platform is 'cpu'"):
        recurrence(**arrays_of(CASES[0]), impl="tpu")
