"""Checkpoints over a mesh: the same bits as on one device, read once, written back byte for byte."""

import functools
import json
import math

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.checkpoints.load import flatten
from jaxlm.checkpoints.safetensors import SafetensorsSource, write_file
from jaxlm.checkpoints.source import box_of_rows
from jaxlm.parallel.mesh import make_mesh
from tests.parallel.test_equality import CONFIGS

_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64}
MODELS = CONFIGS | {
    "concatenated": _SMALL | {
        "model_type": "phi3", "intermediate_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "rope_scaling": None, "pad_token_id": 0, "sliding_window": None, "tie_word_embeddings": False,
    },
    "interleaved": {
        "model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "n_inner": None, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip
# Leading axes of stacks cut (pipe, expert), rows and columns of matrices, and parts of joined tensors.
PRESETS = {
    "deep": "pipe=4,fsdp=2",
    "dense": "fsdp=2,tensor=2,pipe=2",
    "moe": "expert=2,fsdp=2,tensor=2",
    "concatenated": "fsdp=4,tensor=2",
    "interleaved": "fsdp=2,tensor=4",
}


@functools.cache
def made(name: str, mesh: str | None = None) -> jaxlm.Model:
    return jaxlm.init(MODELS[name], key=jax.random.key(1), mesh=mesh)


@pytest.fixture
def counted(monkeypatch):
    """How many bytes of each tensor were read."""
    counts: dict[str, int] = {}
    fill = SafetensorsSource._fill

    def count(self, view, begin, name):
        counts[name] = counts.get(name, 0) + view.nbytes
        fill(self, view, begin, name)

    monkeypatch.setattr(SafetensorsSource, "_fill", count)
    return counts


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_same_bits_read_once_and_written_back(name, tmp_path, counted):
    made(name).save(tmp_path / "one")
    alone = flatten(jaxlm.load(tmp_path / "one").params)
    counted.clear()
    model = jaxlm.load(tmp_path / "one", mesh=PRESETS[name])
    with SafetensorsSource(tmp_path / "one") as source:
        sizes = {tensor: info.dtype.itemsize * math.prod(info.shape) for tensor, info in source.tensors.items()}
    assert counted == sizes
    params, cut = flatten(model.params), 0
    assert list(params) == list(alone)
    for path, array in params.items():
        np.testing.assert_array_equal(array, alone[path], err_msg=path)
        assert len(array.sharding.device_set) == 8
        cut += array.addressable_shards[0].data.nbytes
    assert cut < 0.3 * sum(sizes.values())
    model.save(tmp_path / "many")
    assert (tmp_path / "many/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_init_does_not_depend_on_the_mesh():
    one, many = (made("dense", mesh) for mesh in (None, "fsdp=4,tensor=2"))
    assert many.params["layers"]["attn"]["q"]["w"].addressable_shards[0].data.shape == (4, 8, 4, 4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_model_on_a_mesh_computes_what_it_does_on_one_device():
    one, many = (made("dense", mesh) for mesh in (None, "fsdp=4,tensor=2"))
    tokens = np.random.default_rng(0).integers(0, 64, (3, 9))
    logits = many(tokens)
    assert logits.sharding.is_fully_replicated
    np.testing.assert_allclose(logits, one(tokens), atol=2e-6)
    np.testing.assert_allclose(many.logprobs(tokens), one.logprobs(tokens), atol=2e-6)
    for draw in ({"temperature": 0}, {"temperature": 1, "seed": 3}):
        drawn = [model.generate(tokens, max_new_tokens=5, **draw) for model in (one, many)]
        np.testing.assert_array_equal(*drawn)


def test_what_does_not_divide_is_named(caplog):
    model = jaxlm.init(CONFIGS["dense"], mesh="tensor=8")
    assert model.params["layers"]["attn"]["k"]["w"].sharding.is_fully_replicated
    assert "layers/attn/k/w (kv_heads=4 over 8)" in caplog.text and "attn/q" not in caplog.text


def test_refusals():
    with pytest.raises(ValueError, match="layers='unrolled' is a form for one device"):
        jaxlm.init(CONFIGS["dense"], mesh="fsdp=8", layers="unrolled")
    with pytest.raises(ValueError, match="is for 4 devices; there are 8"):
        jaxlm.init(CONFIGS["dense"], mesh="fsdp=4")
    with pytest.raises(ValueError, match=r"mesh has the axes \('x',\)"):
        jaxlm.init(CONFIGS["dense"], mesh=jax.make_mesh((8,), ("x",)))
    assert jaxlm.init(CONFIGS["dense"], mesh=make_mesh("fsdp=8")).mesh == make_mesh("fsdp=8")


def test_float16_is_checked_on_a_mesh_too(tmp_path):
    model = made("dense").with_params(made("dense").params | {"final_norm": {"scale": jax.numpy.full(32, 1e6)}})
    model.save(tmp_path / "large")
    with pytest.raises(ValueError, match=r"norm.weight has numbers beyond float16"):
        jaxlm.load(tmp_path / "large", dtype="float16", mesh="fsdp=8")


def test_boxes(tmp_path):
    """Random boxes of a tensor whose axes are cut further, from the middle of it, against numpy."""
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal((30, 8)).astype(np.float32)
    write_file(tmp_path / "x.safetensors", [("x", np.float32, (30, 8))], {}, lambda _: tensor)
    shape, begin = (3, 2, 4, 2, 4), 6 * 8  # rows 6..29 as "(a b c) (d e)"
    whole = tensor[6:30].reshape(shape)
    with SafetensorsSource(tmp_path / "x.safetensors") as source:
        for _ in range(50):
            box = tuple(tuple(sorted(rng.choice(size + 1, 2, replace=False).tolist())) for size in shape)
            want = whole[tuple(slice(*one) for one in box)]
            for read in (source.read_box, lambda *of: box_of_rows(source, *of)):
                np.testing.assert_array_equal(read("x", begin, shape, box), want)
        with pytest.raises(ValueError, match="has no box"):
            source.read_box("x", begin + 8, shape, tuple((0, n) for n in shape))
        with pytest.raises(ValueError, match="has no box"):
            source.read_box("x", 0, (30, 8), ((0, 31), (0, 8)))


def test_gguf_over_a_mesh(smollm2_gguf):
    """One quantized matrix whose rows llama.cpp permutes, cut both ways."""
    from jaxlm.opening import open_checkpoint

    source = open_checkpoint(smollm2_gguf).source()
    name = "model.layers.3.self_attn.q_proj.weight"
    whole = source.read(name).reshape(9, 64, 576)
    np.testing.assert_array_equal(
        source.read_box(name, 0, (9, 64, 576), ((3, 6), (0, 64), (144, 288))), whole[3:6, :, 144:288]
    )
    source.close()


def test_a_sharded_checkpoint_of_mixed_dtypes(tmp_path):
    """A stack whose layers are stored in two dtypes, cut over pipe, is float32."""
    made("dense").save(tmp_path / "one", dtype="bfloat16")
    with SafetensorsSource(tmp_path / "one") as source:
        tensors = {name: source.read(name) for name in source.tensors}
    mixed = "model.layers.3.mlp.up_proj.weight"
    tensors[mixed] = tensors[mixed].astype(np.float32)
    (tmp_path / "one/model.safetensors").unlink()
    header = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    write_file(tmp_path / "one/model.safetensors", header, {"format": "pt"}, tensors.__getitem__)
    (tmp_path / "one/config.json").write_text(json.dumps(CONFIGS["dense"]))
    one, many = (flatten(jaxlm.load(tmp_path / "one", mesh=mesh).params) for mesh in (None, "pipe=2,fsdp=4"))
    for path in one:
        np.testing.assert_array_equal(one[path], many[path], err_msg=path)
