"""A hybrid of linear recurrence and attention, for the gate of the core: two structures of parameters, two kinds of
state, a period that leaves a remainder. It is a family and its own backbone, and uses `stack.py` as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints.rules import Rule
from jaxlm.kernels.attention import attention
from jaxlm.kernels.masks import CAUSAL
from jaxlm.models import stack
from jaxlm.models.registry import Family
from jaxlm.models.self_attention import write


@dataclasses.dataclass(frozen=True)
class Config:
    vocab_size: int
    d_model: int
    mixers: tuple[str, ...]
    max_context: int = 64


SHAPES = {"recurrence": {"decay": "d", "inp": "dd", "out": "dd"}, "attention": {"q": "dd", "k": "dd", "v": "dd"}}
RULES = (
    Rule("embed", "embed/w"),
    Rule("blocks.{layer}.decay", "layers/decay"),
    *(
        Rule(f"blocks.{{layer}}.{name}.weight", f"layers/{name}", "e d -> d e")
        for name in ("inp", "out", "q", "k", "v")
    ),
)


def read(r):
    return Config(r["vocab_size"], r["hidden_size"], tuple(r["mixers"]))


def layers(config):
    return tuple(stack.Layer(m, m, m) for m in config.mixers)


def init(config, key):
    d = config.d_model
    groups = {
        m: {name: jax.random.normal(key, (config.mixers.count(m), *(d,) * len(dims))) for name, dims in shapes.items()}
        for m, shapes in SHAPES.items()
    }
    return {"embed": {"w": jax.random.normal(key, (config.vocab_size, d))}, "layers": groups}


def init_cache(config, params, batch, length, dtype):
    d, count = config.d_model, config.mixers.count
    n = count("attention")
    kv = jnp.zeros((n, batch, length, 1, d), dtype)
    return {
        "recurrence": {"h": jnp.zeros((count("recurrence"), batch, d), dtype)},
        "attention": {"k": kv, "v": kv, "pos": jnp.full((n, batch, length), -1, jnp.int32)},
    }


def embed(config, params, tokens, *, positions=None, runtime=None):
    return params["embed"]["w"][tokens]


def trunk(config, params, x, *, positions=None, cache=None, **unused):
    def block(kind, p, x, state, depth):
        y, state = (recur if kind == "recurrence" else attend)(p, x, state)
        return x + jnp.tanh(y), state, {}

    def recur(p, x, state):
        def step(h, inputs):
            u, real = inputs
            h = jnp.where(real[:, None], jax.nn.sigmoid(p["decay"]) * h + u, h)
            return h, h

        h0 = jnp.zeros_like(x[:, 0]) if state is None else state["h"]
        real = jnp.ones(x.shape[:2], bool) if positions is None else positions >= 0  # padding leaves the state alone
        h, ys = jax.lax.scan(step, h0, ((x @ p["inp"]).swapaxes(0, 1), real.swapaxes(0, 1)))
        return ys.swapaxes(0, 1) @ p["out"], None if state is None else {"h": h}

    def attend(p, x, state):
        q, k, v = ((x @ p[name])[:, :, None] for name in "qkv")
        if state is None:
            return attention(q, k, v, CAUSAL)[:, :, 0], None
        state = write(state, k, v, positions)
        y = attention(q, state["k"], state["v"], CAUSAL, q_pos=positions, k_pos=state["pos"])
        return y[:, :, 0], state

    x, cache, _ = stack.run(block, layers(config), params["layers"], x, cache)
    return x, cache, {}


def head(config, params, hidden):
    return hidden @ params["embed"]["w"].T


def reference(tensors, config, tokens):
    """Layer by layer, token by token, in float64 numpy, from the stored tensors."""
    get = lambda name: tensors[name].astype(np.float64)
    x = get("embed")[tokens]
    for i, mixer in enumerate(config.mixers):
        w = lambda name, i=i: get(f"blocks.{i}.{name}.weight").T
        if mixer == "recurrence":
            h, y = 0, []
            for t in range(x.shape[1]):
                h = h / (1 + np.exp(-get(f"blocks.{i}.decay"))) + x[:, t] @ w("inp")
                y.append(h @ w("out"))
            y = np.stack(y, 1)
        else:
            q, k, v = x @ w("q"), x @ w("k"), x @ w("v")
            scores = np.where(np.tri(x.shape[1]) > 0, q @ k.swapaxes(1, 2) * config.d_model**-0.5, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            y = p / p.sum(-1, keepdims=True) @ v
        x = x + np.tanh(y)
    return x @ get("embed").T


def family(module) -> Family:
    return Family("toy_hybrid", __doc__, read, lambda config: RULES, module)
