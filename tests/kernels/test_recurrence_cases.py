"""Recurrences of the literature as calls of the one entry, each against its own textbook form, token by token.

The textbook forms have no batch or heads; S is as its paper writes it, [K, V] or its transpose.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.recurrence import recurrence
from tests.kernels.recurrences import error

B, T, H, K, V = 1, 40, 2, 4, 6
rng = np.random.default_rng(0)
draw = lambda *shape: rng.standard_normal((B, T, H, *shape)).astype(np.float32)
sigmoid = lambda x: (1 / (1 + np.exp(-x))).astype(np.float32)

q, k, x = draw(K), draw(K), draw(V)
k = k / np.linalg.norm(k, axis=-1, keepdims=True)
alpha, gamma = sigmoid(draw(K)), sigmoid(draw())  # a decay by channel, and one for a head
beta, rate = 2 * sigmoid(draw()), np.exp(draw()).astype(np.float32)
u = rng.standard_normal((H, K)).astype(np.float32)
column = lambda x: x[..., None]  # a number of a head as a vector of one channel
still = np.zeros((B, T, H, 1), np.float32)
I = np.eye(K)


def retnet(S, t, h):
    """Sun et al. 2023, eq. 6: S_n = gamma S_{n-1} + K_n^T V_n, o_n = Q_n S_n; gamma of a head is constant."""
    S = 0.9 * S + np.outer(k[0, t, h], x[0, t, h])
    return S, q[0, t, h] @ S


def gla(S, t, h):
    """Yang et al. 2023, eq. 3: S_t = (alpha_t^T 1) * S_{t-1} + k_t^T v_t, o_t = q_t S_t."""
    S = np.outer(alpha[0, t, h], np.ones(V)) * S + np.outer(k[0, t, h], x[0, t, h])
    return S, q[0, t, h] @ S


def mamba2(S, t, h):
    """Dao and Gu 2024: h_t = exp(dt A) h_{t-1} + dt x_t B_t^T [V, K], y_t = h_t C_t, with A = -1.5, B = k and C = q."""
    dt = rate[0, t, h]
    S = np.exp(-1.5 * dt) * S + dt * np.outer(x[0, t, h], k[0, t, h])
    return S, S @ q[0, t, h]


def delta_net(S, t, h):
    """Yang et al. 2024: S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T [V, K], o_t = S_t q_t."""
    key, write = k[0, t, h], beta[0, t, h]
    S = S @ (I - write * np.outer(key, key)) + write * np.outer(x[0, t, h], key)
    return S, S @ q[0, t, h]


def gated_delta_net(S, t, h):
    """Yang et al. 2024, eq. 10: S_t = S_{t-1} (alpha_t (I - beta_t k_t k_t^T)) + beta_t v_t k_t^T [V, K]."""
    key, write = k[0, t, h], beta[0, t, h]
    S = gamma[0, t, h] * S @ (I - write * np.outer(key, key)) + write * np.outer(x[0, t, h], key)
    return S, S @ q[0, t, h]


def kda(S, t, h):
    """Kimi Linear 2025: S_t = (I - beta_t k_t k_t^T) Diag(alpha_t) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t."""
    key, write = k[0, t, h], beta[0, t, h]
    S = (I - write * np.outer(key, key)) @ np.diag(alpha[0, t, h]) @ S + write * np.outer(key, x[0, t, h])
    return S, S.T @ q[0, t, h]


def rwkv5(S, t, h):
    """Peng et al. 2024, Eagle: o_t = r_t (u k_t^T v_t + S_{t-1}), S_t = w S_{t-1} + k_t^T v_t; w constant."""
    now = np.outer(k[0, t, h], x[0, t, h])
    return np.diag(alpha[0, 0, h]) @ S + now, q[0, t, h] @ (np.diag(u[h]) @ now + S)


def rwkv6(S, t, h):
    """Peng et al. 2024, Finch: as Eagle, w_t of the token."""
    now = np.outer(k[0, t, h], x[0, t, h])
    return np.diag(alpha[0, t, h]) @ S + now, q[0, t, h] @ (np.diag(u[h]) @ now + S)


def rwkv7(S, t, h):
    """Peng et al. 2025: S_t = S_{t-1} (diag(w_t) - kk_t^T (a * kk_t)) + v_t^T k_t [V, K], o_t = S_t r_t; a = 0.7."""
    key = k[0, t, h]
    S = S @ (np.diag(alpha[0, t, h]) - np.outer(key, 0.7 * key)) + np.outer(x[0, t, h], 1.3 * key)
    return S, S @ q[0, t, h]


erase = -column(beta) * k
CALLS = {
    retnet: {"v": x, "log_w": still + np.log(0.9)},
    gla: {"v": x, "log_w": np.log(alpha)},
    mamba2: {"v": column(rate) * x, "log_w": column(-1.5 * rate)},
    delta_net: {"v": column(beta) * x, "log_w": still, "a": k, "b": erase},
    gated_delta_net: {"v": column(beta) * x, "log_w": column(np.log(gamma)), "a": column(gamma) * k, "b": erase},
    kda: {"v": column(beta) * x, "log_w": np.log(alpha), "a": alpha * k, "b": erase},
    rwkv5: {"v": x, "log_w": np.broadcast_to(np.log(alpha[:, :1]), alpha.shape), "bonus": u},
    rwkv6: {"v": x, "log_w": np.log(alpha), "bonus": u},
    rwkv7: {"k": 1.3 * k, "v": x, "log_w": np.log(alpha), "a": -k, "b": 0.7 * k},
}
chunks = functools.partial(jax.jit(recurrence, static_argnames=("impl", "chunk")), impl="xla", chunk=16)


@pytest.mark.parametrize("textbook", CALLS, ids=lambda f: f.__name__)
def test_textbook(textbook):
    arrays = {"r": q, "k": k} | CALLS[textbook]
    want, states = np.zeros((B, T, H, V)), []
    for h in range(H):
        S = np.zeros((K, V) if textbook in (retnet, gla, kda, rwkv5, rwkv6) else (V, K))
        for t in range(T):
            S, want[0, t, h] = textbook(S, t, h)
        states.append(S if S.shape == (K, V) else S.T)
    out, state = chunks(**{name: jnp.asarray(y, jnp.float32) for name, y in arrays.items()})
    assert error(out, want) < 2e-6 and error(state[0], np.stack(states)) < 2e-6
