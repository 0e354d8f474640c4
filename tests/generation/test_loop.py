"""The prefill and decode loop, on small models made from scratch."""

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.generation.loop import Plan, generate
from jaxlm.generation.sampling import Sampling

LLAMA = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.5,
}
WINDOWED = LLAMA | {"model_type": "mistral", "sliding_window": 4}
PROMPTS = [np.array(p) for p in ([3, 5, 7, 9, 11, 2, 4], [8, 1], [6, 6, 30, 12])]


@pytest.fixture(scope="module")
def model():
    return jaxlm.init(WINDOWED, key=jax.random.key(3))


@pytest.mark.parametrize("config", [LLAMA, WINDOWED], ids=["full", "window"])
def test_ragged_batch_is_the_greedy_continuation_of_each_prompt(config):
    """One pass without a cache over prompt and answer must want every token of the answer."""
    model = jaxlm.init(config, key=jax.random.key(3))
    got = model.generate(PROMPTS, max_new_tokens=9, temperature=0)
    assert got.dtype == np.int32 and got.shape == (3, 9)
    for row, prompt in zip(got, PROMPTS, strict=True):
        logits = model(np.concatenate([prompt, row])[None])[0]
        assert np.asarray(logits).argmax(-1)[len(prompt) - 1 : -1].tolist() == row.tolist()


def test_rows_end_at_eos_and_are_padded(model):
    free = model.generate(PROMPTS, max_new_tokens=8, temperature=0)
    eos = int(free[0, 2])
    got = model.generate(PROMPTS, max_new_tokens=8, temperature=0, eos=eos)
    for row, whole in zip(got, free, strict=True):
        ends = np.flatnonzero(whole == eos)
        length = ends[0] + 1 if len(ends) else 8
        assert row[:length].tolist() == whole[:length].tolist()
        assert (row[length:] == eos).all()  # there is no pad token: the first EOS stands in
    alone = model.generate(PROMPTS[:1], max_new_tokens=8, temperature=0, eos=eos)
    assert alone.shape[1] == list(free[0]).index(eos) + 1


def test_seed_decides_and_temperature_spreads(model):
    draw = lambda seed, t=1.5: model.generate(PROMPTS, max_new_tokens=8, temperature=t, seed=seed).tolist()
    assert draw(1) == draw(1) and draw(1) != draw(2)
    assert draw(1, 1e-4) == model.generate(PROMPTS, max_new_tokens=8, temperature=0).tolist()


def test_repetition_penalty_counts_the_prompt_and_not_its_padding(model):
    """A huge penalty forbids every token seen so far; token 0, which fills the ragged batch, stays allowed."""
    got = model.generate(PROMPTS, max_new_tokens=12, temperature=0, repetition_penalty=1e9)
    for row, prompt in zip(got, PROMPTS, strict=True):
        alone = model.generate([prompt], max_new_tokens=12, temperature=0, repetition_penalty=1e9)[0]
        assert row.tolist() == alone.tolist()
        # Negative logits times the penalty are never the largest while any other token is left.
        assert len(set(row)) == 12 and not set(row) & set(prompt.tolist())


def test_token_by_token_gives_the_same_tokens(model):
    plan = Plan(
        backbone=model.family.backbone,
        config=model.config,
        runtime=model.runtime,
        sampling=Sampling(temperature=0.0),
        eos=(),
        pad=0,
        new_tokens=7,
        length=14,
    )
    seen = []
    got = generate(plan, model.params, PROMPTS[:1], 0, seen.append)
    assert seen == got[0].tolist() == model.generate(PROMPTS[:1], max_new_tokens=7, temperature=0)[0].tolist()


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "a prompt is empty"),
        ([], {}, "no prompts"),
        (None, {}, "either prompts or chat"),
        ([[1, 41]], {}, r"token 41 is outside the vocabulary 0\.\.40"),
        ([[1, -1]], {}, "token -1 is outside"),
        ([[1.5]], {}, "text or integers"),
        ([[1] * 30], {"max_new_tokens": 11}, "30 prompt tokens and 11 new ones do not fit the model's context of 40"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ([[1]], {"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("text", {}, "it has no tokenizer"),
        ([[1], [2]], {"stream": print}, "stream needs a single prompt, got 2"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(prompts, options, message):
    model = jaxlm.init(LLAMA)
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **({"max_new_tokens": 2} | options))
