"""Tiny models and drawn adapters for the tests of adapters."""

import dataclasses
import functools

import jax
import numpy as np

import jaxlm
from jaxlm.checkpoints.load import flatten, unflatten
from jaxlm.models import decoder
from jaxlm.train.adapters import Lora, Prefix, Prompt, init, is_trainable

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-3,
    "hidden_act": "silu",
    "initializer_range": 0.2,
}
PHI3 = LLAMA | {"model_type": "phi3", "pad_token_id": 0, "original_max_position_embeddings": 48}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 5}
MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "head_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 31,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 48,
    "layer_norm_epsilon": 1e-3,
    "activation_function": "gelu_new",
    "initializer_range": 0.2,
}
MODELS = {"llama": LLAMA, "phi3": PHI3, "mistral": MISTRAL, "qwen3_moe": MOE, "gpt2": GPT2}
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 8))
forward = jax.jit(decoder.forward, static_argnums=0, static_argnames=("runtime", "taps"))


@functools.cache
def model(name="llama"):
    return jaxlm.init(MODELS[name], key=jax.random.key(0))


@functools.cache
def drawn(name, config, seed=1):
    """Adapters with every learned number drawn; those of DoRA's m near what they were."""
    m = model(name)
    flat = flatten(init(config, m.family, m.config, m.params, jax.random.key(seed)))
    for i, path in enumerate(filter(is_trainable, list(flat))):
        noise = 0.3 * jax.random.normal(jax.random.key(100 * seed + i), flat[path].shape)
        flat[path] = flat[path] + noise if "/m" in path else noise
    return unflatten(flat)


def run(name, adapters=None, tokens=TOKENS, params=None, **options):
    m = model(name)
    return forward(m.config, m.params if params is None else params, tokens, adapters=adapters, **options)[0]


def close(got, want, tolerance=3e-6):
    assert np.abs(np.asarray(got) - np.asarray(want)).max() <= tolerance * np.abs(np.asarray(want)).max()


def differ(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-2 * np.abs(np.asarray(b)).max()


SOME = Lora(rank=3, alpha=5, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
EACH = {
    "llama": SOME,
    "llama-dora": dataclasses.replace(SOME, dora=True),
    "phi3": Lora(rank=3, targets=("qkv_proj", "gate_up_proj"), dora=True),
    "gpt2": Lora(rank=3),
    "qwen3_moe": Lora(rank=3, targets=("k_proj", "layers.1.mlp.up_proj"), rslora=True),
}
VIRTUAL = {"prefix": Prefix(tokens=3), "prompt": Prompt(tokens=3)}
