"""Vocabularies that grow and shrink: the old tokens' logits stay, and files say what the parameters are."""

import json

import jax
import numpy as np
import pytest

import jaxlm
from tests.cli.conftest import CONFIG, byte_tokenizer

TOKENS = np.random.default_rng(1).integers(200, size=(2, 12))


def make(tie: bool, **more) -> jaxlm.Model:
    return jaxlm.init(CONFIG | {"tie_word_embeddings": tie, "num_hidden_layers": 2} | more, key=jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_growing_keeps_old_logits_and_round_trips(tie, tmp_path):
    model = make(tie)
    before, tables = (
        np.asarray(model(TOKENS)),
        {k: np.asarray(model.params[k]["w"]) for k in ("embed", "head")[: 2 - tie]},
    )
    model.resize_embeddings(300, multiple_of=64)
    assert model.config.vocab_size == model.hf_config["vocab_size"] == 320
    after = np.asarray(model(TOKENS))
    assert np.abs(after[..., :288] - before).max() <= 2e-6 * np.abs(before).max()
    for name, old in tables.items():
        new = np.asarray(model.params[name]["w"])
        np.testing.assert_array_equal(new[:288], old)
        np.testing.assert_allclose(new[288:], np.broadcast_to(old.mean(0), (32, 32)), atol=1e-7)
    assert model.generate([[299, 5]], max_new_tokens=3, temperature=0).shape == (1, 3)

    model.save(tmp_path / "grown")
    assert json.loads((tmp_path / "grown/config.json").read_text())["vocab_size"] == 320
    again = jaxlm.load(tmp_path / "grown")
    np.testing.assert_array_equal(again(TOKENS), after)
    again.resize_embeddings(288)  # a loaded model, whose manifest knows the tables' old size
    again.save(tmp_path / "back")
    np.testing.assert_allclose(jaxlm.load(tmp_path / "back")(TOKENS), before, atol=2e-6 * np.abs(before).max())


def test_new_rows_drawn_around_the_mean():
    model = make(False)
    old = np.asarray(model.params["embed"]["w"])
    model.resize_embeddings(1288, key=jax.random.key(0))
    new = np.asarray(model.params["embed"]["w"])[288:] - old.mean(0)
    np.testing.assert_allclose(new.std(0), old.std(0) * 1e-9**0.5, rtol=0.15)
    assert not np.array_equal(new, np.asarray(model.params["head"]["w"])[288:] - new)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_stays(dtype):
    model = jaxlm.init(CONFIG, dtype=dtype)
    model.resize_embeddings(289)
    assert {a.dtype.name for a in jax.tree.leaves(model.params)} == {dtype}


def test_cutting_off_tokens_in_use_needs_force(tmp_path):
    model = make(False)
    model.save(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = jaxlm.load(tmp_path)
    model.resize_embeddings(256)  # the tokenizer has 256
    with pytest.raises(ValueError, match=r"255 tokens would cut off some of the tokenizer's 256.*force=True"):
        model.resize_embeddings(255)
    assert model.config.vocab_size == 256
    model.resize_embeddings(255, force=True)
    assert model(TOKENS).shape[-1] == 255


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"eos_token_id": [3, 287]}, "would cut off eos_token_id 287"),
        ({"pad_token_id": 280}, "would cut off pad_token_id 280"),
    ],
)
def test_cutting_off_special_tokens_needs_force(more, message):
    with pytest.raises(ValueError, match=message):
        make(True, **more).resize_embeddings(256)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "n=0: expected a whole number >= 1"),
        (2.5, {}, "n=2.5: expected a whole number"),
        (300, {"multiple_of": 0}, "multiple_of=0: expected a whole number >= 1"),
    ],
)
def test_bad_input(n, options, message):
    with pytest.raises(ValueError, match=message):
        make(True).resize_embeddings(n, **options)
