"""Layers of several kinds through `stack.py`, and the toy hybrid of the core's gate from a file on disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.models import registry, stack
from jaxlm.models.stack import Layer
from tests.models import toy_hybrid


def kinds(text):
    return tuple(Layer(c, c, c) for c in text)


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ("aaaa", [("a", 4)]),
        ("a", [("a", 1)]),
        ("aaaaabaaaaabaa", [("aaaaab", 2), ("a", 2)]),
        ("abbbbb", [("a", 1), ("b", 5)]),
        ("ababa", [("ab", 2), ("a", 1)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
        ("aaab" * 4, [("aaab", 4)]),
    ],
)
def test_runs(layers, want):
    got = [("".join(layer.kind for layer in period), repeats) for period, repeats in stack.runs(kinds(layers))]
    assert got == want


@pytest.mark.parametrize("text", ["aaaa", "aabaabaa", "abcab", "a"])
@pytest.mark.parametrize("remat", [None, jax.checkpoint])
def test_run_is_the_loop_over_layers(text, remat):
    """The stream, the cache and the extras of a run are those of a plain loop over layers, each in its own place."""
    layers, count = kinds(text), len(text)
    params = {g: {"w": jnp.arange(1.0, 1 + text.count(g)) + ord(g)} for g in set(text)}
    cache = {g: jnp.zeros(text.count(g)) for g in set(text)}

    def block(kind, p, x, state, depth):
        x = x * 0.5 + p["w"] + depth * ord(kind)
        return x, state + x, {"stream": x}

    x, got, extras = stack.run(block, layers, params, jnp.float32(0), cache, remat=remat)
    want_x, want, stream = 0.0, {g: np.zeros(text.count(g)) for g in set(text)}, []
    for depth, kind in enumerate(text):
        i = text[:depth].count(kind)
        want_x = want_x * 0.5 + float(params[kind]["w"][i]) + depth * ord(kind)
        want[kind][i] += want_x
        stream.append(want_x)
    assert float(x) == want_x
    assert all(np.array_equal(got[g], want[g]) for g in want)
    assert np.array_equal(stack.collect(extras, "stream"), stream) and len(stream) == count
    with pytest.raises(KeyError, match="no layer returned 'other'"):
        stack.collect(extras, "other")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A toy hybrid of 8 layers, r r a r r a r r, as a checkpoint directory."""
    directory = tmp_path_factory.mktemp("toy")
    mixers = ["recurrence", "recurrence", "attention"] * 2 + ["recurrence"] * 2
    rng, d = np.random.default_rng(0), 6
    tensors = {"embed": rng.normal(size=(11, d))}
    for i, mixer in enumerate(mixers):
        for name, dims in toy_hybrid.SHAPES[mixer].items():
            suffix = "" if name == "decay" else ".weight"
            tensors[f"blocks.{i}.{name}{suffix}"] = rng.normal(size=(d,) * len(dims)) * 0.5
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, directory / "model.safetensors")
    config = {"model_type": "toy_hybrid", "vocab_size": 11, "hidden_size": d, "mixers": mixers}
    (directory / "config.json").write_text(json.dumps(config))
    registry.add(toy_hybrid.family(toy_hybrid))
    return directory


def test_toy_hybrid_loads_and_matches(saved, tmp_path):
    model = jaxlm.load(saved)
    tokens = np.random.default_rng(1).integers(0, 11, (2, 9))
    want = toy_hybrid.reference(load_file(saved / "model.safetensors"), model.config, tokens)
    got = np.asarray(model(tokens))
    assert np.abs(got - want).max() / np.abs(want).max() < 2e-6
    model.save(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_toy_hybrid_decodes_with_both_kinds_of_state(saved):
    model = jaxlm.load(saved)
    tokens = np.random.default_rng(2).integers(0, 11, (2, 5))
    got = model.generate(tokens, max_new_tokens=4, temperature=0.0)
    for _ in range(4):
        nxt = np.asarray(model(tokens))[:, -1].argmax(-1)
        tokens = np.concatenate([tokens, nxt[:, None]], 1)
    assert np.array_equal(got, tokens[:, 5:])
