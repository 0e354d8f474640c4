"""Recurrences in float64, token by token in numpy, and the inputs they are tried on."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes, and which arguments of `recurrence` are given beside r, k, v and log_w."""

    features: tuple[str, ...] = ()  # of a (and b), bonus, state, resets
    decay: str = "unbounded"  # as RWKV-6's; `bounded` as RWKV-7's, `scalar`, unbounded and one for a head, or `none`
    b: int = 2
    t: int = 75
    h: int = 3
    k: int = 4
    v: int = 6
    repeated: bool = False  # keys are a few, over and over
    seed: int = 0

    def __str__(self) -> str:
        return " ".join([self.decay, *self.features])


def inputs(case: Case) -> dict[str, np.ndarray]:
    """float32 arrays, but for resets: keys of length 1, and decays from almost 1 to almost 0."""
    rng = np.random.default_rng(case.seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    shape = case.b, case.t, case.h, case.k
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    keys = unit(draw(*shape))
    if case.repeated:
        keys = keys[:, rng.integers(0, 3, case.t)]
    noise = draw(*shape[:3], 1 if case.decay == "scalar" else case.k)
    log_w = {"bounded": -0.6065307 / (1 + np.exp(-4 * noise)), "none": 0 * noise}.get(case.decay, -np.exp(1.5 * noise))
    if case.decay == "unbounded":
        log_w[0, case.t // 2, :, 1] = -np.inf
    arrays = {"r": draw(*shape), "k": keys, "v": draw(*shape[:3], case.v), "log_w": log_w.astype(np.float32)}
    if "a" in case.features:
        arrays |= {"a": -keys, "b": (keys / (1 + np.exp(-2 * draw(*shape)))).astype(np.float32)}
    if "bonus" in case.features:
        arrays["bonus"] = draw(case.h, case.k)
    if "state" in case.features:
        arrays["state"] = draw(case.b, case.h, case.k, case.v)
    if "resets" in case.features:
        arrays["resets"] = rng.random((case.b, case.t)) < 0.08
        arrays["resets"][0, 0] = True
    return arrays


def exact(r, k, v, log_w, *, a=None, b=None, bonus=None, state=None, resets=None) -> tuple[np.ndarray, np.ndarray]:
    """As jaxlm.kernels.recurrence defines it."""
    r, k, v, log_w = (np.asarray(x, np.float64) for x in (r, k, v, log_w))
    length = r.shape[1]
    s = np.zeros((r.shape[0], *r.shape[2:], v.shape[3])) if state is None else np.asarray(state, np.float64).copy()
    out = np.zeros(v.shape)
    for t in range(length):
        if resets is not None:
            s[resets[:, t]] = 0
        new = np.exp(log_w[:, t])[..., None] * s + k[:, t, :, :, None] * v[:, t, :, None, :]
        if a is not None and b is not None:
            inner = np.einsum("bhk,bhkv->bhv", np.asarray(a, np.float64)[:, t], s)
            new = new + np.asarray(b, np.float64)[:, t, :, :, None] * inner[:, :, None]
        if bonus is None:
            seen = new
        else:
            seen = s + np.asarray(bonus, np.float64)[..., None] * k[:, t, :, :, None] * v[:, t, :, None, :]
        out[:, t] = np.einsum("bhk,bhkv->bhv", r[:, t], seen)
        s = new
    return out, s


def slope(f: Any, arrays: dict[str, np.ndarray], name: str, direction: np.ndarray, step: float = 1e-5) -> float:
    """How fast f(arrays), of float64, grows along a direction of one array: a central difference."""
    wide = {n: x if x.dtype == bool else np.asarray(x, np.float64) for n, x in arrays.items()}
    ahead, behind = (f(wide | {name: wide[name] + by * direction}) for by in (step, -step))
    return (ahead - behind) / (2 * step)


def error(got: Any, want: np.ndarray) -> float:
    """The largest difference, in the largest number expected; NaN where anything is."""
    return float(np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max())
