"""GGUF files for the tests, written with llama.cpp's own `gguf` package.

What its converter does to tensors is applied here a second time, with the names of gguf.tensor_mapping. Values are
multiples of 1/1024, so that 1 + w is exact.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

from jaxlm.checkpoints.gguf import GgufFile, GgufSource, select
from jaxlm.checkpoints.load import Names
from jaxlm.models import config as models_config
from jaxlm.models import registry

ARCHS = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
Tensors = dict[str, np.ndarray]


def write(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, Any], alignment: int = 0) -> Path:
    """A GGUF file; a tensor is an array, or (bytes, type) for quantized blocks."""
    writer = GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        adders.get(type(value), writer.add_array)(key, value)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tables():
    return [table for name in registry.names() for table in registry.family(name).gguf]


def opened(path: Path) -> tuple[dict[str, Any], GgufSource]:
    file = GgufFile(path)
    table = select(file, tables())
    return table.config(file), GgufSource(file, table)


# Architectures: a config.json, and how llama.cpp's converter writes its fields

BASE = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 96, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 50_000.0}
TOKENS = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}


def common(arch: str, hf: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The keys that llama.cpp writes for every decoder; None in `more` leaves one out."""
    keys = {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        "attention.key_length": hf["head_dim"],
        "attention.value_length": hf["head_dim"],
        "rope.freq_base": hf["rope_parameters"].get("rope_theta", 1e6),
        "vocab_size": hf["vocab_size"],
        **{name.replace("__", "."): value for name, value in more.items()},
    }
    return {f"{arch}.{key}": value for key, value in keys.items() if value is not None} | TOKENS


def case(arch: str, model_type: str, hf: dict[str, Any], **more: Any):
    hf = {**BASE, "rope_parameters": ROPE, "model_type": model_type, **hf}
    return pytest.param(arch, hf, common(arch, hf, **more), id=f"{arch}-{model_type}")


SILU, GELU = {"hidden_act": "silu"}, {"hidden_activation": "gelu_pytorch_tanh"}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
NO_WINDOW = {"use_sliding_window": False}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True}
LOCAL, FULL = "sliding_attention", "full_attention"
LONG = {
    "rope_type": "longrope",
    "rope_theta": 50_000.0,
    "long_factor": [1.5, 2.5, 3.5],
    "short_factor": [1.0, 1.25, 1.5],
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.75,
}

CASES = [
    case("llama", "llama", SILU | NO_BIAS, rope__dimension_count=12, expert_count=0),
    case("llama", "llama", SILU | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    case(
        "llama",
        "mixtral",
        SILU | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": None},
        expert_count=3,
        expert_used_count=2,
    ),
    case(
        "qwen2", "qwen2", SILU | NO_WINDOW | {"head_dim": 8}, attention__key_length=None, attention__value_length=None
    ),
    case("qwen3", "qwen3", SILU | NO_WINDOW | {"attention_bias": False, "tie_word_embeddings": True}),
    case(
        "qwen3moe",
        "qwen3_moe",
        SILU | NO_WINDOW | MOE | {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        expert_count=3,
        expert_used_count=2,
        expert_feed_forward_length=20,
    ),
    case(
        "gemma",
        "gemma",
        {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rope_parameters": ROPE | {"rope_theta": 1e4}},
        rope__freq_base=None,
    ),
    case(
        "gemma2",
        "gemma2",
        GELU
        | {
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 12,
            "sliding_window": 16,
            "layer_types": [LOCAL, FULL, LOCAL],
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
        },
        attention__sliding_window=16,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=10.0,
    ),
    case(
        "gemma3",
        "gemma3_text",
        GELU
        | {
            "num_hidden_layers": 7,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 12,
            "sliding_window": 16,
            "layer_types": [LOCAL] * 5 + [FULL, LOCAL],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
                FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        attention__sliding_window=16,
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
    ),
    case(
        "phi3",
        "phi3",
        SILU | {"head_dim": 8, "sliding_window": 20, "rope_parameters": LONG, "original_max_position_embeddings": 32},
        attention__key_length=None,
        attention__value_length=None,
        attention__sliding_window=20,
        rope__dimension_count=6,
        rope__scaling__original_context_length=32,
        rope__scaling__attn_factor=math.sqrt(1 + math.log(3) / math.log(32)),
    ),
    case(
        "granite",
        "granite",
        SILU
        | NO_BIAS
        | {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        attention__key_length=None,
        attention__value_length=None,
        attention__scale=0.25,
        embedding_scale=12.0,
        residual_scale=0.22,
        logit_scale=8.0,
        rope__dimension_count=8,
    ),
    case(
        "olmo2",
        "olmo2",
        SILU | {"head_dim": 8, "attention_bias": False},
        attention__key_length=None,
        attention__value_length=None,
    ),
]
GPT2 = {
    "model_type": "gpt2", "vocab_size": 40, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True, "dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT2_KEYS = {
    "gpt2.block_count": 3, "gpt2.context_length": 24, "gpt2.embedding_length": 32, "gpt2.feed_forward_length": 128,
    "gpt2.attention.head_count": 4, "gpt2.attention.layer_norm_epsilon": 1e-5, **TOKENS,
}  # fmt: skip
CASES.append(pytest.param("gpt2", GPT2, GPT2_KEYS, id="gpt2-gpt2"))


def needed(hf: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the model of a config.json stores."""
    family = registry.family(hf["model_type"])
    config = family.config(hf)
    tree = jax.eval_shape(lambda key: family.backbone.init(config, key), jax.random.key(0))
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {"/".join(str(part.key) for part in path): leaf.shape for path, leaf in flat}
    names = Names(family.rules(config), leaves, models_config.groups(config.kinds), family.base)
    return {name: binding.stored_shape for name, binding in names.bindings.items()}


def random_tensors(hf: dict[str, Any]) -> Tensors:
    rng = np.random.default_rng(len(hf))
    return {name: rng.integers(-900, 900, shape).astype(np.float32) / 1024 for name, shape in needed(hf).items()}


def llama_cpp(arch: str, hf: dict[str, Any], tensors: Tensors, merge: bool = True) -> Tensors:
    """What llama.cpp's converter writes for these tensors; `merge`: experts as one tensor (since April 2024)."""
    n_layers = hf.get("num_hidden_layers", hf.get("n_layer"))
    names = get_tensor_name_map(ARCHS[arch], n_layers)
    heads = {"q_proj": hf.get("num_attention_heads"), "k_proj": hf.get("num_key_value_heads")}
    out: Tensors = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, x in tensors.items():
        base, suffix = name.rsplit(".", 1)
        part = base.split(".")[-1]
        if arch in ("llama", "granite") and part in heads:
            x = x.reshape(heads[part], 2, len(x) // heads[part] // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + np.float32(1)
        if part in ("c_attn", "c_proj", "c_fc") and suffix == "weight":
            x = x.T
        if ".experts." not in name:
            out[f"{names.get_name(base)}.{suffix}"] = np.ascontiguousarray(x)
            continue
        before, after = base.split(".experts.")
        expert, part = after.split(".")
        if arch == "llama":
            before = before.replace("model.", "").replace("block_sparse_moe", "feed_forward")
        merged = names.get_name(f"{before}.experts.{part}")
        if merge:
            experts.setdefault(f"{merged}.weight", []).append(x)
        else:
            out[f"{merged.removesuffix('_exps')}.{expert}.weight"] = x
    return out | {name: np.stack(parts) for name, parts in experts.items()}


def rope_tensors(hf: dict[str, Any]) -> Tensors:
    rope = hf.get("rope_parameters", {})
    names = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
    return {gguf: np.array(rope[key], np.float32) for key, gguf in names.items() if key in rope}


def llama_file(tmp_path: Path, tensors: Tensors | None = None, drop: tuple[str, ...] = (), **more: Any) -> Path:
    """The first case's file, with more or fewer keys and tensors."""
    _, hf, metadata = CASES[0].values
    keys = metadata | {f"llama.{key.replace('__', '.')}": value for key, value in more.items()}
    stored = llama_cpp("llama", hf, random_tensors(hf)) | (tensors or {})
    return write(tmp_path / "x.gguf", "llama", keys, {name: x for name, x in stored.items() if name not in drop})
