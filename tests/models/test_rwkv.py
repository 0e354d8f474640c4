"""Every version of RWKV against the `rwkv` package: whole, in chunks, a token at a time, padded, packed; its names,
gradients, float16, generation and training."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlm
from jaxlm.models import rwkv, rwkv_layers
from tests.models.rwkv_reference import VERSIONS, L, config, reference, weights

TOLERANCE = 1e-5  # of the largest; the package computes in float32 as well, in another order
KINDS = ("4", "5.2", "6", "7")  # versions whose recurrences differ
CHUNK = 20
every_version = pytest.mark.parametrize("version", VERSIONS)
every_kind = pytest.mark.parametrize("version", KINDS)


@functools.cache
def loaded(version: str) -> jaxlm.Model:
    return jaxlm.load(reference(version).directory)


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def empty(model: jaxlm.Model, rows: int):
    return rwkv.init_cache(model.config, model.params, rows)["state"]


@functools.partial(jax.jit, static_argnums=0)
def run(config, params, tokens, state=None, valid=None, segments=None):
    """Logits, and the state where one is given."""
    cache = None if state is None else {"state": state}
    logits, cache, _ = rwkv.forward(config, params, tokens, cache=cache, valid=valid, segments=segments)
    return logits, None if cache is None else cache["state"]


def as_package(version: str, state) -> list[np.ndarray]:
    """The state of a single row as the package keeps it: a flat list, layer by layer."""
    out: list[np.ndarray] = []
    for layer in range(L):
        shift, wkv, ffn_shift = (np.asarray(state[name][layer, 0]) for name in ("shift", "wkv", "ffn_shift"))
        out += [shift, *(wkv if version == "4" else [wkv.swapaxes(1, 2) if version == "7" else wkv]), ffn_shift]
    return out


@every_version
def test_logits_and_states_equal_the_package(version):
    model, want = loaded(version), reference(version)
    logits, state = run(model.config, model.params, want.tokens[None], empty(model, 1))
    assert error(logits[0], want.logits) <= TOLERANCE
    for got, expected in zip(as_package(version, state), want.state, strict=True):
        assert error(got, expected) <= TOLERANCE


@every_kind
def test_chunks_and_single_tokens_wherever_padding_lies(version):
    """Three rows at once: no padding; padding before, after and in between; a chunk of nothing but padding."""
    model, want = loaded(version), reference(version)
    tokens = np.full((3, 3 * CHUNK), 7, np.int32)
    valid = np.ones(tokens.shape, bool)
    valid[1, [0, 1, 2, 25, 26, 39, 59]] = False  # some where a chunk begins, some where it ends
    valid[2, CHUNK : 2 * CHUNK] = False
    for row, real in zip(tokens, valid, strict=True):
        row[real] = want.tokens[: real.sum()]
    state, found = empty(model, 3), []
    for start in range(0, 3 * CHUNK, CHUNK):
        part, before = slice(start, start + CHUNK), state
        logits, state = run(model.config, model.params, tokens[:, part], state, valid[:, part])
        found.append(np.asarray(logits))
        if start == CHUNK:
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 2], b[:, 2]), before, state)
    logits = np.concatenate(found, 1)
    for row, real in enumerate(valid):
        assert error(logits[row, real], want.logits[: real.sum()]) <= TOLERANCE, row

    at = valid.sum(1)
    for step in range(4):  # row 1 pauses once
        real = np.array([True, step != 2, True])
        logits, state = run(model.config, model.params, want.tokens[at][:, None], state, real[:, None])
        assert error(logits[real, 0], want.logits[at[real]]) <= TOLERANCE, step
        at = at + real


@every_kind
def test_packed_sequences_do_not_see_each_other(version):
    model, want = loaded(version), reference(version)
    lengths = (13, 1, 21)
    segments = np.repeat([3, 1, 2, 0], (*lengths, 5))[None].astype(np.int32)
    tokens = np.full(segments.shape, 7, np.int32)
    tokens[0, :35] = np.concatenate([want.tokens[:n] for n in lengths])
    logits, _ = run(model.config, model.params, tokens, None, segments > 0, segments)
    expected = np.concatenate([want.logits[:n] for n in lengths])
    assert error(logits[0, :35], expected) <= TOLERANCE


@every_kind
def test_gradients_are_those_of_the_recurrence_token_by_token(version, monkeypatch):
    """With padding in the batch, none of which may reach a gradient."""
    model, want = loaded(version), reference(version)
    tokens = np.stack([want.tokens[:40], np.r_[[0] * 6, want.tokens[50:84]]])
    valid = jnp.stack([jnp.ones(40, bool), jnp.arange(40) >= 6])

    def loss(params, tokens):
        logits, _ = run.__wrapped__(model.config, params, tokens, None, valid)
        p = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        return -(p * valid).sum() / valid.sum()

    got = jax.jit(jax.grad(loss))(model.params, tokens)
    other = jax.jit(jax.grad(loss))(model.params, np.where(valid, tokens, 9)) if version == "7" else got
    serial = functools.partial(rwkv_layers.recurrence, impl="serial")
    monkeypatch.setattr(rwkv_layers, "recurrence", serial)
    expected = jax.jit(jax.grad(lambda *args: loss(*args)))(model.params, tokens)
    for (path, a), b, c in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), jax.tree.leaves(other), strict=True
    ):
        assert np.isfinite(a).all() and np.abs(a).max() > 0, path
        assert error(a, b) <= 1e-4, path
        assert error(a, c) <= 1e-5, path


def renamed(version: str, spelling: str) -> tuple[dict, dict[str, np.ndarray]]:
    """config.json and the tensors of a reference by the names of another project, as its converters have it."""
    tensors = {
        name: array for name, array in weights(version).items() if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)
    }
    hf = {key: value for key, value in config(version).items() if key != "rwkv_names"}
    to = {"hf": _to_transformers, "candle": _to_candle, "fla": _to_fla, "fla_joined": _to_fla}[spelling]
    out = dict(to(name, array) for name, array in tensors.items())
    if spelling == "fla_joined":
        for i in range(L):
            parts = [out.pop(f"model.layers.{i}.attn.x_{name}").reshape(-1) for name in "rwkvag"]
            out[f"model.layers.{i}.attn.x_x"] = np.stack(parts)
    return hf, out


def _to_transformers(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """scripts/convert_rwkv{,5,6}_checkpoint_to_hf.py of BBuf/RWKV-World-HF-Tokenizer and transformers 4."""
    name = name.replace("emb.", "embeddings.").replace("blocks.0.ln0", "blocks.0.pre_ln")
    name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
    for letter, word in (("k", "key"), ("v", "value"), ("r", "receptance"), ("g", "gate")):
        name = re.sub(f"time_mix_{letter}$", f"time_mix_{word}", name)
    return (name if name == "head.weight" else f"rwkv.{name}"), array


def _to_candle(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """candle-transformers' rwkv_v6.rs."""
    return _to_transformers(name.replace("time_maa", "time_mix"), array)


def _to_fla(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """utils/convert_from_rwkv7.py of fla-org/flash-linear-attention."""
    whole = {"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}
    if name in whole:
        return whole[name], array
    name = name.replace("ln_out", "model.norm").replace("blocks.", "model.layers.").replace(".att.", ".attn.")
    for old, new in (
        ("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"), ("attn.ln_x", "attn.g_norm"),
        ("attn.receptance", "attn.r_proj"), ("attn.key", "attn.k_proj"), ("attn.value", "attn.v_proj"),
        ("attn.output", "attn.o_proj"),
    ):  # fmt: skip
        name = name.replace(old, new)
    if found := re.fullmatch(r"(.*\.attn\.)([wavg])([012])", name):
        part = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}[found[3]]
        return f"{found[1]}{found[2]}_lora.lora.{part}", array.reshape(-1) if found[3] == "0" else array.T.copy()
    return name, array if "attn.x_" in name or array.ndim < 3 else array.reshape(-1)


SPELLINGS = [("4", "hf"), ("5.0", "hf"), ("5.2", "hf"), ("6", "hf"), ("6", "candle"), ("7", "fla"), ("7", "fla_joined")]


@pytest.mark.parametrize(("version", "spelling"), SPELLINGS)
def test_every_spelling_is_read_and_written_bit_for_bit(version, spelling, tmp_path):
    hf, tensors = renamed(version, spelling)
    write(tmp_path / "in", hf, tensors)
    model = jaxlm.load(tmp_path / "in")
    for got, want in zip(jax.tree.leaves(model.params), jax.tree.leaves(loaded(version).params), strict=True):
        np.testing.assert_array_equal(got, want)
    model.save(tmp_path / "out")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


@every_version
def test_the_names_of_pth_files_are_written_bit_for_bit(version, tmp_path):
    """In bfloat16 as published, computed in float32; the three unused tensors of version 7 come back too."""
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in weights(version).items()}
    assert ("blocks.0.att.v1" in tensors) == (version == "7")
    write(tmp_path / "in", config(version), tensors)
    jaxlm.load(tmp_path / "in").save(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()


def write(directory: Path, hf: dict, tensors: dict[str, np.ndarray]) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(hf))
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("6", {"time_mix_exta_dim": 8}, "time_mix_exta_dim"),
        ("6", {"head_size": 24}, "heads of 24 do not divide 64"),
        ("5.0", {"model_version": "5_3"}, "model_version='5_3' is not supported; supported: 5_0, 5_1, 5_2"),
        ("5.0", {"rwkv_bonus": "time_faaaa"}, "missing blocks.0.att.time_faaaa"),
        ("7", {"attn": {"layers": [1]}}, "attn=.* is not supported"),
        ("7", {"value_dim": [64, 64, 32]}, "value_dim=.* is not supported"),
        ("7", {"a_low_rank_dim": 12}, r"blocks.0.att.a1 .* has shape \[64, 8\], expected \[64, 12\]"),
        ("4", {"rwkv_names": "rwkv"}, "rwkv_names='rwkv' is not supported; supported: blinkdl"),
        ("4", {"num_hidden_layers": 2}, "unexpected blocks.2.att.key.weight"),
        ("4", {"tie_word_embeddings": True}, "head.weight differs from emb.weight"),
    ],
)
def test_what_does_not_fit_is_named(version, change, message, tmp_path):
    write(tmp_path / "in", config(version) | change, weights(version))
    with pytest.raises(ValueError, match=message):
        jaxlm.load(tmp_path / "in")
