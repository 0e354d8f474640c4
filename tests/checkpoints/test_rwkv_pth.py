"""RWKV's .pth files: the config that their tensors imply, how they are opened, and what is said of other models'."""

import json
import logging

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

import jaxlm
from jaxlm.api import convert
from jaxlm.checkpoints import rwkv_pth
from jaxlm.checkpoints.pth import PthSource
from jaxlm.checkpoints.source import TensorInfo
from jaxlm.cli.main import main
from jaxlm.opening import open_checkpoint
from tests.checkpoints.pth_files import write
from tests.checkpoints.test_rwkv_tokenizer import write_vocabulary

D, HEADS, SIZE, F, V, LAYERS = 12, 2, 6, 20, 300, 3
FLOAT16 = np.dtype("float16")
BASE = {
    "rwkv_names": "blinkdl", "vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "intermediate_size": F,
    "bos_token_id": 0, "eos_token_id": 0, "dtype": "float16",
}  # fmt: skip
HEADED = BASE | {"attention_hidden_size": D, "head_size": SIZE, "head_size_divisor": 8}
RANKS = {"w": 3, "a": 4, "v": 2, "g": 5}
CONFIGS = {
    "4": {"model_type": "rwkv", "attention_hidden_size": D} | BASE,
    "5.0": {"model_type": "rwkv5", "model_version": "5_0", "rwkv_bonus": "time_first"} | HEADED,
    "5.1": {"model_type": "rwkv5", "model_version": "5_1", "rwkv_bonus": "time_first"} | HEADED,
    "5.1, three axes": {"model_type": "rwkv5", "model_version": "5_1", "rwkv_bonus": "time_faaaa"} | HEADED,
    "5.2": {"model_type": "rwkv5_2", "rwkv_bonus": "time_faaaa"} | HEADED,
    "6": {"model_type": "rwkv6", "time_mix_extra_dim": 7, "time_decay_extra_dim": 9} | HEADED,
    "7": {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "head_dim": SIZE, "head_size_divisor": 8,
          "decay_low_rank_dim": 3, "a_low_rank_dim": 4, "v_low_rank_dim": 2, "gate_low_rank_dim": 5} | BASE,
}  # fmt: skip


def shapes(version: str, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    """Those tensors of a published file that say what it is, in its order."""
    made: dict[str, tuple[int, ...]] = {"emb.weight": (V, D)}
    for i in range(layers):
        own: dict[str, tuple[int, ...]] = {"ln1.weight": (D,), "ln1.bias": (D,)}
        if version == "7":
            own |= {f"att.x_{name}": (1, 1, D) for name in "rwkvag"}
            for name, rank in RANKS.items():
                if name != "v" or i > 0:
                    own |= {f"att.{name}0": (1, 1, D), f"att.{name}1": (D, rank), f"att.{name}2": (rank, D)}
            own["att.r_k"] = (HEADS, SIZE)
        else:
            decay = {
                "4": (D,),
                "5.0": (HEADS,),
                "5.1": (HEADS,),
                "5.1, three axes": (HEADS, 1, 1),
                "5.2": (HEADS, SIZE),
            }
            own["att.time_decay"] = decay.get(version, (1, 1, D))
            bonus = {"4": ("time_first", (D,)), "5.0": ("time_first", (HEADS,)), "5.1": ("time_first", (HEADS,))}
            name, shape = bonus.get(version, ("time_faaaa", (HEADS, SIZE)))
            own["att." + name] = shape
        if version == "6":
            own |= {"att.time_maa_x": (1, 1, D), "att.time_maa_w1": (D, 5 * 7), "att.time_maa_w2": (5, 7, D)}
            own |= {"att.time_decay_w1": (D, 9), "att.time_decay_w2": (9, D)}
        own["att.key.weight"] = (D, D)
        if version not in ("4", "5.0", "7"):
            own["att.gate.weight"] = (D, D)
        if version != "4":
            own["att.ln_x.weight"] = (D,)
        own["ffn.key.weight"] = (F, D)
        made |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    return made | {"ln_out.weight": (D,), "head.weight": (V, D)}


def infos(made) -> dict[str, TensorInfo]:
    return {name: TensorInfo("m.pth", FLOAT16, shape) for name, shape in made.items()}


@pytest.mark.parametrize("version", CONFIGS)
def test_config_from_tensors(version):
    assert rwkv_pth.config(infos(shapes(version)), "m.pth") == CONFIGS[version]


def test_one_layer():
    """The reference counts on a second layer to see the decay after ln_x; here the order says nothing."""
    for version, expected in CONFIGS.items():
        left_out = {"v_low_rank_dim"} if version == "7" else set()
        expected = {key: value for key, value in expected.items() if key not in left_out} | {"num_hidden_layers": 1}
        assert rwkv_pth.config(infos(shapes(version, layers=1)), "m.pth") == expected


def test_values_that_the_first_layer_of_version_7_carries_unread():
    made = shapes("7") | {"blocks.0.att.v1": (D, 99)}
    assert rwkv_pth.config(infos(made), "m.pth")["v_low_rank_dim"] == RANKS["v"]


@pytest.mark.parametrize(
    ("version", "change", "expected"),
    [
        ("4", {"emb.weight": (V,)}, r"tensor 'emb.weight' has the shape \[300\], expected 2 sizes above 0"),
        ("6", {"blocks.0.att.time_maa_w1": None}, "has no tensor 'blocks.0.att.time_maa_w1'"),
        ("6", {"blocks.0.att.time_faaaa": (HEADS, 0)}, r"shape \[2, 0\]"),
        ("7", {"blocks.1.att.v1": None}, "has no tensor 'blocks.1.att.v1'"),
        ("5.2", {"blocks.0.att.time_decay": (5, 2)}, "5 heads do not divide the width of the time mixing, 12"),
    ],
)
def test_shapes_that_no_version_has(version, change, expected):
    made = {name: shape for name, shape in (shapes(version) | change).items() if shape is not None}
    with pytest.raises(ValueError, match=f"^m.pth: .*{expected}"):
        rwkv_pth.config(infos(made), "m.pth")


# Opening


def save(directory, version: str = "6", name: str = "m.pth"):
    return write(directory / name, {name: np.zeros(shape, np.float16) for name, shape in shapes(version).items()})


def test_a_file_and_a_directory_with_nothing_else(tmp_path):
    path = save(tmp_path)
    for source in (path, tmp_path):
        opened = open_checkpoint(source)
        assert opened.hf_config == CONFIGS["6"] and opened.where == str(path) and opened.generation_config == {}
        with opened.source() as tensors:
            assert isinstance(tensors, PthSource) and list(tensors.tensors) == list(shapes("6"))
    save(tmp_path, name="other.pth")
    with pytest.raises(ValueError, match=r"holds 2 \.pth files \(m\.pth, other\.pth"):
        open_checkpoint(tmp_path)
    assert open_checkpoint(path).where == str(path)


@pytest.mark.parametrize("name", ["m.pth", "pytorch_model.bin"])
def test_beside_a_config(tmp_path, name):
    save(tmp_path, name=name)
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv6", "vocab_size": V, "mine": 1}))
    opened = open_checkpoint(tmp_path)
    assert opened.hf_config == {"model_type": "rwkv6", "vocab_size": V, "mine": 1}
    with opened.source() as tensors:
        assert isinstance(tensors, PthSource)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated"):
        open_checkpoint(tmp_path).source()


def test_other_models_must_be_converted(tmp_path):
    refusal = "pickled PyTorch weights are not loaded, because unpickling can run any code; convert them once"
    write(tmp_path / "m.pth", {"model.norm.weight": np.zeros(3, np.float32)})
    for source in (tmp_path, tmp_path / "m.pth"):
        with pytest.raises(ValueError, match=rf"m\.pth: {refusal}.*this one has no tensor 'emb\.weight'"):
            open_checkpoint(source)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=refusal):
        open_checkpoint(tmp_path).source()
    (tmp_path / "m.pth").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=refusal):
        open_checkpoint(tmp_path).source()
    with pytest.raises(FileNotFoundError, match=r"org/m\.pth: no such file"):
        open_checkpoint("org/m.pth")  # not the name of a repository


def test_tokenizer_beside_the_file(tmp_path, caplog):
    opened = open_checkpoint(save(tmp_path))
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.WARNING):
        opened.write_tokenizer(tmp_path / "out")
    assert "no tokenizer is written: " in caplog.text and not list((tmp_path / "out").iterdir())
    write_vocabulary(tmp_path)
    assert opened.tokenizer()("abc")["input_ids"] == [258]
    opened.write_tokenizer(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(CONFIGS["6"]))
    assert open_checkpoint(tmp_path / "out").tokenizer()("abc")["input_ids"] == [258]


def test_a_named_tokenizer(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    opened = open_checkpoint(save(tmp_path)).with_tokenizer(write_vocabulary(tmp_path / "elsewhere"))
    assert opened.tokenizer()("abc")["input_ids"] == [258]
    opened.write_tokenizer(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert open_checkpoint(save(tmp_path)).with_tokenizer(tmp_path / "out").tokenizer()("abc")["input_ids"] == [258]
    with pytest.raises(FileNotFoundError, match="absent"):
        opened.with_tokenizer(tmp_path / "absent")


def test_vocabulary_in_a_directory_of_the_hub(tmp_path):
    write_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv7", "vocab_size": V}))
    opened = open_checkpoint(tmp_path)
    assert opened.tokenizer()("abc")["input_ids"] == [258]
    (tmp_path / "out").mkdir()
    opened.write_tokenizer(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rwkv_vocab_v20230424.txt"]


# Models


@pytest.mark.parametrize("version", CONFIGS)
def test_a_file_is_the_model_that_it_was_made_of(tmp_path, version):
    """A random model's tensors, by BlinkDL's names and in two dtypes, as a .pth file: loaded, and converted."""
    made = jaxlm.init(CONFIGS[version], key=jax.random.key(1))
    made.save(tmp_path / "made", dtype="bfloat16")
    tensors = safetensors.numpy.load_file(tmp_path / "made" / "model.safetensors")
    assert "emb.weight" in tensors
    write(tmp_path / "m.pth", tensors)
    loaded, expected = jaxlm.load(tmp_path / "m.pth"), jaxlm.load(tmp_path / "made")
    assert loaded.hf_config == CONFIGS[version] | {"dtype": "bfloat16"}
    assert loaded.config == expected.config == made.config
    chex.assert_trees_all_equal(loaded.params, expected.params)
    convert(tmp_path / "m.pth", tmp_path / "out")
    loaded.save(tmp_path / "saved")
    for directory in ("out", "saved"):
        found = safetensors.numpy.load_file(tmp_path / directory / "model.safetensors")
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert (found[name].dtype, found[name].tobytes()) == (value.dtype, value.tobytes()), name


def test_info(tmp_path, capsys):
    made = jaxlm.init(CONFIGS["7"])
    made.save(tmp_path / "made", dtype="float16")
    tensors = safetensors.numpy.load_file(tmp_path / "made" / "model.safetensors")
    write(tmp_path / "m.pth", tensors)
    assert main(["info", str(tmp_path / "m.pth"), "--json", "--params"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"].startswith("rwkv7 - ") and found["tokenizer"] == "none"
    assert found["tensors"]["blocks.2.att.r_k"]["shape"] == [HEADS, SIZE]
    assert list(found["tensors"]) == list(tensors)
    write_vocabulary(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "rwkv_vocab_v20230424.txt" in capsys.readouterr().out.replace("\n", "")
