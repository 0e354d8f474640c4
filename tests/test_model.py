"""The `Model` object: its parameters stay the caller's, whatever runs in between, and odd input is one clear error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from tests.models.test_decoder import TINY

GPT2 = {
    "model_type": "gpt2", "vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 21, "n_inner": None,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
}  # fmt: skip
PROMPT = [[3, 5, 7]]


@pytest.fixture
def model():
    return jaxlm.init(TINY, key=jax.random.key(1))


def test_parameters_outlive_every_call(model, tmp_path):
    """Generating converts the model's own parameters, never those the caller holds; a session survives it too."""
    held = model.params
    before = jax.tree.map(np.array, held)
    session = model.session(max_new_tokens=4, temperature=0)
    first = session.answer(PROMPT[0], 4)
    model.save(tmp_path / "saved")
    model.params = model.params
    second = session.answer([*PROMPT[0], *first.tokens.tolist(), 9], 4)
    assert session.reused == 6
    fresh = model.generate([[*PROMPT[0], *first.tokens.tolist(), 9]], max_new_tokens=4, temperature=0)
    assert second.tokens.tolist() == fresh[0].tolist()
    jax.tree.map(np.testing.assert_array_equal, held, before)
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    assert (np.asarray(jaxlm.load(tmp_path / "saved")(PROMPT)) == np.asarray(model.with_params(held)(PROMPT))).all()


def test_parameters_may_be_traced(model):
    loss = lambda params: model.with_params(params)(PROMPT).var()
    gradient = jax.jit(jax.grad(loss))(model.params)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) > 0


def test_session_limit_is_checked(model):
    with pytest.raises(ValueError, match=r"limit=5: this session draws 1 to 4 tokens a turn"):
        model.session(max_new_tokens=4, temperature=0).answer(PROMPT[0], 5)


def test_valid_counts_with_positions_too(model):
    backbone, positions = model.family.backbone, jnp.arange(4)[None]
    valid = jnp.array([[True, False, True, True]])
    run = lambda tokens: backbone.forward(model.config, model.params, tokens, positions=positions, valid=valid)[0]
    one, other = run(jnp.array([[3, 5, 7, 9]])), run(jnp.array([[3, 6, 7, 9]]))
    np.testing.assert_array_equal(one[:, [0, 2, 3]], other[:, [0, 2, 3]])


def test_a_context_that_is_no_round_number_can_be_filled():
    model = jaxlm.init(GPT2)
    assert model.generate([[1] * 18], max_new_tokens=3, temperature=0).shape == (1, 3)


def test_overwriting_leaves_nothing_of_the_old_model(model, tmp_path):
    old = tmp_path / "out"
    old.mkdir()
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "pytorch_model.bin", "notes.txt"):
        (old / name).write_text("{}")
    model.save(old, overwrite=True)
    assert sorted(p.name for p in old.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is not supported; expected true or false"),
        ({"hidden_size": "16"}, "hidden_size='16' is not supported; expected a whole number above 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not supported; expected a finite number"),
        ({"rope_theta": "10000"}, "rope_theta='10000'"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"head_dim": 3}, "3 of a head is not an even number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor above 0"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
        ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3}, "there are only 2"),
    ],
    ids=lambda x: None if isinstance(x, str) else next(iter(x)),
)
def test_odd_values_in_config_json(change, message):
    with pytest.raises(ValueError, match=message):
        jaxlm.init(TINY | change)


def test_ignoring_a_field_that_is_read_is_refused():
    with pytest.raises(ValueError, match="ignore_fields names vocab_size"):
        jaxlm.init(TINY, ignore_fields=["vocab_size"])
    jaxlm.init(TINY | {"unheard_of": 1}, ignore_fields=["unheard_of"])


def test_a_key_given_twice_is_refused(model, tmp_path):
    model.save(tmp_path / "m")
    config = (tmp_path / "m/config.json").read_text()
    (tmp_path / "m/config.json").write_text(config.rstrip()[:-1] + ', "vocab_size": 31}')
    with pytest.raises(ValueError, match="'vocab_size' 2 times"):
        jaxlm.load(tmp_path / "m")


def test_numbers_that_float16_cannot_hold_are_refused(model, tmp_path):
    big = model.with_params(jax.tree.map(lambda a: a * 1e6, model.params))
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        big.save(tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()
    big.save(tmp_path / "full")
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        jaxlm.load(tmp_path / "full", dtype="float16")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(PROMPT, max_new_tokens=2, seed=1.5), "seed=1.5: expected a whole number"),
        (lambda m: m.generate(PROMPT, max_new_tokens=2, eos=[99]), "eos token 99 is outside the vocabulary"),
        (lambda m: m(PROMPT, rope_len=0), "rope_len=0: expected a whole number >= 1"),
        (lambda m: m(PROMPT, output="embeddings", pooling="max"), "pooling='max' is not supported"),
    ],
)
def test_bad_options(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_an_unknown_attention_is_refused_before_the_weights_are_read(model, tmp_path):
    model.save(tmp_path / "m")
    with pytest.raises(ValueError, match=r"attention='flsh' is not supported; supported: None, .*cudnn, .*reference"):
        jaxlm.load(tmp_path / "m", attention="flsh")


def test_pooled_embeddings(model):
    tokens, mask = np.array([[0, 3, 5, 7], [2, 4, 0, 0]]), np.array([[0, 1, 1, 1], [1, 1, 0, 0]])
    hidden = np.asarray(model(tokens, mask, output="hidden"))
    rows = [hidden[0, 1:], hidden[1, :2]]
    for pooling, pool in {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "first": lambda h: h[0]}.items():
        got = model(tokens, mask, output="embeddings", pooling=pooling)
        np.testing.assert_allclose(got, np.stack([pool(h) for h in rows]), atol=1e-6)


def test_saved_config_names_the_dtype_written(model, tmp_path):
    model.save(tmp_path / "m", dtype="bfloat16")
    assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
