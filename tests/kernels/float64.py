"""Attention and its gradients in float64, written with numpy: what kernels with a backward pass are compared with."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Exact:
    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray | None = None
    dk: np.ndarray | None = None
    dv: np.ndarray | None = None
    dsinks: np.ndarray | None = None


def exact(q, k, v, counts, *, scale, softcap=None, sinks=None, dout=None, dlse=None) -> Exact:
    """counts, broadcast to [B, N, T, S], says how often each key counts; gradients where dout and dlse are given.

    The gradient of a log-sum-exp of nothing is left out.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (b, t, n, _), (s, kh) = q.shape, k.shape[1:3]
    repeated = lambda x: np.repeat(x, n // kh, 2)
    summed = lambda x: x.reshape(b, s, kh, n // kh, -1).sum(3)
    logits = np.einsum("btnh,bsnh->bnts", q, repeated(k)) * scale
    slope = 1.0
    if softcap is not None:
        slope = 1 - np.tanh(logits / softcap) ** 2
        logits = softcap * np.tanh(logits / softcap)
    p = np.broadcast_to(counts, (b, n, t, s)) * np.exp(logits)
    sink = np.zeros((n, 1)) if sinks is None else np.exp(np.asarray(sinks, np.float64))[:, None]
    total = p.sum(-1) + sink  # [B, N, T]
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    p = p / np.where(total == 0, 1, total)[..., None]
    out = np.einsum("bnts,bsnd->btnd", p, repeated(v))
    if dout is None:
        return Exact(out, lse.swapaxes(1, 2))
    dout, dlse = np.asarray(dout, np.float64), np.asarray(dlse, np.float64).swapaxes(1, 2)
    dp = np.einsum("btnd,bsnd->bnts", dout, repeated(v))
    delta = (dp * p).sum(-1)
    ds = p * (dp - delta[..., None] + dlse[..., None]) * slope * scale
    dq = np.einsum("bnts,bsnh->btnh", ds, repeated(k))
    dk = summed(np.einsum("bnts,btnh->bsnh", ds, q))
    dv = summed(np.einsum("bnts,btnd->bsnd", p, dout))
    share = sink / np.where(total == 0, 1, total)
    return Exact(out, lse.swapaxes(1, 2), dq, dk, dv, -(share * (delta - dlse)).sum((0, 2)))


def close(got, want, tolerance=1e-5):
    """Asserts that arrays agree to `tolerance` of the largest number expected."""
    assert got.shape == want.shape
    finite = np.where(np.isfinite(want), want, 0)
    np.testing.assert_allclose(
        np.asarray(got, np.float64), want, atol=tolerance * max(1e-30, abs(finite).max()), rtol=0
    )
