"""GGUF: every architecture's tensors come back exactly, and its config.json, under their Hugging Face names."""

import math

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from transformers import AutoConfig

from jaxlm.checkpoints import gguf_config
from jaxlm.checkpoints.gguf import GgufFile, GgufSource
from jaxlm.models import registry
from tests.checkpoints.gguf_cases import (
    CASES,
    GPT2,
    GPT2_KEYS,
    ROPE,
    TOKENS,
    Tensors,
    llama_cpp,
    llama_file,
    needed,
    opened,
    random_tensors,
    rope_tensors,
    write,
)


def check_source(source: GgufSource, tensors: Tensors) -> None:
    assert {name: info.shape for name, info in source.tensors.items()} == {n: x.shape for n, x in tensors.items()}
    for name, x in tensors.items():
        assert source.tensors[name].dtype == x.dtype
        np.testing.assert_array_equal(source.read(name), x, err_msg=name)
        first, last = len(x) // 3, len(x) - len(x) // 4
        part = source.read(name, slice(first, last))
        np.testing.assert_array_equal(part, x[first:last], err_msg=name)
        assert part.dtype == x.dtype and part.flags.c_contiguous


@pytest.mark.parametrize(("arch", "hf", "metadata"), CASES)
def test_architecture_comes_back(tmp_path, arch, hf, metadata):
    tensors = random_tensors(hf)
    path = write(tmp_path / "x.gguf", arch, metadata, llama_cpp(arch, hf, tensors) | rope_tensors(hf))
    config, source = opened(path)
    check_source(source, tensors)
    architectures = config.pop("architectures")
    assert config == hf
    # transformers takes the config, and the family reads it to the same model.
    theirs = AutoConfig.for_model(**config)
    assert architectures[0].lower().startswith(config["model_type"].split("_")[0])
    assert {key: getattr(theirs, key) for key in hf if key not in ("rope_parameters", "dtype")} == {
        key: value for key, value in hf.items() if key not in ("rope_parameters", "dtype")
    }
    family = registry.family(config["model_type"])
    assert family.config(config | {"architectures": architectures}) == family.config(hf)


@pytest.mark.parametrize(
    "hf", [p.values[1] for p in CASES if "experts" in str(p.values[1])], ids=["mixtral", "qwen3moe"]
)
@pytest.mark.parametrize("layout", ["one by one", "gate and up in one"])
def test_experts_in_other_layouts(tmp_path, hf, layout):
    (arch, _, metadata) = next(p.values for p in CASES if p.values[1] is hf)
    tensors = random_tensors(hf)
    stored = llama_cpp(arch, hf, tensors, merge=layout != "one by one")
    if layout == "gate and up in one":
        for layer in range(hf["num_hidden_layers"]):
            halves = [stored.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
            stored[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)
    check_source(opened(write(tmp_path / "x.gguf", arch, metadata, stored))[1], tensors)


def test_quantized_rows_of_permuted_and_stacked_tensors(tmp_path):
    """Row ranges of quantized tensors: only the lines asked for are dequantized, and to the same values."""
    (arch, hf, metadata) = next(p.values for p in CASES if p.values[1]["model_type"] == "mixtral")
    hf = {**hf, "hidden_size": 64, "intermediate_size": 32}
    metadata = {**metadata, "llama.embedding_length": 64, "llama.feed_forward_length": 32}
    tensors = random_tensors(hf)
    kind = GGMLQuantizationType.Q8_0
    quantized = {
        name: (quants.quantize(x, kind), kind) if x.ndim > 1 and x.shape[-1] % 32 == 0 else x
        for name, x in llama_cpp(arch, hf, tensors).items()
    }
    # Quantizing blocks of a row and permuting rows commute, so the expectation needs no permutation.
    expected = {
        name: quants.dequantize(quants.quantize(x, kind), kind) if x.ndim > 1 and x.shape[-1] % 32 == 0 else x
        for name, x in tensors.items()
    }
    check_source(opened(write(tmp_path / "x.gguf", arch, metadata, quantized))[1], expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays(tmp_path, dtype):
    (arch, hf, metadata) = CASES[0].values
    tensors = random_tensors(hf)
    narrow = lambda x: x.astype(np.dtype(dtype)) if x.ndim > 1 else x
    stored = {name: narrow(x) for name, x in llama_cpp(arch, hf, tensors).items()}
    if dtype == "bfloat16":
        stored = {n: (x.view(np.uint8), GGMLQuantizationType.BF16) if x.ndim > 1 else x for n, x in stored.items()}
    config, source = opened(write(tmp_path / "x.gguf", arch, metadata, stored))
    assert config["dtype"] == dtype
    check_source(source, {name: narrow(x) for name, x in tensors.items()})


def test_old_gpt2_with_a_copied_head(tmp_path):
    tensors = random_tensors({**GPT2, "tie_word_embeddings": False})
    config, source = opened(write(tmp_path / "x.gguf", "gpt2", GPT2_KEYS, llama_cpp("gpt2", GPT2, tensors)))
    assert config["tie_word_embeddings"] is False
    check_source(source, tensors)


def test_real_files(smollm2_gguf, gemma3_gguf):
    for path, model_type, tensor_count in ((smollm2_gguf, "llama", 272), (gemma3_gguf, "gemma3_text", 236)):
        config, source = opened(path)
        assert config["model_type"] == model_type
        assert {name: info.shape for name, info in source.tensors.items()} == needed(config)
        assert len(source.tensors) == tensor_count
        source.close()


def test_gemma3_norms_are_centred(gemma3_gguf):
    """Stored around 1 + w, so that forgetting the offset would show."""
    _, source = opened(gemma3_gguf)
    stored = source.file.read("blk.5.attn_q_norm.weight")
    np.testing.assert_array_equal(source.read("model.layers.5.self_attn.q_norm.weight"), stored - np.float32(1))


# RoPE and other fields of the config


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope__scaling__type": "none"}, {"rope_type": "default"}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 1.0}, {"rope_type": "default"}),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope__scaling__factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 24,
                "rope__scaling__yarn_beta_fast": 16.0,
                "rope__scaling__yarn_beta_slow": 2.0,
                "rope__scaling__yarn_attn_factor": 1.1,
                "rope__scaling__finetuned": True,
            },
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.1},
        ),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 24,
            },
            YARN,
        ),
    ],
)
def test_rope_scaling(tmp_path, keys, expected):
    config, _ = opened(llama_file(tmp_path, **keys))
    assert config["rope_parameters"] == expected | {"rope_theta": 50_000.0}
    registry.family("llama").config(config)


def llama3_divisors(theta: float, dim: int, factor: float, original: int, low: float, high: float) -> np.ndarray:
    """llama.cpp's rope_freqs.weight, in its float32 steps."""
    f32 = np.float32
    divisors = []
    for i in range(0, dim, 2):
        freq = f32(1) / f32(theta) ** (f32(i) / f32(dim))
        wavelength = f32(2 * math.pi) / freq
        if wavelength < original / high:
            divisors.append(1)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (f32(original) / wavelength - f32(low)) / f32(high - low)
            divisors.append(f32(1) / ((f32(1) - smooth) / f32(factor) + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("theta", "dim", "factor", "original"),
    [(500_000.0, 128, 8.0, 8192), (500_000.0, 64, 32.0, 8192), (1e6, 96, 16.0, 4096), (20_000.0, 12, 3.5, 1024)],
)
def test_llama3_scaling_is_found_again(tmp_path, theta, dim, factor, original):
    divisors = llama3_divisors(theta, dim, factor, original, 1.0, 4.0)
    metadata = {"llama.rope.freq_base": theta}
    keys = gguf_config.Keys(GgufFile(write(tmp_path / "x.gguf", "llama", metadata, {"rope_freqs.weight": divisors})))
    assert gguf_config.rope(keys, dim, 131_072) == {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


def test_rope_freqs_of_one_scale_nothing(tmp_path):
    config, _ = opened(llama_file(tmp_path, {"rope_freqs.weight": np.ones(6, np.float32)}))
    assert config["rope_parameters"] == ROPE


@pytest.mark.parametrize(
    "divisors",
    [
        llama3_divisors(50_000.0, 12, 8.0, 8192, 1.0, 2.0),
        llama3_divisors(50_000.0, 12, 8.0, 8192, 1.0, 4.0) * np.float32(1.001),
        np.linspace(1, 2, 6, dtype=np.float32),
        np.full(5, 4, np.float32),
    ],
)
def test_other_rope_freqs_are_refused(tmp_path, divisors):
    with pytest.raises(ValueError, match=r"x\.gguf: tensor 'rope_freqs\.weight' holds .* not Llama 3's"):
        opened(llama_file(tmp_path, {"rope_freqs.weight": divisors}))


def test_special_tokens_and_generation_config(tmp_path):
    keys = TOKENS | {"general.sampling.temp": 0.5, "general.sampling.top_k": 40}
    keys |= {"tokenizer.ggml.tokens": ["a", "b", "c", "<|im_end|>", "<|eot_id|>"], "tokenizer.ggml.eot_token_id": 4}
    nothing = {"a": np.zeros(1, np.float32)}
    file = GgufFile(write(tmp_path / "x.gguf", "llama", keys, nothing))
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0}
    assert gguf_config.token_ids(file) == tokens
    assert gguf_config.generation(file) == tokens | {"temperature": 0.5, "top_k": 40, "do_sample": True}
    # With a chat template, generation ends where a turn does.
    file = GgufFile(write(tmp_path / "y.gguf", "llama", keys | {"tokenizer.chat_template": "..."}, nothing))
    assert gguf_config.generation(file)["eos_token_id"] == [2, 4, 3]
    assert gguf_config.generation(GgufFile(write(tmp_path / "z.gguf", "llama", {}, nothing))) == {}


# What does not fit: one ValueError that names the file and the thing


def test_unknown_architecture(tmp_path):
    path = write(tmp_path / "x.gguf", "mamba", {}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(
        ValueError, match=r"x\.gguf: GGUF architecture 'mamba' is not supported; supported: gemma, .*llama"
    ):
        opened(path)


def test_missing_and_unexpected_tensors_in_one_error(tmp_path):
    path = llama_file(
        tmp_path,
        {"blk.3.attn_q.weight": np.zeros((2, 2), np.float32), "blk.0.attn_q.scale": np.zeros(1, np.float32)},
        drop=("blk.1.ffn_up.weight", "output_norm.weight"),
    )
    with pytest.raises(ValueError) as error:
        opened(path)
    message = str(error.value)
    assert "x.gguf: does not fit GGUF architecture 'llama'" in message
    assert "missing tensors 'output_norm.weight', 'blk.1.ffn_up.weight'" in message
    assert "unexpected tensors 'blk.3.attn_q.weight', 'blk.0.attn_q.scale'" in message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"attention__clamp_kqv": 8.0},
            r"metadata that this architecture does not know: llama\.attention\.clamp_kqv=8",
        ),
        ({"block_count": 2**31}, r"metadata 'llama\.block_count' is 2147483648, which 30 tensors cannot be"),
        ({"attention__causal": False}, r"metadata 'llama\.attention\.causal' is False, expected True"),
        ({"attention__value_length": 16}, r"metadata 'llama\.attention\.value_length' is 16, expected 12"),
        ({"rope__dimension_count": 6}, r"metadata 'llama\.rope\.dimension_count' is 6, expected the head's 12"),
        ({"rope__scaling__type": "magic"}, r"metadata 'llama\.rope\.scaling\.type' is 'magic', expected"),
        (
            {"attention__head_count_kv": [2, 1, 2]},
            r"metadata 'llama\.attention\.head_count_kv' is \[1, 2\], expected the same value for every layer",
        ),
    ],
)
def test_metadata_that_is_not_supported(tmp_path, keys, message):
    with pytest.raises(ValueError, match=rf"x\.gguf: {message}"):
        opened(llama_file(tmp_path, **keys))


def test_only_some_biases(tmp_path):
    with pytest.raises(ValueError, match=r"x\.gguf: has only some of the biases .*missing: blk\.0\.attn_output\.bias"):
        opened(llama_file(tmp_path, {f"blk.0.attn_{p}.bias": np.zeros(48, np.float32) for p in "qkv"}))


def test_missing_metadata(tmp_path):
    path = write(tmp_path / "x.gguf", "llama", {}, {"token_embd.weight": np.zeros((4, 4), np.float32)})
    with pytest.raises(ValueError, match=r"x\.gguf: the metadata has no 'llama\.embedding_length'"):
        opened(path)


def test_unknown_names(tmp_path):
    _, source = opened(llama_file(tmp_path))
    with pytest.raises(ValueError, match=r"x\.gguf: has no tensor for 'model.nothing'"):
        source.read("model.nothing")
    with pytest.raises(ValueError, match=r"x\.gguf: has no tensor 'nothing'"):
        source.file.read("nothing")
    with pytest.raises(ValueError, match="rows must be contiguous"):
        source.read("lm_head.weight", slice(0, 10, 2))
