"""The adapter for lm-evaluation-harness against the definitions, without lm_eval."""

import types

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import harness
from jaxlm.harness import Harness
from tests.cli.conftest import byte_tokenizer
from tests.test_scoring import CONFIG, defined

LENGTH = 16


@pytest.fixture(scope="module")
def model():
    made = jaxlm.init(CONFIG, key=jax.random.key(3))
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "!"
    made.__dict__["tokenizer"] = tokenizer
    return made


@pytest.fixture
def adapter(model):
    return Harness(model, batch_size=3, max_length=LENGTH)


def ids(model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def requests(*args):
    return [types.SimpleNamespace(args=a) for a in args]


PAIRS = [
    ("abc", " def"),
    ("abcdefgh", "x"),
    ("", "lonely"),
    ("spaces  ", "go"),
    ("   ", "go"),
    ("a long context that does not fit", " at all"),
    ("a", "exactly sixteen!"),
    ("ab", "c"),
]
JOINT = [
    "abc def",
    "abcdefghx",
    "!lonely",
    "spaces  go",
    "!   go",
    "that does not fit at all"[-17:],
    "aexactly sixteen!",
    "abc",
]
TAILS = [4, 1, 6, 4, 5, 7, 16, 1]


def test_loglikelihood_is_the_sum_over_the_continuation(model, adapter):
    got = adapter.loglikelihood(requests(*PAIRS))
    for (logprob, greedy), text, n in zip(got, JOINT, TAILS, strict=True):
        whole = ids(model, text)
        assert logprob == pytest.approx(defined(model, whole)[-n:].sum(), abs=1e-4), text
        likeliest = np.asarray(model(np.array(whole)[None]))[0].argmax(-1)[:-1]
        assert greedy == (likeliest[-n:].tolist() == whole[-n:])


def test_what_greedy_decoding_gives_is_greedy(model, adapter):
    """Over ids, since the bytes that a random model draws are no text."""
    start = ids(model, "abc")
    drawn = model.generate([start], max_new_tokens=5, temperature=0)[0].tolist()
    other = [*drawn[:-1], (drawn[-1] + 1) % 256]
    found = adapter._score([(start, drawn), (start, other), (start, drawn[:2])])
    assert [greedy for _, greedy in found] == [True, False, True]


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 32, 45])
def test_rolling_predicts_each_token_once_with_as_much_context_as_fits(model, adapter, n):
    text = "The quick brown fox jumps over the lazy dogs."[:n]
    whole = ids(model, "!" + text)
    want = 0.0
    for begin in range(1, len(whole), LENGTH):
        end = min(begin + LENGTH, len(whole))
        want += defined(model, whole[max(0, end - LENGTH - 1) : end])[begin - end :].sum()
    assert adapter.loglikelihood_rolling(requests((text,), ("other",)))[0] == pytest.approx(want, abs=1e-4)


@pytest.mark.slow
def test_generate_until(model, adapter):
    prompts = ["abc", "defg", "a context that is longer than what fits"]
    options = {"max_gen_toks": 8, "until": []}
    free = adapter.generate_until(requests(*((p, options) for p in prompts)))
    for prompt, text in zip(prompts, free, strict=True):
        made = model.generate([ids(model, prompt)[-8:]], max_new_tokens=8, temperature=0)[0]
        assert text == model.tokenizer.decode(made.tolist(), skip_special_tokens=True)
    stop = free[0][2]
    mixed = requests(
        (prompts[0], options | {"until": [stop]}), (prompts[1], options), (prompts[0], options | {"until": stop})
    )
    first = free[0][: free[0].index(stop)]
    assert adapter.generate_until(mixed) == [first, free[1], first]
    drawn = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50, "until": ["never"]}
    assert adapter.generate_until(requests((prompts[0], drawn))) != free[:1]


def test_chat_template(adapter):
    chat = [{"role": "user", "content": "a"}]
    assert adapter.apply_chat_template(chat) == "<user>a<assistant>"
    chat.append({"role": "assistant", "content": "b"})
    assert adapter.apply_chat_template(chat, add_generation_prompt=False) == "<user>a<assistant>b"
    assert adapter.chat_template(True) and adapter.chat_template(False) is None
    assert adapter.tokenizer_name == "model"


def test_frequencies_that_depend_on_the_length_are_not_batched(model):
    scaled = jaxlm.init(
        CONFIG | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
        key=jax.random.key(3),
    )
    scaled.__dict__["tokenizer"] = model.tokenizer
    adapter = Harness(scaled, max_length=40)
    assert adapter.batch_size == 1
    text = "a text that is longer than the context"
    ((got, _),) = adapter.loglikelihood(requests((text[:20], text[20:])))
    assert got == pytest.approx(defined(scaled, ids(model, text))[19:].sum(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected a whole number >= 1"),
        ({"max_length": 25}, "max_length=25: expected 2 to 24, the model's context"),
        ({"max_length": 1}, "max_length=1: expected 2 to 24"),
    ],
)
def test_bad_options(model, options, message):
    with pytest.raises(ValueError, match=message):
        Harness(model, **options)


def test_bad_requests(model, adapter):
    with pytest.raises(ValueError, match="request 1 has 3 tokens of context and 0 after it"):
        adapter.loglikelihood(requests(("abc", "d"), ("abc", "")))
    with pytest.raises(ValueError, match="request 0 scores 17 tokens: expected at most 16"):
        adapter.loglikelihood(requests(("abc", "x" * 17)))
    with pytest.raises(ValueError, match="max_gen_toks=16: expected less than max_length=16"):
        adapter.generate_until(requests(("abc", {"max_gen_toks": 16})))
    with pytest.raises(ValueError, match="generation options num_beams: expected some of do_sample"):
        adapter.generate_until(requests(("abc", {"num_beams": 2})))
    silent = jaxlm.init(CONFIG)
    silent.__dict__["tokenizer"] = byte_tokenizer()
    with pytest.raises(ValueError, match="neither a BOS nor an EOS"):
        Harness(silent).loglikelihood(requests(("", "a")))


def test_without_lm_eval(model, monkeypatch):
    monkeypatch.setattr(harness, "installed", lambda: False)
    for call in (harness.lm, lambda m: harness.evaluate(m, ["hellaswag"])):
        with pytest.raises(ValueError, match="not installed: pip install lm_eval"):
            call(model)
