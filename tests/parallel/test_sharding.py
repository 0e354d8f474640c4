"""Meshes and shardings: what a preset means, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.models import decoder
from jaxlm.models.registry import family
from jaxlm.parallel.mesh import AXES, abstract_mesh, make_mesh, parse_preset
from jaxlm.parallel.sharding import RULES, SPREAD, batch_shardings, constrain, everywhere, shardings, spec

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}  # fmt: skip


def test_presets():
    assert parse_preset("fsdp=4, tensor=2") == {"fsdp": 4, "tensor": 2}
    mesh = make_mesh("fsdp=4,tensor=2")
    assert mesh.axis_names == AXES and dict(mesh.shape)["fsdp"] == 4 and mesh.size == 8


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("fdsp=8", "unknown axis 'fdsp', did you mean 'fsdp'"),
        ("fsdp", "expected fsdp=SIZE"),
        ("fsdp=0", "expected fsdp=SIZE"),
        ("data=2,data=4", "data is given twice"),
        ("fsdp=3", "is for 3 devices; there are 8"),
    ],
)
def test_bad_presets(preset, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(preset)


def test_specs():
    mesh = make_mesh("fsdp=4,tensor=2")
    assert spec(("layers", "embed", "heads", "head_dim"), (2, 16, 4, 8), mesh)[0] == P(None, "fsdp", "tensor", None)
    assert spec(("vocab", "embed"), (61, 16), mesh) == (P(None, "fsdp"), [("vocab", 61, 2)])
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        spec(("width",), (8,), mesh)
    with pytest.raises(ValueError, match="would use a mesh axis twice"):
        spec(("embed", "embed"), (16, 16), mesh)
    with pytest.raises(ValueError, match=r"are 1, for an array of shape \(16, 16\)"):
        spec(("embed",), (16, 16), mesh)


def test_rules_name_axes():
    cut = [(axis,) if isinstance(axis, str) else axis or () for _, axis in RULES + SPREAD]
    assert {axis for axes in cut for axis in axes} <= set(AXES)
    assert dict(SPREAD) == dict(RULES) | {"embed": ("fsdp", "data")}


def test_what_divides_is_cut():
    """Over as many of the first mesh axes as divide it, and listed."""
    mesh = abstract_mesh("data=4,fsdp=2,tensor=3")
    assert spec(("embed",), (16,), mesh, SPREAD) == (P(("fsdp", "data")), [])
    assert spec(("embed",), (12,), mesh, SPREAD) == (P("fsdp"), [("embed", 12, 8)])
    assert spec(("embed", "mlp"), (7, 9), mesh, SPREAD) == (P(None, "tensor"), [("embed", 7, 8)])


def test_shardings_without_devices():
    """The same as on a mesh of devices; and a mistake names its parameter."""
    shapes = {"a": {"w": jax.ShapeDtypeStruct((16, 6), "float32")}}
    made, _ = shardings({"a": {"w": ("embed", "mlp")}}, shapes, abstract_mesh("fsdp=4,tensor=2"))
    with_devices, _ = shardings({"a": {"w": ("embed", "mlp")}}, shapes, make_mesh("fsdp=4,tensor=2"))
    assert made["a"]["w"].spec == with_devices["a"]["w"].spec == P("fsdp", "tensor")
    assert made["a"]["w"].shard_shape((16, 6)) == (4, 3)
    with pytest.raises(ValueError, match=r"a/w: logical axes .* would use a mesh axis twice"):
        shardings({"a": {"w": ("heads", "mlp")}}, shapes, abstract_mesh("tensor=2"))


def test_every_parameter_of_a_model_has_a_sharding():
    config = family("llama").config(CONFIG)
    shapes = jax.eval_shape(lambda: decoder.init(config, jax.random.key(0)))
    made, whole = shardings(decoder.logical_axes(config), shapes, make_mesh("fsdp=8"))
    assert jax.tree.structure(made) == jax.tree.structure(shapes) and not whole
    cut = jax.tree.map(lambda s, a: np.prod(s.shard_shape(a.shape)) / a.size, made, shapes)
    assert cut["embed"]["w"] == cut["layers"]["attn"]["q"]["w"] == cut["layers"]["mlp"]["down"]["w"] == 1 / 8
    _, whole = shardings(decoder.logical_axes(config), shapes, make_mesh("tensor=8"))
    assert {(r.path, r.axis, r.size) for r in whole} >= {("layers/attn/k/w", "kv_heads", 2), ("embed/w", "vocab", 61)}


def test_activations_are_laid_out_by_their_axes():
    x, lay = jnp.zeros((8, 6, 3)), jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))
    assert len(lay(x).sharding.device_set) == 1
    with jax.set_mesh(make_mesh("data=2,fsdp=2,sequence=2")):
        assert lay(x).addressable_shards[0].data.shape == (2, 3, 3)
        assert everywhere({"x": lay(x)})["x"].sharding.is_fully_replicated


def test_batches():
    mesh = make_mesh("data=2,fsdp=4")
    assert batch_shardings({"tokens": np.zeros((2, 8, 5))}, mesh, lead=1)["tokens"].spec == P(
        None, ("data", "fsdp"), None
    )
    with pytest.raises(ValueError, match="6 rows do not divide over 8 devices"):
        batch_shardings({"tokens": np.zeros((6, 5))}, mesh)
