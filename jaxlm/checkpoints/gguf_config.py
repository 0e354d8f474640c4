"""What families share on the GGUF side: tables of tensors, and config.json (transformers 5 spelling) from the metadata.

The metadata is read as strictly as a config.json: a key of the architecture that no one read is an error, because
it may change what the model computes. Values are those of llama.cpp's loader where the file leaves a key out.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxlm.checkpoints.gguf import GgufFile, GgufTensor

L, B = "model.layers.{layer}.", "blk.{layer}."


def layer(gguf: str, hf: str, **how: Any) -> GgufTensor:
    """A tensor of every layer, by the ends of its two names."""
    return GgufTensor(B + gguf, L + hf, **how)


EMBED = (
    GgufTensor("token_embd.weight", "model.embed_tokens.weight"),
    GgufTensor("output_norm.weight", "model.norm.weight"),
    GgufTensor("output.weight", "lm_head.weight", optional=True),  # absent: the head is tied
)
NORMS = (
    layer("attn_norm.weight", "input_layernorm.weight"),
    layer("ffn_norm.weight", "post_attention_layernorm.weight"),
)
PARTS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
ATTENTION = tuple(layer(f"attn_{part}.weight", f"self_attn.{hf}.weight") for part, hf in PARTS.items())
BIASES = tuple(layer(f"attn_{part}.bias", f"self_attn.{hf}.bias", optional=True) for part, hf in PARTS.items())
QK_NORMS = tuple(layer(f"attn_{part}_norm.weight", f"self_attn.{part}_norm.weight") for part in "qk")
MLP = tuple(layer(f"ffn_{part}.weight", f"mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
MLP_BIASES = tuple(layer(f"ffn_{part}.bias", f"mlp.{part}_proj.bias", optional=True) for part in ("gate", "up", "down"))

ROPE_FREQS = "rope_freqs.weight"
ROPE_FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")
ROPE_TENSORS = (ROPE_FREQS, *ROPE_FACTORS)


def experts(prefix: str, gate: str, up: str, down: str) -> tuple[GgufTensor, ...]:
    """A mixture's experts: stacked, stacked with gate and up in one, or one by one (files before April 2024)."""
    names = {"gate": gate, "up": up, "down": down}
    hf = {part: f"{prefix}.experts.{{expert}}.{name}.weight" for part, name in names.items()}
    return (
        *(layer(f"ffn_{part}_exps.weight", hf[part]) for part in names),
        *(layer("ffn_gate_up_exps.weight", hf[part], half=i) for i, part in enumerate(("gate", "up"))),
        *(layer(f"ffn_{part}.{{expert}}.weight", hf[part]) for part in names),
    )


def permuted(tensors: tuple[GgufTensor, ...]) -> tuple[GgufTensor, ...]:
    """The same with q and k as llama.cpp stores them for its architectures of interleaved RoPE."""
    keys = {".attn_q.": "attention.head_count", ".attn_k.": "attention.head_count_kv"}
    return tuple(
        dataclasses.replace(t, heads=next((key for part, key in keys.items() if part in t.gguf), None)) for t in tensors
    )


def required(tensors: tuple[GgufTensor, ...]) -> tuple[GgufTensor, ...]:
    """The same, none of them optional."""
    return tuple(dataclasses.replace(t, optional=False) for t in tensors)


def shifted(tensors: tuple[GgufTensor, ...]) -> tuple[GgufTensor, ...]:
    """The same with norms stored as 1 + w."""
    return tuple(dataclasses.replace(t, offset=-1.0 if t.gguf.endswith("norm.weight") else 0.0) for t in tensors)


class Keys:
    """Hands out the metadata under the architecture's prefix and remembers which; `finish` raises on the rest."""

    # About how the file was made; or stated by the tensors themselves.
    INERT = frozenset(("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"))

    def __init__(self, file: GgufFile):
        self.file, self.prefix = file, f"{file.architecture}."
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        """The value of a required key."""
        self._read.add(key)
        return self._plain(key, self.file.value(self.prefix + key))

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self[key] if self.prefix + key in self.file.metadata else default

    def expect(self, key: str, *allowed: Any) -> None:
        """For what is not supported: a value other than these raises; the first is the default."""
        if (value := self.get(key, allowed[0])) not in allowed:
            raise self.error(key, value, " or ".join(map(repr, allowed)))

    def error(self, key: str, value: Any, expected: str) -> ValueError:
        return ValueError(f"{self.file.path}: metadata {self.prefix + key!r} is {value!r}, expected {expected}")

    def finish(self) -> None:
        known = {self.prefix + key for key in self._read | self.INERT}
        mine = {key: value for key, value in self.file.metadata.items() if key.startswith(self.prefix)}
        if unread := [f"{key}={value!r}" for key, value in mine.items() if key not in known]:
            raise ValueError(f"{self.file.path}: metadata that this architecture does not know: {', '.join(unread)}")

    def _plain(self, key: str, value: Any) -> Any:
        """Arrays (one value a layer) as the value they repeat; numbers as they were written before their float32."""
        if isinstance(value, np.ndarray):
            distinct = sorted(set(value.tolist()))
            if len(distinct) != 1:
                raise self.error(key, distinct, "the same value for every layer")
            value = distinct[0]
        if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
            return float(str(np.float32(value)))
        return value


def decoder(
    file: GgufFile, model_type: str, architecture: str, partial: bool = False, experts: bool = False
) -> tuple[dict[str, Any], Keys]:
    """The fields of config.json that every family has, and the keys, of which the family reads its own and finishes.

    partial: RoPE may turn only some of a head's features. experts: the family reads the keys of its mixture itself.
    """
    keys = Keys(file)
    keys.expect("attention.causal", True)
    if experts:  # what the supported mixtures have in common
        keys.expect("expert_gating_func", 1)  # softmax
        keys.expect("expert_weights_norm", True)
        keys.expect("expert_weights_scale", 1.0, 0.0)
        keys.expect("expert_shared_count", 0)
    else:
        keys.expect("expert_count", 0)
        keys.expect("expert_used_count", 0)
    d_model, n_heads = keys["embedding_length"], keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", d_model // n_heads)
    keys.expect("attention.value_length", head_dim)
    config = {
        **identity(file, model_type, architecture),
        "hidden_size": d_model,
        "intermediate_size": keys["feed_forward_length"],
        "num_hidden_layers": keys["block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
    }
    config["rope_parameters"] = rope(keys, head_dim, config["max_position_embeddings"], partial)
    return config, keys


def identity(file: GgufFile, model_type: str, architecture: str) -> dict[str, Any]:
    """What the file is, and what its tensors and its vocabulary say."""
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: has no tensor 'token_embd.weight'")
    embedding = file.tensors["token_embd.weight"]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": str(np.dtype(embedding.type.dtype or np.float32)),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **token_ids(file),
    }


def token_ids(file: GgufFile) -> dict[str, Any]:
    """bos_token_id, eos_token_id (with the end of a turn, where the file names one) and pad_token_id."""
    bos, eos, eot, eom, pad = (
        file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")
    )
    ends = list(dict.fromkeys(end for end in (eos, eot, eom) if end is not None))
    return {"bos_token_id": bos, "eos_token_id": ends if len(ends) > 1 else eos, "pad_token_id": pad}


# Ends of a turn that many files hold without naming them; llama.cpp stops at them, and so do the generation_config.json
# of the models they come from.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")


def generation(file: GgufFile) -> dict[str, Any]:
    """The fields of generation_config.json: the special tokens, and the sampler's settings where the file has them."""
    sampling = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    found = {hf: file.metadata.get(f"general.sampling.{key}") for hf, key in sampling.items()}
    given = {hf: value for hf, value in {**token_ids(file), **found}.items() if value is not None}
    if "tokenizer.chat_template" in file.metadata:
        tokens, ends = file.metadata.get("tokenizer.ggml.tokens", []), given.get("eos_token_id", [])
        ends = ends if isinstance(ends, list) else [ends]
        ends = list(dict.fromkeys([*ends, *(tokens.index(token) for token in TURN_ENDS if token in tokens)]))
        given |= {"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {}
    return given | ({"do_sample": given["temperature"] > 0} if "temperature" in given else {})


def biased(file: GgufFile, tensors: tuple[GgufTensor, ...]) -> bool:
    """Whether these biases, which one flag of config.json switches on together, are there; some of them is an error."""
    names = [t.gguf.format(layer=0) for t in tensors]
    present = [name in file.tensors for name in names]
    if any(present) and not all(present):
        lacking = ", ".join(name for name, there in zip(names, present, strict=True) if not there)
        raise ValueError(f"{file.path}: has only some of the biases of this architecture; missing: {lacking}")
    return all(present)


def rope(keys: Keys, head_dim: int, context: int, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters`, from the keys under `rope.` and the tensors of frequency divisors."""
    theta, dim = keys.get("rope.freq_base", 10_000.0), keys.get("rope.dimension_count", head_dim)
    if not partial and dim != head_dim:
        raise keys.error("rope.dimension_count", dim, f"the head's {head_dim}")
    common = {"rope_theta": theta} | ({"partial_rotary_factor": dim / head_dim} if dim != head_dim else {})
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0.0))
    kind = keys.get("rope.scaling.type", "linear")
    original = keys.get("rope.scaling.original_context_length", context)
    if ROPE_FREQS in keys.file.tensors:
        return common | _llama3(keys, theta, dim)
    if ROPE_FACTORS[0] in keys.file.tensors or kind == "longrope":
        return common | _longrope(keys, original, context)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return common | {"rope_type": "default"}
    if kind == "linear":
        return common | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return common | _yarn(keys, factor, original)
    raise keys.error("rope.scaling.type", kind, "'none', 'linear', 'yarn' or 'longrope'")


def _yarn(keys: Keys, factor: float, original: int) -> dict[str, Any]:
    keys.expect("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    keys.expect("rope.scaling.attn_factor", 1.0)
    names = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    given = {hf: keys.get(f"rope.scaling.{name}") for hf, name in names.items()}
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        **{hf: value for hf, value in given.items() if value is not None},
    }


def _longrope(keys: Keys, original: int, context: int) -> dict[str, Any]:
    factors = [[float(str(f)) for f in keys.file.read(name).astype(np.float32)] for name in ROPE_FACTORS]
    scale = context / original
    inferred = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    attention = keys.get("rope.scaling.attn_factor", inferred)
    return {
        "rope_type": "longrope",
        "long_factor": factors[0],
        "short_factor": factors[1],
        "original_max_position_embeddings": original,
        # Left out when it is what transformers infers, as in the published files.
        **({} if math.isclose(attention, inferred, rel_tol=1e-6) else {"attention_factor": attention}),
    }


def _llama3(keys: Keys, theta: float, dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, of which the file holds only the divisor of each frequency.

    The divisors depend on original_context / low and original_context / high alone, so low is 1; every published
    model has high = 4. The context is found by trying: it must reproduce the divisors to float32's precision.
    """
    stored = keys.file.read(ROPE_FREQS).astype(np.float64)
    if stored.shape == (dim // 2,) and np.all(stored == 1):
        return {"rope_type": "default"}
    high, factor = 4.0, float(str(np.float32(stored.max())))
    freqs = theta ** -(np.arange(0, dim, 2) / dim)
    for original in (2**i for i in range(10, 21)):
        smooth = np.clip((original * freqs / (2 * math.pi) - 1) / (high - 1), 0, 1)
        divisors = 1 / ((1 - smooth) / factor + smooth)
        # Only what lies between 1 and the factor tells the context. The tolerance is what llama.cpp's float32
        # arithmetic loses where `smooth` is near 0; the next context is 1e-2 away.
        tells = stored.shape == divisors.shape and np.any((smooth > 0) & (smooth < 1))
        if tells and np.allclose(stored, divisors, rtol=2e-5, atol=0):
            ramp = {"low_freq_factor": 1.0, "high_freq_factor": high}
            return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original, **ramp}
    raise ValueError(
        f"{keys.file.path}: tensor {ROPE_FREQS!r} holds frequency divisors that are not Llama 3's scaling "
        f"(low_freq_factor 1, high_freq_factor {high:g}, an original context of a power of two); nothing else is "
        f"supported: {np.array2string(stored, precision=4, threshold=6)}"
    )
