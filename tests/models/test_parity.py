"""Every family and every RoPE against transformers, from files on disk, in float32."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import jaxlm
from tests.models import recorded
from tests.models.cases import ARCHITECTURES, CASES, FAMILIES, LENGTH
from tests.models.reference import ROWS, reference

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
every_family = pytest.mark.parametrize("case", FAMILIES, ids=lambda c: c.id)
TOLERANCE = 2e-6
PADS = (0, 3, 7)  # per row, more than some windows


def record(case, **found) -> None:
    recorded.record(case.id, loaded(case).family.name, **found)


@functools.cache
def loaded(case) -> jaxlm.Model:
    return jaxlm.load(reference(case).directory)


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return np.abs(got - want).max() / np.abs(want).max()


def shifted(tokens: np.ndarray, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """The first LENGTH - pad tokens of each row, padded on one side with a token that would matter if it were seen."""
    padded, valid = np.full_like(tokens, 5), np.zeros(tokens.shape, bool)
    for row, pad in enumerate(PADS):
        place = slice(pad, None) if left else slice(0, LENGTH - pad)
        padded[row, place], valid[row, place] = tokens[row, : LENGTH - pad], True
    return padded, valid


def unshifted(logits, left: bool) -> np.ndarray:
    """The valid positions of all rows, one after the other."""
    return np.concatenate(
        [row[p:] if left else row[: LENGTH - p] for row, p in zip(np.asarray(logits), PADS, strict=True)]
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run_chunk(backbone, config, runtime, params, tokens, positions, cache):
    """The tokens after what the cache holds."""
    logits, cache, _ = backbone.forward(
        config, params, tokens, positions=positions, cache=cache, rope_len=LENGTH, runtime=runtime
    )
    return logits, cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(backbone, config, runtime, params, tokens, valid=None):
    """One pass; frequencies that depend on a length are made for LENGTH."""
    logits, _, aux = backbone.forward(config, params, tokens, valid=valid, rope_len=LENGTH, runtime=runtime)
    return logits, aux


@every_case
def test_logits_equal_transformers(case):
    want = reference(case)
    assert case.tolerance == TOLERANCE or (case.tolerance == 1e-5 and case.reason)
    found = error(loaded(case)(want.tokens), want.logits)
    record(case, logits=float(f"{found:.1e}"))
    assert found <= case.tolerance


@every_case
def test_decoding_through_the_cache_equals_one_pass(case):
    """Left-padded rows, fed in chunks longer and shorter than the windows, then one by one, into a cache that is just
    long enough; the cache of windowed layers is a ring of the window's size."""
    model, want = loaded(case), reference(case)
    tokens, valid = shifted(want.tokens, left=True)
    positions = np.where(valid, np.cumsum(valid, 1) - 1, -1).astype(np.int32)
    backbone, config = model.family.backbone, model.config
    for chunks in ((7, 7, 7, 1, 1, 1), (1,) * 3 + (7, 7, 7)):
        cache = backbone.init_cache(config, model.params, ROWS, LENGTH)
        for kind, state in zip(config.kinds, backbone.layers(config), strict=True):
            assert cache[state.state]["k"].shape[2] == (kind.window or LENGTH)
        out, start = [], 0
        for size in chunks:
            part = slice(start, start + size)
            args = (model.params, tokens[:, part], positions[:, part], cache)
            logits, cache = run_chunk(backbone, config, model.runtime, *args)
            out.append(np.asarray(logits))
            start += size
        got = unshifted(np.concatenate(out, 1), left=True)
        assert error(got, unshifted(want.logits, left=False)) <= case.tolerance, chunks


@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda c: c.id)
def test_generation_equals_transformers_token_for_token(case):
    """Greedy and with a repetition penalty, a ragged batch of ours against single prompts of theirs."""
    model, want = loaded(case), reference(case)
    prompts = [row[:n] for row, n in zip(want.tokens, (11, 8, 3), strict=True)]
    for options in ({}, {"repetition_penalty": 1.4}):
        got = model.generate(prompts, max_new_tokens=12, temperature=0.0, **options)
        for row, prompt in zip(got, prompts, strict=True):
            expected = want.generate(prompt, max_new_tokens=12, do_sample=False, **options)
            np.testing.assert_array_equal(row[: len(expected)], expected)
            assert (row[len(expected) :] == 0).all()  # the pad id, after EOS


@every_family
def test_padded_batch_equals_single_rows(case):
    model, want = loaded(case), reference(case)
    single = unshifted(want.logits, left=False)
    for left in (True, False):
        tokens, valid = shifted(want.tokens, left)
        logits, aux = run(model.family.backbone, model.config, model.runtime, model.params, tokens, valid)
        assert error(unshifted(logits, left), single) <= case.tolerance, f"{left=}"
        if case.is_moe and not left:
            assert aux["router_loss"] == pytest.approx(want.router_loss(valid), rel=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.is_moe], ids=lambda c: c.id)
def test_router_loss_equals_transformers(case):
    model, want = loaded(case), reference(case)
    everything = np.ones((ROWS, LENGTH), bool)
    _, aux = run(model.family.backbone, model.config, model.runtime, model.params, want.tokens, everything)
    assert aux["router_loss"] == pytest.approx(want.router_loss(), rel=1e-5)


@pytest.mark.slow
@every_family
def test_gradients_equal_torch(case, tmp_path):
    """Of a summed cross-entropy, for every stored tensor: both gradients go through `save` under the tensors' names."""
    model, want = loaded(case), reference(case)
    tokens = jnp.asarray(want.tokens)

    def loss(params):
        logits, _, _ = model.family.backbone.forward(model.config, params, tokens, runtime=model.runtime)
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).sum()

    ours = model.with_params(jax.jit(jax.grad(loss))(model.params))
    ours.save(tmp_path / "ours")
    want.gradients(tmp_path / "theirs")
    got, expected = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert got.keys() == expected.keys()
    errors = {name: error(got[name], expected[name]) for name in expected if np.abs(expected[name]).max() > 0}
    assert len(errors) >= len(expected) - (case.is_moe and 3)  # an expert that no token chose has no gradient
    assert max(errors.values()) <= 1e-4, sorted(errors.items(), key=lambda e: -e[1])[:5]
    for name in expected.keys() - errors.keys():
        assert not got[name].any(), name


@every_case
def test_saving_gives_the_same_files_back(case, tmp_path):
    directory = reference(case).directory
    loaded(case).save(tmp_path / "again")
    same = digests(tmp_path / "again") == digests(directory)
    record(case, export=same)
    assert same


@every_family
def test_saving_gives_bfloat16_files_back(case, tmp_path):
    """Half of the tensors are bfloat16 and the computation is in float32."""
    directory = mixed_precision(reference(case).directory, tmp_path / "mixed")
    model = jaxlm.load(directory, dtype="float32")
    assert {a.dtype.name for a in jax.tree.leaves(model.params)} == {"float32"}
    model.save(tmp_path / "again")
    assert digests(tmp_path / "again") == digests(directory)


def stored(directory) -> dict[str, np.ndarray]:
    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


def digests(directory) -> dict[str, str]:
    """sha256 of the weights and of everything else that has the same name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def mixed_precision(directory, out):
    """The same checkpoint with every second tensor in bfloat16."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file

    out.mkdir()
    for path in directory.iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_torch(path)
        for name in sorted(tensors)[::2]:
            tensors[name] = tensors[name].to(torch.bfloat16)
        save_file(tensors, out / path.name, metadata={"format": "pt"})
    index = out / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["metadata"]["total_size"] = sum(
            t.numel() * t.element_size() for p in out.glob("*.safetensors") for t in load_torch(p).values()
        )
        index.write_text(json.dumps(content))
    return out


def test_every_family_has_cases():
    from jaxlm.models import registry

    have = {jaxlm.load(reference(case).directory).family.name for case in FAMILIES}
    assert have == {name for name in registry.names() if registry.family(name).backbone.__name__.endswith("decoder")}
