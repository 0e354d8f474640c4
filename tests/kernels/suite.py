"""One suite for every implementation of attention.

`check(implementation, case)` runs one case and compares output, log-sum-exp and every gradient with float64. A new
implementation is one entry of IMPLEMENTATIONS: how to call it, the platform it is judged for, how close it must come,
what makes cases fit its tiles, and which ones it must refuse, by a pattern that the reason must match. A case that is
refused and should not be, or the reverse, fails.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels import cudnn, decode, decode_tpu, flash_tpu, flash_tpu_bwd, flash_tpu_fwd, sparse_tpu, xla
from jaxlm.kernels.attention import IMPLS, choose, reference
from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.call import call_of
from tests.kernels.cases import Case, Table, cotangents, expected, inputs, scaled

SMOOTH = ("q", "k", "v", "bias", "alibi", "sinks")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An implementation under test."""

    name: str
    run: Callable[..., Any]  # as in `attention`, with the features as keywords
    refuses: Callable[[Case], str | None] = lambda case: None  # a pattern of the reason, None for what must run
    platform: str = "cpu"  # for which it is judged
    fit: Callable[[Case], Case] = lambda case: case  # sizes that it accepts
    tolerances: dict[str, float] = dataclasses.field(default_factory=lambda: {"float32": 3e-6, "bfloat16": 2e-2})

    def __str__(self) -> str:
        return self.name


def check(implementation: Implementation, case: Case) -> None:
    """Asserts the refusal that is due, or else output, log-sum-exp and gradients against float64."""
    case = implementation.fit(case)
    arrays, other = inputs(case)
    mask = case.mask.make(case.t, case.s) if isinstance(case.mask, Table) else case.mask
    given = (arrays.keys() | other.keys()) - {"q", "k", "v", "scale"}
    call = call_of(arrays["q"], arrays["k"], arrays["v"], mask, given, case.lse, implementation.platform)
    if (pattern := implementation.refuses(case)) is not None:
        with pytest.raises(NotImplementedError, match=f"^attention implementation '{implementation.name}' ") as error:
            choose(call, implementation.name)
        assert re.search(pattern, str(error.value)), f"{pattern!r} is not in {error.value}"
        return
    assert choose(call, implementation.name) is IMPLS[implementation.name]
    got, want = actual(implementation, case, mask, arrays, other), expected(case)
    assert got.keys() == want.keys() - (set() if case.lse else {"lse"})
    like = {name: arrays["q" if name == "out" else name.removeprefix("d_")] for name in got if name != "lse"}
    dtypes = {name: x.dtype for name, x in like.items()} | ({"lse": np.dtype(np.float32)} if case.lse else {})
    assert {name: x.dtype for name, x in got.items()} == dtypes
    empty = np.isneginf(want["lse"])
    errors = {}
    for name, x in got.items():
        x, y = np.asarray(x, np.float64), want[name]
        if name == "lse":
            assert (np.isneginf(x) == empty).all(), "log-sum-exp of queries that see nothing"
            x, y = np.where(empty, 0, x), np.where(empty, 0, y)
        if name == "out":
            assert (x[empty] == 0).all(), "output of queries that see nothing"
        assert x.shape == y.shape, name
        errors[name] = np.abs(x - y).max() / max(1, np.abs(y).max())
    wrong = {name: error for name, error in errors.items() if not error <= implementation.tolerances[case.dtype]}
    assert not wrong, f"{implementation} on {case}: {wrong}"


def actual(implementation: Implementation, case: Case, mask, arrays: dict, other: dict) -> dict[str, Any]:
    smooth = {name: jnp.asarray(x) for name, x in arrays.items() if name in SMOOTH}
    rest = {name: jnp.asarray(x) for name, x in arrays.items() if name not in SMOOTH}
    static = {name: x for name, x in other.items() if name != "dropout"}
    rate, key = other.get("dropout", (None, None))
    d_out, d_lse = map(jnp.asarray, cotangents(case))

    @jax.jit
    def both(smooth, rest, key, table):
        dropout = {} if rate is None else {"dropout": (rate, key)}

        def run(smooth):
            given = dict(smooth)
            q, k, v = (given.pop(name) for name in "qkv")
            at = mask if table is None else table  # a mask is static, a table an argument
            return implementation.run(q, k, v, at, return_lse=case.lse, **given, **rest, **static, **dropout)

        results, back = jax.vjp(run, smooth)
        return results, back((d_out, d_lse) if case.lse else d_out)[0]

    results, grads = both(smooth, rest, key, mask if isinstance(mask, BlockTable) else None)
    named = {"out": results[0], "lse": results[1]} if case.lse else {"out": results}
    return named | {f"d_{name}": grad for name, grad in grads.items()}


# What each one refuses, and the sizes for it.


def _cudnn_refuses(case: Case) -> str | None:
    if case.dtype != "bfloat16":
        return f"computes in float16 or bfloat16, got {case.dtype}"
    if case.given():
        return "has no " + ", ".join(sorted(case.given()))
    if case.lse:
        return "rounded to the inputs' dtype and without its gradient"
    return None


def _decode_refuses(case: Case) -> str | None:
    if case.t > decode.QUERIES:
        return f"takes at most {decode.QUERIES} queries, got {case.t}"
    return "has no dropout" if "dropout" in case.features else None


def _tiled(case: Case) -> Case:
    """Eight times as long, so that tiles of 128 are several and ragged, with head dims that fit a TPU."""
    dims = {5: 64, 8: 72, 16: 128}
    mask = scaled(case.mask, 8)
    return dataclasses.replace(case, mask=mask, t=8 * case.t, s=8 * case.s, h=dims[case.h], dv=dims[case.dv])


def _few_tokens(case: Case) -> Case:
    """At most three, over a cache of several blocks, in which keys lie in any order."""
    ordered = not {"positions", "q_pos"} & {*case.features}
    features = ("positions", *case.features) if ordered else case.features
    return dataclasses.replace(case, t=min(case.t, 3), s=8 * case.s, features=features)


def _has_no(features: set[str]) -> str | None:
    return f"has no {', '.join(sorted(features))}$" if features else None


def _flash_tpu_refuses(case: Case) -> str | None:
    if isinstance(case.mask, Table):
        return "takes a Mask, not a BlockTable"
    unknown = _has_no(case.given() - flash_tpu.FEATURES)
    return unknown or ("looks up a table" if case.mask.table_block else None)


def _sparse_tpu_refuses(case: Case) -> str | None:
    if not isinstance(case.mask, Table) and not case.mask.table_block:
        return "runs block tables and masks of whole blocks, not "
    return _has_no(case.given() - sparse_tpu.FEATURES)


def _decode_tpu_refuses(case: Case) -> str | None:
    return "has no block tables" if isinstance(case.mask, Table) else _has_no(case.given() & decode_tpu.REFUSED)


def _decode_tpu(*args, **given):
    with mock.patch.object(decode_tpu, "CACHE_ROWS", 256):  # blocks of 128 keys
        return decode_tpu.decode_tpu(*args, interpret=True, **given)


_flash_tpu = functools.partial(
    flash_tpu.flash_tpu,
    interpret=True,
    blocks=flash_tpu_fwd.Blocks(q=128, k=128, heads=2),
    backward_blocks=flash_tpu_bwd.Blocks(q=128, k=128, chunk=256),
)
_on_tpu: dict[str, Any] = {"platform": "tpu", "tolerances": {"float32": 1e-5, "bfloat16": 2e-2}}

IMPLEMENTATIONS = [
    Implementation("reference", reference),
    # Tiles and splits so small that every case has several, some of them ragged.
    Implementation("xla", functools.partial(xla.xla, block_q=8, block_k=12)),
    Implementation("decode", functools.partial(decode.decode, split=16), _decode_refuses),
    # jax's portable implementation of the call that cuDNN would get.
    Implementation("cudnn", functools.partial(cudnn.cudnn, implementation="xla"), _cudnn_refuses, platform="gpu"),
    # The kernels for a TPU, in the interpreter.
    Implementation("flash_tpu", _flash_tpu, _flash_tpu_refuses, fit=_tiled, **_on_tpu),
    Implementation(
        "sparse_tpu",
        functools.partial(sparse_tpu.sparse_tpu, interpret=True),
        _sparse_tpu_refuses,
        fit=_tiled,
        **_on_tpu,
    ),
    Implementation("decode_tpu", _decode_tpu, _decode_tpu_refuses, fit=_few_tokens, **_on_tpu),
]
