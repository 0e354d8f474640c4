"""Log-probabilities and perplexity against their definitions, computed from the model's logits in float64."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import scoring
from tests.cli.conftest import byte_tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.5,
}
IDS = np.random.default_rng(0).integers(257, size=61)


@pytest.fixture(scope="module")
def model():
    made = jaxlm.init(CONFIG, key=jax.random.key(3))
    made.__dict__["tokenizer"] = byte_tokenizer()
    return made


def defined(model, ids) -> np.ndarray:
    """log p of ids[1:], one sequence."""
    logits = np.asarray(model(np.asarray(ids)[None])[0], np.float64)
    logp = logits - logits.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    return logp[:-1][np.arange(len(ids) - 1), ids[1:]]


def test_log_probabilities_and_padding(model):
    rows = [IDS[:12], IDS[20:29]]
    want = [defined(model, row) for row in rows]
    for left in (True, False):
        tokens, valid = np.full((2, 12), 7), np.zeros((2, 12), int)
        for i, row in enumerate(rows):
            place = slice(12 - len(row), None) if left else slice(0, len(row))
            tokens[i, place], valid[i, place] = row, 1
        got = model.logprobs(tokens, valid)
        assert got.shape == (2, 11) and got.dtype == np.float32
        np.testing.assert_allclose(got[0], want[0], atol=2e-5)
        np.testing.assert_allclose(got[1][3:] if left else got[1][:8], want[1], atol=2e-5)
        assert not np.asarray(got[1][:3] if left else got[1][8:]).any()


def test_likeliest_tokens_are_known_as_such(model):
    greedy = model.generate([IDS[:5]], max_new_tokens=6, temperature=0)[0]
    ids = np.concatenate([IDS[:5], greedy])
    ids[8] += 1
    _, likeliest = scoring.score(model, ids[None])
    assert np.asarray(likeliest)[0, 4:].tolist()[:4] == [True, True, True, False]


def test_chunks_of_positions_change_nothing(model, monkeypatch):
    whole = np.asarray(model.logprobs(IDS[None, :24]))
    monkeypatch.setattr(scoring, "CHUNK", 5)
    scoring._score.clear_cache()
    np.testing.assert_allclose(model.logprobs(IDS[None, :24]), whole, atol=1e-5)
    scoring._score.clear_cache()


@pytest.mark.parametrize(("window", "stride"), [(None, None), (24, 23), (16, 5), (10, 9), (2, 1)])
def test_perplexity_scores_each_token_once(model, window, stride):
    """As in transformers' guide: targets that an earlier window has scored are masked."""
    told = []
    got = model.perplexity(IDS, window=window, stride=stride, progress=lambda *done: told.append(done))
    window, stride = window or 24, stride or 12
    nll, scored, last = 0.0, [], 1
    for begin in range(0, len(IDS), stride):
        end = min(begin + window, len(IDS))
        logp = dict(zip(range(begin + 1, end), defined(model, IDS[begin:end]), strict=True))
        nll -= sum(logp[i] for i in range(last, end))
        scored += range(last, end)
        last = end
        if end == len(IDS):
            break
    assert scored == list(range(1, len(IDS))) and got.tokens == len(IDS) - 1
    assert got.nll == pytest.approx(nll / got.tokens, rel=1e-5)
    assert got.value == pytest.approx(np.exp(nll / got.tokens), rel=1e-4)
    assert told[-1] == (60, 60)


def test_text_shorter_than_the_window_and_its_tokenizer(model):
    text = "naïve text"
    got = model.perplexity(text)
    want = defined(model, np.array(model.tokenizer(text)["input_ids"]))
    assert got == dataclasses.replace(got, tokens=10) and got.nll == pytest.approx(-want.mean(), rel=1e-5)


def test_frequencies_that_depend_on_the_length():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    model = jaxlm.init(CONFIG | {"rope_parameters": scaling}, key=jax.random.key(3))
    ids = IDS[:37]  # not a length that batches are padded to
    assert model.perplexity(ids).nll == pytest.approx(-defined(model, ids).mean(), rel=1e-5)
    with pytest.raises(ValueError, match="RoPE depends on the length"):
        scoring.score_rows(model, [IDS[:30], IDS[:32]])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS, {"window": 25}, "window=25: expected 2 to 24, the model's context"),
        (IDS, {"window": 1}, "window=1: expected 2 to 24"),
        (IDS, {"window": True}, "window=True: expected a whole number"),
        (IDS, {"stride": 0}, "stride=0: expected a whole number >= 1"),
        (IDS, {"window": 8, "stride": 8}, "stride=8: expected less than the window of 8"),
        ([3], {}, "the text has one token"),
        ([], {}, "a prompt is empty"),
        ([3, 257], {}, r"token 257 is outside the vocabulary 0\.\.256"),
        (IDS[None], {}, r"text or integers \[T\]"),
    ],
)
def test_bad_input_of_perplexity(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        model.perplexity(ids, **options)


def test_bad_input_of_log_probabilities(model):
    with pytest.raises(ValueError, match=r"\(2, 1\): expected at least two in a row"):
        model.logprobs([[1], [2]])
    with pytest.raises(ValueError, match="26 tokens do not fit the model's context of 24"):
        model.logprobs([[1] * 26])  # 25 are possible: nothing follows the last
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model.logprobs([[1, 2]], [[1, 1, 1]])
    with pytest.raises(ValueError, match="it has no tokenizer"):
        jaxlm.init(CONFIG).perplexity("text")
