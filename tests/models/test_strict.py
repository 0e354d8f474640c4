"""Bad input at the door of a model: one error that names the file, the field or the tensor, and what was expected."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.models import registry
from jaxlm.models.reader import INERT
from tests.models.cases import ARCHITECTURES, FAMILIES, VOCAB

every_architecture = pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda c: c.id)

# Keys that may take any value: they belong to training, to other heads, or are overruled by another key.
WITHOUT_EFFECT = {
    "llama": {"pretraining_tp"},
    "mixtral": {"output_router_logits", "router_aux_loss_coef"},
    "qwen2": {"max_window_layers", "layer_types", "sliding_window", "use_sliding_window"},
    "qwen3": {"max_window_layers", "layer_types", "sliding_window", "use_sliding_window"},
    "qwen3_moe": {"max_window_layers", "output_router_logits", "router_aux_loss_coef"}
    | {"mlp_only_layers", "sliding_window", "use_sliding_window"},
    "gemma2": {"hidden_act"},
    "gemma3_text": {"_sliding_window_pattern", "sliding_window_pattern"},
    "phi3": {"original_max_position_embeddings"},
    "gpt2": {"reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"}
    | {"summary_type", "summary_use_proj"},
}


@functools.cache
def _hf(case) -> str:
    kwargs = json.loads(json.dumps(case.kwargs))
    return getattr(transformers, case.config)(**kwargs).to_json_string(use_diff=False)


def hf_config(case) -> dict:
    return json.loads(_hf(case)) | case.stored


LLAMA = hf_config(ARCHITECTURES[0])
GPT2 = hf_config(ARCHITECTURES[-1])


def read(hf: dict, **options):
    return registry.family(hf["model_type"]).config(hf, **options)


def without(hf: dict, *keys: str) -> dict:
    return {k: v for k, v in hf.items() if k not in keys}


# config.json


@every_architecture
def test_unknown_field_is_refused_by_name(case):
    hf = hf_config(case)
    with pytest.raises(ValueError, match=r"does not know: clip_qkv=8.0, speech=\{'x': 1\}.*--ignore-field"):
        read(hf | {"clip_qkv": 8.0, "speech": {"x": 1}})
    assert read(hf | {"clip_qkv": 8.0}, ignore_fields=("clip_qkv",)) == read(hf)
    with pytest.raises(ValueError, match=r"ignore_fields names no_such_field, which config.json does not have"):
        read(hf, ignore_fields=("no_such_field",))


@pytest.mark.parametrize("case", FAMILIES, ids=lambda c: c.id)
def test_no_field_is_ignored_silently(case):
    """Another value of any key gives another config, or an error, or is on the list above."""
    hf = hf_config(case)
    base, silent = read(hf), set()
    for key, value in hf.items():
        if key in INERT or isinstance(value, dict):
            continue
        try:
            changed = read(hf | {key: another(value)})
        except ValueError:
            continue
        if changed == base:
            silent.add(key)
    assert silent <= WITHOUT_EFFECT.get(hf["model_type"], set())


@pytest.mark.parametrize("case", [c for c in FAMILIES if "rope_parameters" in c.kwargs], ids=lambda c: c.id)
def test_no_field_of_the_rope_is_ignored_silently(case):
    hf = hf_config(case)
    nested = [k for k, v in hf["rope_parameters"].items() if isinstance(v, dict)]
    for part in nested or [None]:
        ropes = hf["rope_parameters"]
        inner = ropes if part is None else ropes[part]
        put = lambda new, part=part, ropes=ropes: hf | {"rope_parameters": new if part is None else ropes | {part: new}}
        with pytest.raises(ValueError, match=r"does not know: rope_parameters.*\bshrink=2"):
            read(put(inner | {"shrink": 2}))
        with pytest.raises(ValueError, match="rope_type 'spiral' is not supported; supported: default, linear"):
            read(put(inner | {"rope_type": "spiral"}))
        for key, value in inner.items():
            if isinstance(value, float) and key != "partial_rotary_factor":
                assert read(put(inner | {key: value * 0.5})) != read(hf), key
        if "partial_rotary_factor" in inner:
            size = hf["hidden_size"] // hf["num_attention_heads"]
            with pytest.raises(ValueError, match="is not an even number"):
                read(put(inner | {"partial_rotary_factor": 3.1 / size}))
            shorter = {k: v[:2] for k, v in inner.items() if isinstance(v, list)}
            assert read(put(inner | shorter | {"partial_rotary_factor": 4.1 / size})) != read(hf)


def another(value):
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2 + 1
        case str():
            return value + "x"
        case list():
            return value + value[:1]
    return 3


@every_architecture
@pytest.mark.parametrize("kind", ["vocabulary", "depth"])
def test_missing_field_is_named(case, kind):
    key = {"vocabulary": "vocab_size", "depth": "n_layer" if case.config == "GPT2Config" else "num_hidden_layers"}[kind]
    with pytest.raises(ValueError, match=f"config.json has no '{key}', which this architecture needs"):
        read(without(hf_config(case), key))


@pytest.mark.parametrize(
    ("model_type", "field", "value", "message"),
    [
        ("llama", "hidden_act", "mish", r"hidden_act='mish' is not supported; supported: silu"),
        ("gemma3_text", "use_bidirectional_attention", True, "use_bidirectional_attention=True is not supported"),
        ("phi3", "attention_bias", True, "attention_bias=True is not supported; expected False"),
        ("gpt2", "add_cross_attention", True, "add_cross_attention=True is not supported"),
        ("gemma3_text", "layer_types", ["full_attention"], "1 layer_types for num_hidden_layers=8"),
        ("gemma2", "layer_types", ["chunked_attention"] * 5, r"layer_types \['chunked_attention'\] are not supported"),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0}, "has both rope_parameters and rope_scaling"),
        ("llama", "rope_parameters", 3, "rope_parameters must be an object, got 3"),
        ("llama", "rope_parameters", {"rope_type": "linear"}, "rope_parameters has no 'factor'"),
        ("llama", "quantization_config", {"bits": 4}, "does not know: quantization_config"),
    ],
)
def test_unsupported_value_is_named(model_type, field, value, message):
    (case,) = [c for c in ARCHITECTURES if hf_config(c)["model_type"] == model_type]
    with pytest.raises(ValueError, match=message):
        read(hf_config(case) | {field: value})


def test_misspelled_field_gets_a_hint():
    with pytest.raises(ValueError, match=r"has no 'intermediate_size'.*; it has 'intermediate_sizes'"):
        read(without(LLAMA, "intermediate_size") | {"intermediate_sizes": 40})


def test_unknown_model_type_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model_type 'lama', did you mean 'llama'; there are .*gpt2"):
        jaxlm.init(LLAMA | {"model_type": "lama"})
    with pytest.raises(ValueError, match="no 'model_type'"):
        jaxlm.init(without(LLAMA, "model_type"))


# Tensors


def checkpoint(directory: Path, hf: dict, edit=lambda tensors: None) -> Path:
    """A checkpoint of random weights, after an edit of its tensors."""
    model = jaxlm.init(without(hf, "initializer_range") | {"initializer_range": 0.2}, key=jax.random.key(0))
    model.save(directory)
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def refused(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:
        jaxlm.load(directory)
    return str(caught.value)


def test_missing_unexpected_and_misshaped_tensors_are_in_one_message(tmp_path):
    def edit(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.lora"] = np.zeros((3, 2), np.float32)
        tensors["model.embed_tokens.weight"] = np.zeros((VOCAB + 3, 32), np.float32)
        tensors["model.layers.2.input_layernorm.weight"] = np.zeros(32, np.int32)

    message = refused(checkpoint(tmp_path / "x", LLAMA, edit))
    for line in (
        "5 tensors are wrong",
        "missing model.layers.1.mlp.up_proj.weight, expected [40, 32]",
        "missing model.norm.weight, expected [32]",
        "unexpected model.layers.0.self_attn.q_proj.lora [3, 2] in model.safetensors",
        "model.embed_tokens.weight in model.safetensors has shape [104, 32], expected [101, 32]",
        "model.layers.2.input_layernorm.weight in model.safetensors is int32, expected one of float32",
    ):
        assert line in message
    assert str(tmp_path / "x") in message


def test_missing_last_layer_is_an_error(tmp_path):
    """The depth is the config's, never what the file happens to hold."""
    drop = lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name]
    message = refused(checkpoint(tmp_path / "short", LLAMA, drop))
    assert "9 tensors are wrong" in message and "missing model.layers.2.self_attn.q_proj.weight" in message


def test_one_layer_too_many_is_an_error(tmp_path):
    directory = checkpoint(tmp_path / "long", LLAMA)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert "unexpected model.layers.2.self_attn.q_proj.weight" in refused(directory)


def test_missing_expert_is_an_error(tmp_path):
    (case,) = [c for c in ARCHITECTURES if c.config == "MixtralConfig"]
    drop = lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.4.w2.weight")
    message = refused(checkpoint(tmp_path / "x", hf_config(case), drop))
    assert "missing model.layers.1.block_sparse_moe.experts.4.w2.weight" in message


def test_missing_untied_head_is_an_error(tmp_path):
    message = refused(checkpoint(tmp_path / "x", LLAMA, lambda tensors: tensors.pop("lm_head.weight")))
    assert f"missing lm_head.weight, expected [{VOCAB}, 32]" in message


def test_stored_copy_of_a_tied_head_must_be_equal_and_comes_back(tmp_path):
    tied = LLAMA | {"tie_word_embeddings": True}
    copy = lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()})
    directory = checkpoint(tmp_path / "equal", tied, copy)
    jaxlm.load(directory).save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()

    def differ(tensors):
        copy(tensors)
        tensors["lm_head.weight"][50, 3] += 1e-3

    message = refused(checkpoint(tmp_path / "different", tied, differ))
    assert "lm_head.weight differs from model.embed_tokens.weight, to which config.json ties it" in message


def test_buffers_of_old_checkpoints_are_known_and_come_back(tmp_path):
    def edit(tensors):
        for layer in range(3):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    directory = checkpoint(tmp_path / "x", LLAMA, edit)
    jaxlm.load(directory).save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_gpt2_as_published_has_no_prefix_and_stores_its_masks(tmp_path):
    def edit(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.float32))

    plain = jaxlm.load(checkpoint(tmp_path / "plain", GPT2))
    directory = checkpoint(tmp_path / "published", GPT2, edit)
    model = jaxlm.load(directory)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), plain.params, model.params)
    assert all(jax.tree.leaves(same))
    model.save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


# Calls


@pytest.fixture(scope="module")
def model():
    return jaxlm.init(LLAMA, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(np.full((1, 65), 5)), "65 tokens do not fit the model's context of 64"),
        (lambda m: m([[5, VOCAB]]), "token 101 is outside the vocabulary 0..100"),
        (lambda m: m([[5, -1]]), "token -1 is outside the vocabulary"),
        (lambda m: m([5, 6]), r"tokens must be integers \[B, T\].*\(2,\)"),
        (lambda m: m([[0.5]]), "tokens must be integers"),
        (lambda m: m(np.zeros((2, 0), int)), "at least one token"),
        (lambda m: m([[5, 6]], attention_mask=[[1]]), r"attention_mask has shape \(1, 1\).*\(1, 2\)"),
        (lambda m: m([[5]], output="attentions"), "output='attentions' is not supported; supported: logits"),
        (lambda m: m.generate([[]], max_new_tokens=3), "a prompt is empty"),
        (lambda m: m.generate([], max_new_tokens=3), "no prompts"),
        (lambda m: m.generate([[5]], max_new_tokens=64), "1 prompt tokens and 64 new ones do not fit"),
        (lambda m: m.generate([[5, VOCAB]], max_new_tokens=3), "token 101 is outside the vocabulary"),
        (lambda m: m.generate([[5]], max_new_tokens=3, temperature=float("nan")), "temperature=nan: expected"),
        (lambda m: m.generate([[5]], max_new_tokens=3, top_p=1.5, temperature=1.0), "top_p=1.5: expected"),
        (lambda m: m.generate([[5]], max_new_tokens=0), "max_new_tokens=0: expected a whole number >= 1"),
        (lambda m: m.generate(["text"], max_new_tokens=3), "no tokenizer"),
        (lambda m: dataclasses.replace(m, generation_config={"num_beams": 4}).generate([[5]]), "num_beams=4"),
        (lambda m: m.save("/nowhere/at/all", dtype="int8"), "dtype='int8' is not supported"),
    ],
)
def test_bad_call_is_one_line(model, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(model)
    assert "\n" not in str(caught.value)


def test_sources_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such directory, .gguf or .pth file"):
        jaxlm.load(tmp_path / "absent")
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=re.escape("has no config.json; it holds x.txt")):
        jaxlm.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json"):
        jaxlm.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises((ValueError, FileNotFoundError), match="safetensors"):
        jaxlm.load(tmp_path)
