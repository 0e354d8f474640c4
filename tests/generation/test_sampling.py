"""Sampling against transformers' own LogitsProcessor classes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.generation.sampling import Sampling, process, sample

V = 60
CASES = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"top_p": 0.0},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.9, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.3},
    {"temperature": 0.6, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.05},
]


def reference(options: dict, logits: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The scores as transformers' generate would process them, in its order."""
    import torch
    from transformers.generation import logits_process as hf

    scores = torch.tensor(logits)
    if options.get("repetition_penalty", 1.0) != 1.0:
        rows = [torch.tensor(np.flatnonzero(row))[None] for row in seen]
        penalty = hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])
        scores = torch.cat([penalty(ids, scores[i : i + 1]) for i, ids in enumerate(rows)])
    warpers = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    return scores.numpy()


@functools.cache
def compiled(sampling: Sampling):
    return jax.jit(lambda logits, seen: process(logits, sampling, seen))


def random_logits(seed: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(8, V)).astype(np.float32) * rng.choice([0.5, 1, 4], size=(8, 1)).astype(np.float32)
    if kind == "ties":  # as bfloat16 logits have them; few distinct values, so that every cut falls among equals
        logits = np.round(logits * 4) / 4
    seen = rng.random((8, V)) < 0.4
    seen[:, 0] = True
    return logits, seen


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()) or "plain")
def test_kept_tokens_and_probabilities_equal_transformers(options, kind):
    for seed in range(12):
        logits, seen = random_logits(seed, kind)
        want = reference(options, logits, seen)
        got = np.asarray(compiled(Sampling(**options))(logits, seen))
        if kind == "ties":  # torch's sort is not stable: how many equal scores stay is defined, which of them is not
            got, want = np.sort(got), np.sort(want)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=f"{options} seed {seed}")
        np.testing.assert_allclose(jax.nn.softmax(got), jax.nn.softmax(want), rtol=1e-5, atol=1e-7)


@pytest.mark.torch
def test_random_settings_keep_the_same_tokens():
    rng = np.random.default_rng(5)
    for seed in range(10):
        options = {
            "temperature": float(rng.uniform(0.2, 2)),
            "top_k": int(rng.integers(1, V + 5)),
            "top_p": float(rng.uniform(0, 1)),
            "min_p": float(rng.uniform(0, 0.3)),
            "repetition_penalty": float(rng.uniform(0.6, 1.8)),
        }
        options = {name: options[name] for name in options if rng.random() < 0.7}
        for case in range(8):
            logits, seen = random_logits(100 + 8 * seed + case, "distinct")
            got = compiled(Sampling(**options))(logits, seen)
            want = reference(options, logits, seen)
            np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want), err_msg=f"{options}")


@pytest.mark.torch
def test_top_p_with_infinite_and_zero_logits():
    logits = np.array([[-np.inf, 0.0, -0.0, 3.0, -np.inf, 2.9]], np.float32)
    for top_p in (1e-9, 0.4, 0.97, 1 - 1e-9):
        got = process(jnp.asarray(logits), Sampling(top_p=top_p))
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(reference({"top_p": top_p}, logits, None)))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 12, "top_p": 0.9}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(options):
    sampling, draws = Sampling(**options), 40_000
    row = np.random.default_rng(3).normal(size=(1, V)).astype(np.float32)
    probs = np.asarray(jax.nn.softmax(process(jnp.asarray(row), sampling)))[0].astype(np.float64)
    keys = jax.random.split(jax.random.key(11), 40)
    draw = jax.jit(jax.vmap(lambda k: sample(jnp.broadcast_to(row, (draws // 40, V)), sampling, k)))
    tokens = np.asarray(draw(keys))
    assert tokens.dtype == np.int32
    counts = np.bincount(tokens.ravel(), minlength=V)
    assert counts[probs == 0].sum() == 0
    kept = probs * draws >= 5  # the usual condition of the test
    statistic = np.sum((counts[kept] - draws * probs[kept]) ** 2 / (draws * probs[kept]))
    freedom = kept.sum() - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom), (statistic, freedom)


def test_a_seed_repeats_and_another_differs():
    logits, _ = random_logits(1, "distinct")
    logits = jnp.tile(logits, (8, 1))
    draw = lambda seed: np.asarray(sample(logits, Sampling(), jax.random.key(seed)))
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()


@pytest.mark.torch
@pytest.mark.parametrize("penalty", [1.0, 3.0, 0.2])
def test_greedy_is_the_largest_logit_after_the_penalty(penalty):
    logits, seen = random_logits(2, "distinct")
    sampling = Sampling(temperature=0, top_k=3, top_p=0.1, repetition_penalty=penalty)
    assert sampling.greedy
    got = sample(jnp.asarray(logits), sampling, None, jnp.asarray(seen))
    np.testing.assert_array_equal(got, reference({"repetition_penalty": penalty}, logits, seen).argmax(-1))
    if penalty != 1:
        assert (np.asarray(got) != logits.argmax(-1)).any()


def test_settings_hash_by_value():
    assert hash(Sampling(temperature=1, top_p=1)) == hash(Sampling()) and Sampling(temperature=1) == Sampling()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (name, value)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        for value in (math.nan, -0.1, "1")
    ]
    + [("temperature", math.inf), ("top_p", 1.1), ("min_p", 1.01), ("repetition_penalty", 0), ("top_p", True)]
    + [("repetition_penalty", math.inf), ("top_k", -1), ("top_k", 2.0), ("top_k", math.nan), ("temperature", None)],
)
def test_bad_option_is_named_with_its_value(option, value):
    with pytest.raises(ValueError, match=rf"{option}={value!r}: expected a "):
        Sampling(**{option: value})


def test_sample_refuses_what_it_cannot_do():
    logits = jnp.zeros((2, V))
    with pytest.raises(ValueError, match=r"seen has shape None: repetition_penalty needs \(2, 60\)"):
        sample(logits, Sampling(repetition_penalty=1.2), jax.random.key(0))
    with pytest.raises(ValueError, match=r"seen has shape \(2, 3\)"):
        sample(logits, Sampling(repetition_penalty=1.2), jax.random.key(0), jnp.zeros((2, 3), bool))
    with pytest.raises(ValueError, match="needs a random key"):
        sample(logits, Sampling(), None)
    with pytest.raises(ValueError, match="expected \\[batch, vocabulary\\]"):
        sample(logits[0], Sampling(), jax.random.key(0))
