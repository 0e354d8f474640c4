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
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.checkpoints.load import flatten
from jaxlm.models import rwkv, rwkv_layers
from jaxlm.train.config import TrainConfig, parse
from jaxlm.train.loop import Run
from jaxlm.train.setup import setup
from tests.data.tiny import tokenizer
from tests.models.cases import RWKV
from tests.models.recorded import record
from tests.models.rwkv_reference import L, config, reference, weights

TOLERANCE = 1e-5  # of the largest; the package computes in float32 as well, in another order
KINDS = ("4", "6", "7")  # versions whose recurrences differ
CHUNK = 20
every_version = pytest.mark.parametrize("version", RWKV)
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
    found = error(logits[0], want.logits)
    record(f"rwkv-{version}", model.family.name, logits=float(f"{found:.1e}"))
    assert found <= TOLERANCE
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
    segments = np.repeat([3, 3, 1, 2], (5, *lengths))[None].astype(np.int32)
    valid = np.arange(40)[None] >= 5  # padding is numbered as the first sequence is
    tokens = np.full(segments.shape, 7, np.int32)
    tokens[0, 5:] = np.concatenate([want.tokens[:n] for n in lengths])
    logits, _ = run(model.config, model.params, tokens, None, valid, segments)
    expected = np.concatenate([want.logits[:n] for n in lengths])
    assert error(logits[0, 5:], expected) <= TOLERANCE


@pytest.mark.slow
def test_gradients_are_those_of_the_recurrence_token_by_token(monkeypatch):
    """With padding in the batch, none of which may reach a gradient."""
    model, want = loaded("7"), reference("7")
    tokens = np.stack([want.tokens[:12], np.r_[[0] * 4, want.tokens[50:58]]])
    valid = jnp.stack([jnp.ones(12, bool), jnp.arange(12) >= 4])

    def loss(params, tokens):
        logits, _ = run.__wrapped__(model.config, params, tokens, None, valid)
        p = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        return -(p * valid).sum() / valid.sum()

    gradient = jax.jit(jax.grad(loss))
    got, other = gradient(model.params, tokens), gradient(model.params, np.where(valid, tokens, 9))
    serial = functools.partial(rwkv_layers.recurrence, impl="serial")
    monkeypatch.setattr(rwkv_layers, "recurrence", serial)
    expected = jax.jit(jax.grad(lambda *args: loss(*args)))(model.params, tokens)  # another function: traced anew
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
    model = jaxlm.load(tmp_path / "in")
    model.save(tmp_path / "out")
    same = (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "in/model.safetensors").read_bytes()
    record(f"rwkv-{version}", model.family.name, export=same)
    assert same


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


def test_generation_equals_the_package_token_for_token():
    model, want = loaded("7"), reference("7")
    prompts = [want.tokens[:n].tolist() for n in (11, 3)]
    got = model.generate(prompts, max_new_tokens=12, temperature=0.0, eos=[])
    for row, prompt in zip(got, prompts, strict=True):
        np.testing.assert_array_equal(row, want.generate(prompt, 12))


@pytest.mark.slow
def test_a_session_continues_the_state_however_long_it_grows():
    model, want = loaded("4"), reference("4")
    session = model.session(max_new_tokens=8, temperature=0.0, eos_token_id=[])
    ids, plans = want.tokens[:9].tolist(), []
    for turn in range(2):
        answer = session.answer(ids, 8).tokens.tolist()
        assert answer == want.generate(ids, 8)
        assert session.reused == (0 if turn == 0 else len(ids) - 12)
        plans.append(session.plan)
        ids = [*ids, *answer, *want.tokens[20:31].tolist()]
    assert len(set(plans)) == 1  # no length is outgrown


def test_float16_is_rescaled_by_powers_of_two(tmp_path):
    """A stream beyond float16's numbers. Halved after every layer it fits; scaling leaves no other trace."""
    tokens = reference("4").tokens[None, :24]

    def grown(by: float) -> dict[str, np.ndarray]:
        """What layers after the first add, that many times as large."""
        adding = re.compile(r"blocks\.[^0].*(output|ffn\.value)\.weight")
        return {name: array * (by if adding.match(name) else 1) for name, array in weights("4").items()}

    def stream(tensors: dict[str, np.ndarray], every: int, dtype: str) -> np.ndarray:
        where = tmp_path / f"{every}-{dtype}-{len(list(tmp_path.iterdir()))}"
        write(where, config("4") | {"rescale_every": every}, tensors)
        return np.asarray(jaxlm.load(where, dtype=dtype)(tokens, output="all_hidden"))[-1]

    factor = 1000 * 120_000 / np.abs(stream(grown(1000), 1, "float32")).max()
    expected = stream(grown(factor), 1, "float32")
    assert np.abs(expected).max() > 1.5 * 2**16
    assert error(stream(grown(factor), 1, "float16"), expected) <= 1e-2
    assert not np.isfinite(stream(grown(factor), 0, "float16")).all()


def test_decays_stay_float32_in_a_narrow_model(tmp_path):
    model, want = jaxlm.load(reference("6").directory, dtype="bfloat16"), reference("6")
    narrow = {path: leaf.dtype.name for path, leaf in flatten(model.params).items()}
    assert {path for path, name in narrow.items() if name == "float32"} == {"layers/attn/decay", "layers/attn/bonus"}
    assert error(model(want.tokens[None, :40])[0], want.logits[:40]) <= 5e-2
    model.save(tmp_path / "out", dtype="bfloat16")
    kept = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(kept["blocks.1.att.time_decay"], weights("6")["blocks.1.att.time_decay"])
    assert kept["blocks.1.att.key.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    want = reference("6")
    model = jaxlm.load(want.directory, mesh="data=2,fsdp=2,tensor=2")
    tokens = np.stack([want.tokens[i : i + 8] for i in range(0, 32, 8)])
    assert error(model(tokens)[0], want.logits[:8]) <= TOLERANCE
    assert len({str(leaf.sharding.spec) for leaf in jax.tree.leaves(model.params)}) > 3


def test_version_4_equals_transformers(tmp_path):
    """Logits and every gradient, with a time mixing of another width than the stream's."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3}
    theirs = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=101, rescale_every=0, **sizes))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "time_mix" in name:
                p.uniform_()
            elif "time_decay" in name:
                p.uniform_(-6, 1.5)
            else:
                p.normal_(std=1 if p.ndim == 1 else p.shape[1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    model = jaxlm.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 101, (2, 12)).astype(np.int32)
    logits = theirs.double()(torch.tensor(tokens), use_cache=False).logits
    assert error(model(tokens), logits.detach().numpy()) <= 2e-6

    targets = torch.tensor(tokens[:, 1:]).long().flatten()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()

    def loss(params):
        logits = jax.nn.log_softmax(run.__wrapped__(model.config, params, tokens)[0][:, :-1])
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()

    model.with_params(jax.jit(jax.grad(loss))(model.params)).save(tmp_path / "gradients")
    found = load_file(tmp_path / "gradients/model.safetensors")
    for name, p in theirs.named_parameters():
        assert error(found[name], p.grad.numpy()) <= 1e-5, name


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A config to begin from, a tokenizer, and text."""
    at = tmp_path_factory.mktemp("ground")
    hf = {key: value for key, value in config("4").items() if key != "rwkv_names"}
    (at / "config.json").write_text(json.dumps(hf | {"vocab_size": 300, "num_hidden_layers": 2}))
    tokenizer().save_pretrained(at / "tokenizer")
    lines = [json.dumps({"text": f"{i} and {i + 1} are {2 * i + 1}. " * (1 + i % 5)}) for i in range(60)]
    (at / "text.jsonl").write_text("\n".join(lines))
    return at


def train(ground: Path, out: Path, **settings):
    given = {
        "model": str(ground / "config.json"), "tokenizer": str(ground / "tokenizer"), "out": str(out), "steps": 6,
        "data": {"train": str(ground / "text.jsonl"), "seq_len": 16, "batch_size": 4}, "log_every": 1,
        "optim": {"rate": 1e-2, "schedule": "constant"}, "mesh": "data=2,fsdp=2,tensor=2",
    }  # fmt: skip
    result = Run(setup(parse(TrainConfig, given | settings, "test"))).train()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return result, [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_a_run_learns_and_an_adapter_learns_alone(ground, tmp_path):
    result, losses = train(ground, tmp_path / "run", steps=3)
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.3
    base = jaxlm.load(result.model)
    adapter = {"kind": "lora", "rank": 4, "targets": ["receptance", "value"]}
    rate = {"rate": 5e-2, "schedule": "constant"}
    _, losses = train(ground, tmp_path / "lora", model=str(result.model), adapter=adapter, mesh=None, optim=rate)
    assert np.isfinite(losses).all()
    after, tokens = jaxlm.load(result.model), np.array(tokenizer()("7 and 8 are 15.")["input_ids"])[None]
    for a, b in zip(jax.tree.leaves(base.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(a, b)
    adapted = after.with_adapters(tmp_path / "lora/adapter")
    assert adapted.logprobs(tokens).mean() > after.logprobs(tokens).mean()
    np.testing.assert_allclose(adapted.merge_adapters()(tokens), adapted(tokens), atol=1e-5)
