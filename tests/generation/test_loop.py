"""The prefill and decode loop, on small models made from scratch."""

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.generation.loop import Plan, bucket, decode, extend, pad_rows, prefill, stream
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


@pytest.mark.slow
def test_seed_decides_and_temperature_spreads(model):
    draw = lambda seed, t=1.5: model.generate(PROMPTS, max_new_tokens=8, temperature=t, seed=seed).tolist()
    assert draw(1) == draw(1) and draw(1) != draw(2)
    assert draw(1, 1e-4) == model.generate(PROMPTS, max_new_tokens=8, temperature=0).tolist()


@pytest.mark.slow
def test_repetition_penalty_counts_the_prompt_and_not_its_padding(model):
    """A huge penalty forbids every token seen so far; token 0, which fills the ragged batch, stays allowed."""
    got = model.generate(PROMPTS, max_new_tokens=12, temperature=0, repetition_penalty=1e9)
    for row, prompt in zip(got, PROMPTS, strict=True):
        alone = model.generate([prompt], max_new_tokens=12, temperature=0, repetition_penalty=1e9)[0]
        assert row.tolist() == alone.tolist()
        # Negative logits times the penalty are never the largest while any other token is left.
        assert len(set(row)) == 12 and not set(row) & set(prompt.tolist())


def greedy_plan(model, **room):
    functions = {"backbone": model.family.backbone, "config": model.config, "runtime": model.runtime}
    return Plan(**functions, sampling=Sampling(temperature=0.0), eos=(), pad=0, **room)


@pytest.mark.slow
def test_token_by_token_gives_the_same_tokens(model):
    plan = greedy_plan(model, capacity=7, length=14)
    want = model.generate(PROMPTS[:1], max_new_tokens=7, temperature=0)[0].tolist()
    state = prefill(plan, model.params, *pad_rows(PROMPTS[:1], 7, 0), jax.random.key(0))
    seen = []
    stream(plan, model.params, state, 7, lambda token: seen.append(token) or True)
    assert seen == want
    state = prefill(plan, model.params, *pad_rows(PROMPTS[:1], 7, 0), jax.random.key(0))
    seen.clear()
    stream(plan, model.params, state, 7, lambda token: seen.append(token) or len(seen) < 3)
    assert seen == want[:3]


@pytest.mark.parametrize("layers", ["stacked", "unrolled"])
def test_layers_run_either_way(layers):
    model = jaxlm.init(WINDOWED, key=jax.random.key(3), layers=layers)
    before = jax.tree.map(np.array, model.params)
    got = model.generate(PROMPTS, max_new_tokens=5, temperature=0)
    other = jaxlm.init(WINDOWED, key=jax.random.key(3), layers="auto").generate(
        PROMPTS, max_new_tokens=5, temperature=0
    )
    assert got.tolist() == other.tolist()
    jax.tree.map(np.testing.assert_array_equal, before, model.params)


def test_extend_continues_a_cache(model):
    """A prompt in two parts, with ragged rows, gives what the whole prompt gives."""
    plan = greedy_plan(model, capacity=4, length=20, logprobs=True)
    whole = prefill(plan, model.params, *pad_rows(PROMPTS, 8, 0), jax.random.key(0))
    parts = prefill(plan, model.params, *pad_rows([p[:1] for p in PROMPTS], 4, 0), jax.random.key(0))
    parts = extend(plan, model.params, parts, *pad_rows([p[1:] for p in PROMPTS], 6, 0))
    whole, parts = (decode(plan, model.params, state, 4)[0] for state in (whole, parts))
    assert np.asarray(whole["out"]).tolist() == np.asarray(parts["out"]).tolist()
    np.testing.assert_allclose(whole["logprobs"], parts["logprobs"], atol=1e-5)


@pytest.mark.slow
def test_samples_of_one_prompt(model):
    got = model.generate(PROMPTS, max_new_tokens=6, temperature=1.0, samples=3, seed=5)
    assert got.shape == (3, 3, 6)
    assert len({tuple(row) for row in got[0].tolist()}) > 1
    greedy = model.generate(PROMPTS, max_new_tokens=6, temperature=0, samples=2)
    alone = model.generate(PROMPTS, max_new_tokens=6, temperature=0)
    assert greedy[:, 0].tolist() == greedy[:, 1].tolist() == alone.tolist()


@pytest.mark.slow
def test_log_probabilities_are_those_of_the_whole_sequence(model):
    made = model.generate(PROMPTS, max_new_tokens=6, temperature=0.7, seed=2, details=True)
    for one, prompt in zip(made, PROMPTS, strict=True):
        logits = np.asarray(model(np.concatenate([prompt, one.tokens])[None]), np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = logprobs[len(prompt) - 1 : -1][np.arange(6), one.tokens]
        np.testing.assert_allclose(one.logprobs, want, atol=2e-5)
        assert one.finish == "length" and one.text is None and one.timing.prompt_tokens == 13


def test_lengths_are_rounded_up_so_that_few_compile(model):
    assert [bucket(n) for n in (1, 16, 17, 20, 21, 33, 64, 65, 100, 1000)] == [
        16,
        16,
        20,
        20,
        24,
        40,
        64,
        80,
        112,
        1024,
    ]
    prefill.clear_cache()
    decode.clear_cache()
    for prompt, new in ((3, 2), (5, 7), (16, 16)):
        model.generate([np.arange(1, prompt + 1)], max_new_tokens=new, temperature=0)
    assert prefill._cache_size() == decode._cache_size() == 1


def test_session_reads_only_what_is_new(model):
    session = model.session(max_new_tokens=4, temperature=0)
    first = [3, 5, 7]
    one = session.answer(first, 4)
    assert session.reused == 0
    second = [*first, *one.tokens.tolist(), 9, 9]
    two = session.answer(second, 4)
    assert session.reused == len(first) + 3 and two.timing.prompt_tokens == 3
    assert two.tokens.tolist() == model.generate([second], max_new_tokens=4, temperature=0)[0].tolist()
    other = session.answer([8, 8, 8, 8], 4)
    assert session.reused == 0
    assert other.tokens.tolist() == model.generate([[8, 8, 8, 8]], max_new_tokens=4, temperature=0)[0].tolist()
    with pytest.raises(ValueError, match="38 tokens; 4 new ones do not fit"):
        session.answer([1] * 38, 4)


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
        ([[1], [2]], {"stream": print}, "stream needs a single prompt and sample, got 2"),
        ([[1]], {"samples": 0}, "samples=0: expected a whole number >= 1"),
        ([[1]], {"stop": ["a", ""]}, "expected strings that are not empty"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input(prompts, options, message):
    model = jaxlm.init(LLAMA)
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **({"max_new_tokens": 2} | options))
