"""A model with adapters: generated from, saved, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.models import decoder
from jaxlm.train.adapters import Lora, Prefix, Prompt
from tests.adapters import LLAMA, SOME, TOKENS, close, drawn, model, run


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "lora"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("llama", "prefix"), ("mistral", "prefix"), ("mistral", "prompt"), ("gpt2", "prompt")]
        ),
    ],
)
def test_generation_is_greedy_with_adapters(name, kind):
    """Cache, ring and merged weights against whole passes; and logprobs are of the same model."""
    config = {"prefix": Prefix(tokens=20), "prompt": Prompt(tokens=20), "lora": Lora(rank=3)}[kind]
    base, tree = model(name), drawn(name, config)
    adapted = base.with_adapters(tree, config)
    got = adapted.generate(TOKENS, max_new_tokens=6, temperature=0.0)
    tokens = np.concatenate([TOKENS, np.zeros((2, 6), int)], 1)
    for i in range(8, 14):  # what comes later changes nothing
        tokens[:, i] = np.asarray(run(name, tree, tokens))[:, i - 1].argmax(-1)
    assert np.array_equal(got, tokens[:, 8:])
    logits = jax.nn.log_softmax(run(name, tree, tokens)[:, :7])
    want = np.take_along_axis(np.asarray(logits), TOKENS[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(adapted.logprobs(TOKENS), want, atol=2e-5)
    close(adapted(TOKENS), run(name, tree, tokens)[:, :8])
    if name == "gpt2":
        return
    session = adapted.session(temperature=0.0, max_new_tokens=6)
    ids = TOKENS[0].tolist()
    turns = [session.answer(ids, 3).tokens.tolist()]
    turns += session.answer(ids + turns[0], 3).tokens.tolist()
    assert turns[0] + turns[1:] == tokens[0, 8:].tolist() and session.reused > 0


@pytest.mark.parametrize("kind", ["stacked", "unrolled"])
def test_a_model_with_merged_adapters_is_saved(kind, tmp_path):
    base = jaxlm.init(LLAMA, key=jax.random.key(0), layers=kind)
    adapted = base.with_adapters(drawn("llama", SOME), SOME)
    want = run("llama", drawn("llama", SOME))
    close(adapted(TOKENS), want)
    with pytest.raises(ValueError, match=r"merge_adapters\(\).save\(\) or save_adapters\(\)"):
        adapted.save(tmp_path / "out")
    adapted.merge_adapters().save(tmp_path / "out")
    close(jaxlm.load(tmp_path / "out")(TOKENS), want)
    assert adapted.merge_adapters().adapters is None
    close(adapted.with_adapters(None)(TOKENS), run("llama"))


def test_new_parameters_are_merged_anew():
    adapted = jaxlm.init(LLAMA, key=jax.random.key(0)).with_adapters(drawn("llama", SOME), SOME)
    before = adapted.generate(TOKENS, max_new_tokens=4, temperature=0.0)
    other = jaxlm.init(LLAMA, key=jax.random.key(9)).params
    adapted.params = other
    after = adapted.generate(TOKENS, max_new_tokens=4, temperature=0.0)
    want = jaxlm.init(LLAMA).with_params(other).with_adapters(drawn("llama", SOME), SOME)
    assert not np.array_equal(before, after)
    assert np.array_equal(after, want.generate(TOKENS, max_new_tokens=4, temperature=0.0))


def pair(**changes):
    made = {"a": jnp.zeros((2, 16, 2)), "b": jnp.zeros((2, 2, 4, 4)), "scale": jnp.ones(2)}
    return made | changes


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers": {"attn": {"qq": pair()}}}, "adapters for layers/attn/qq, where .* no weight, did you mean attn/q"),
        ({"layers": {"moe": {"attn": {"q": pair()}}}}, "adapters for layers/moe, expected some of"),
        ({"layer": {}}, "an adapters tree has layers and prompt, and this one 'layer'"),
        (
            {"layers": {"attn": {"q": pair(b=jnp.zeros((2, 2, 5, 4)))}}},
            r"fit a weight \(16, 5, 4\), it is \(2, 16, 4, 4\)",
        ),
        (
            {
                "prompt": {"w": jnp.zeros((2, 16))},
                "layers": {"attn": {"prefix": {"k": jnp.zeros((2, 2, 2, 4)), "v": 0}}},
            },
            "one prompt, or a prefix of one length",
        ),
    ],
    ids=["path", "group", "top", "shape", "both"],
)
def test_trees_that_do_not_fit(tree, message):
    with pytest.raises(ValueError, match=message):
        model().with_adapters(tree)


def test_refusals():
    m = model()
    adapted = m.with_adapters(drawn("llama", SOME))
    with pytest.raises(ValueError, match="has adapters already"):
        adapted.with_adapters(drawn("llama", SOME))
    with pytest.raises(ValueError, match="adapters without a config cannot be written"):
        adapted.save_adapters("nowhere")
    with pytest.raises(ValueError, match="has no adapters"):
        m.merge_adapters()
    with pytest.raises(ValueError, match="only low-rank pairs can be merged"):
        m.with_adapters(drawn("llama", Prefix(tokens=3))).merge_adapters()
    with pytest.raises(ValueError, match="46 tokens beside 3 virtual ones do not fit the model's context of 48"):
        m.with_adapters(drawn("llama", Prompt(tokens=3)))(np.ones((1, 46), int))
    with pytest.raises(ValueError, match="do not fit the model's context of 45"):
        m.with_adapters(drawn("llama", Prompt(tokens=3))).generate(TOKENS, max_new_tokens=38)
    with pytest.raises(ValueError, match="with a cache, virtual tokens are in it"):
        cache = decoder.init_cache(m.config, m.params, 2, 12)
        decoder.forward(
            m.config,
            m.params,
            TOKENS,
            positions=jnp.arange(8)[None],
            cache=cache,
            adapters=drawn("llama", Prefix(tokens=3)),
        )
