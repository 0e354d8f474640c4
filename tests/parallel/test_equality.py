"""Every preset computes what one device does: the loss and the gradient of every parameter, in float32, to 1e-5."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import family
from jaxlm.parallel.mesh import make_mesh, parse_preset
from jaxlm.parallel.pipeline import Pipeline
from jaxlm.parallel.sharding import shardings
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.placement import place_batch

_COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
DENSE = _COMMON | {"model_type": "llama", "intermediate_size": 48}
MOE = _COMMON | {
    "model_type": "qwen3_moe", "moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 4,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "sliding_window": None, "use_sliding_window": False, "attention_bias": False,
    "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
CONFIGS = {"dense": DENSE, "deep": DENSE | {"num_hidden_layers": 12}, "moe": MOE}
ROWS, LENGTH = 8, 16
PLAIN = Runtime()


@functools.cache
def model(name: str) -> tuple[Any, Any]:
    """Config and parameters; weights are large, so that every branch matters."""
    config = family(CONFIGS[name]["model_type"]).config(CONFIGS[name])
    return config, decoder.init(dataclasses.replace(config, init_std=0.2), jax.random.key(0))


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Rows of packed sequences of unequal lengths, with padding at the end of some."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
    targets = np.where(rng.uniform(size=tokens.shape) < 0.2, -100, tokens).astype(np.int32)
    starts = rng.uniform(size=tokens.shape) < 0.15
    segments = 1 + np.cumsum(starts, 1).astype(np.int32)
    at = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), 1)
    padding = at >= LENGTH - rng.integers(0, 5, (ROWS, 1))
    segments, positions = np.where(padding, 0, segments), np.where(padding, -1, positions).astype(np.int32)
    return {"tokens": tokens, "targets": np.where(padding, -100, targets), "segments": segments, "positions": positions}


def loss_and_gradients(name: str, preset: str | None, runtime: Runtime = PLAIN):
    """(loss, gradients) of the batch, as numpy."""
    config, params = model(name)
    objective = causal_lm(Objective(backbone=decoder, config=config, runtime=runtime, router=0.1))

    def mean(params, batch):
        total, weight, _ = objective({"params": params}, batch, None)
        return total / weight

    function = jax.jit(jax.value_and_grad(mean))
    if preset is None:
        return jax.device_get(function(params, batch()))
    mesh = make_mesh(preset, jax.devices()[: math.prod(parse_preset(preset).values())])
    placed, _ = shardings(decoder.logical_axes(config), params, mesh)
    with jax.set_mesh(mesh):
        return jax.device_get(function(jax.device_put(params, placed), place_batch(batch(), mesh)))


alone = functools.cache(lambda name: loss_and_gradients(name, None))


def assert_equal(got, want, tolerance: float = 1e-5):
    np.testing.assert_allclose(got[0], want[0], rtol=tolerance)
    differences = jax.tree_util.tree_map_with_path(
        lambda path, a, b: (np.abs(a - b).max() / np.abs(b).max(), jax.tree_util.keystr(path)), got[1], want[1]
    )
    worst = max(jax.tree.leaves(differences, is_leaf=lambda x: isinstance(x, tuple)))
    assert worst[0] < tolerance, worst


PIPELINE = Runtime(layers=Pipeline())
EXCHANGE = Runtime(attention="all_to_all")
TABLE = [
    ("dense", "data=8", PLAIN),
    ("dense", "fsdp=8", PLAIN),
    ("dense", "data=2,fsdp=4", PLAIN),
    ("dense", "data=4,tensor=2", PLAIN),
    ("dense", "tensor=8", PLAIN),  # 8 heads divide, 4 key-value heads do not
    ("dense", "data=2,fsdp=2,tensor=2", PLAIN),
    ("dense", "sequence=8", Runtime(attention="ring")),
    ("dense", "sequence=2,fsdp=2,tensor=2", Runtime(remat="full")),  # the ring is the choice
    ("dense", "sequence=2,fsdp=2,tensor=2", EXCHANGE),
    ("moe", "fsdp=4,tensor=2", PLAIN),
    ("moe", "expert=4", PLAIN),
    ("moe", "expert=2,tensor=2,fsdp=2", PLAIN),
    ("moe", "expert=2,sequence=2,data=2", PLAIN),
    ("moe", "expert=2,tensor=2,fsdp=2", Runtime(expert_capacity=9.0)),  # room for all
    ("moe", "expert=8", PLAIN),  # 4 experts stay whole
    ("dense", "pipe=2", PIPELINE),
    ("dense", "pipe=4,fsdp=2", Runtime(layers=Pipeline(4), remat="full")),
    ("dense", "pipe=2,tensor=2,fsdp=2", PIPELINE),
    ("dense", "pipe=2,sequence=2,data=2", PIPELINE),
    ("moe", "pipe=2,expert=2,fsdp=2", PIPELINE),
    ("deep", "pipe=2", Runtime(layers=Pipeline(2, repeats=2))),
    ("deep", "pipe=4", Runtime(layers=Pipeline(repeats=3), remat="full")),
    ("deep", "pipe=2,fsdp=2", Runtime(layers=Pipeline(repeats=3))),
    ("moe", "pipe=2,expert=2,fsdp=2", Runtime(layers=Pipeline(repeats=2))),
]


# Slow are those whose axes come together in another one, and more devices than experts.
SUBSUMED = {
    "data=8",
    "fsdp=8",
    "data=2,fsdp=4",
    "data=4,tensor=2",
    "tensor=8",
    "fsdp=4,tensor=2",
    "pipe=2,fsdp=2",
    "sequence=8",
    "expert=4",
    "expert=8",
    "pipe=2",
    "pipe=4",
}
MARKED = [pytest.param(*row, marks=pytest.mark.slow if row[1] in SUBSUMED else ()) for row in TABLE]


@pytest.mark.parametrize(("name", "preset", "runtime"), MARKED, ids=lambda x: x if isinstance(x, str) else "")
def test_equals_one_device(name, preset, runtime):
    assert_equal(loss_and_gradients(name, preset, runtime), alone(name))


def decoded(name: str, preset: str | None) -> list[np.ndarray]:
    """Logits of a whole pass, of a prompt into a cache, and of one more token."""
    config, params = model(name)
    tokens = batch()["tokens"]
    at = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)

    def run(params, tokens):
        whole, _, _ = decoder.forward(config, params, tokens)
        cache = decoder.init_cache(config, params, ROWS, LENGTH)
        first, cache, _ = decoder.forward(config, params, tokens[:, :-1], positions=at[:, :-1], cache=cache)
        last, _, _ = decoder.forward(config, params, tokens[:, -1:], positions=at[:, -1:], cache=cache)
        return whole, first, last

    if preset is None:
        return jax.device_get(jax.jit(run)(params, tokens))
    mesh = make_mesh(preset)
    placed, _ = shardings(decoder.logical_axes(config), params, mesh)
    with jax.set_mesh(mesh):
        return jax.device_get(jax.jit(run)(jax.device_put(params, placed), place_batch({"t": tokens}, mesh)["t"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("dense", "tensor=8"),
        ("dense", "sequence=2,tensor=2,fsdp=2"),
        ("moe", "expert=2,tensor=2,fsdp=2"),
        ("dense", "pipe=2,tensor=2,fsdp=2"),  # without a pipeline every device computes every layer
    ],
)
def test_logits_and_decoding(name, preset):
    for got, want in zip(decoded(name, preset), decoded(name, None), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
