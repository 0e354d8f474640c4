"""generation_config.json read strictly, and the caller's options over it."""

import math

import pytest

from jaxlm.generation.config import settings
from jaxlm.generation.sampling import Sampling


def test_a_published_file():
    """SmolLM2's and Gemma 3's generation_config.json, and Llama 3's three ends."""
    smol = settings({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2})
    assert (
        smol.sampling == Sampling(temperature=0) and smol.eos == (2,) and smol.pad == 2 and smol.new_tokens(100) == 20
    )
    assert smol.inert == ("_from_model_config", "bos_token_id")
    gemma = {"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106], "top_k": 64, "top_p": 0.95}
    assert settings(gemma).sampling == Sampling(top_k=64, top_p=0.95)
    assert settings(gemma).eos == (1, 106) and settings(gemma).pad == 1
    llama = settings(
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": [8, 1, 9]}
    )
    assert llama.sampling == Sampling(temperature=0.6, top_p=0.9, top_k=50)  # transformers' default top_k
    assert llama.new_tokens(96) == 4000
    with pytest.raises(ValueError, match=r"max_length=4096.*5000 tokens"):
        llama.new_tokens(5000)


def test_options_win_over_the_file():
    stored = {"do_sample": False, "top_p": 0.9, "eos_token_id": 2, "max_new_tokens": 9, "repetition_penalty": 1.1}
    assert settings(stored).sampling == Sampling(temperature=0, repetition_penalty=1.1)
    options = {
        "temperature": 0.5,
        "top_k": 0,
        "eos_token_id": [4, 5],
        "max_new_tokens": 3,
        "pad_token_id": 7,
        "top_p": None,
    }
    got = settings(stored, options)
    assert got.sampling == Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.1)
    assert (got.eos, got.pad, got.new_tokens(50)) == ((4, 5), 7, 3)
    assert settings({"do_sample": True}, {"temperature": 0.0}).sampling.greedy
    assert settings({"do_sample": True}, {"temperature": 0, "top_p": 0.5}).sampling.greedy
    assert settings(stored, {"eos_token_id": []}).eos == ()
    with pytest.raises(ValueError, match=r"top_p=0.5: no effect on greedy decoding; expected a temperature > 0"):
        settings({}, {"top_p": 0.5})


@pytest.mark.parametrize(
    ("name", "value", "harmless"),
    [
        ("num_beams", 4, 1),
        ("no_repeat_ngram_size", 3, 0),
        ("suppress_tokens", [1, 2], []),
        ("typical_p", 0.9, 1.0),
        ("stop_strings", ["\n"], []),
        ("forced_eos_token_id", 2, []),
        ("min_new_tokens", 5, 0),
        ("guidance_scale", 1.5, 1),
    ],
)
def test_unsupported_field_is_refused_by_name(name, value, harmless):
    stored = {"do_sample": True, name: value}
    with pytest.raises(ValueError, match=f"not supported: {name}="):
        settings(stored)
    assert name in settings({"do_sample": True, name: harmless}).inert
    assert name in settings(stored, {name: harmless}).inert
    assert name not in settings(stored, ignore_fields=[name]).inert


def test_all_unsupported_fields_are_in_one_message():
    with pytest.raises(ValueError, match=r"num_beams=2 \(expected 1\), chat_format='x' \(unknown\), sequence_bias="):
        settings({"num_beams": 2, "chat_format": "x", "typical_p": 0.5, "sequence_bias": {"1": 2.0}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", -1),
        ("eos_token_id", [1, "2"]),
        ("pad_token_id", [1, 2]),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_length", math.nan),
        ("do_sample", "yes"),
        ("temperature", math.nan),
        ("top_p", 2),
    ],
)
def test_bad_value_in_the_file_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*expected"):
        settings({field: value})
