"""Loading, saving and converting a gigabyte: what is resident beside the parameters stays within a few tensors."""

import json
import struct
import subprocess
import sys

import pytest

CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
PROGRAM = """
import json, resource, sys
import jax, jaxlm, jaxlm.api, jaxlm.checkpoints.safetensors
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.numpy.zeros(8).block_until_ready()
idle = peak()
jaxlm.api.convert(sys.argv[1], sys.argv[2])
converted = peak()
model = jaxlm.load(sys.argv[1], mesh=sys.argv[3] or None)
loaded = peak()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
model.save(sys.argv[2], overwrite=True)
print(json.dumps({"parameters": size, "convert": converted - idle, "load": loaded - idle, "save": peak() - idle}))
"""
# A run's state with the parameters of CONFIG at step 1; then, in another process, what converting it takes.
SAVE_RUN = """
import sys, jax, jax.numpy as jnp, yaml
from pathlib import Path
import jaxlm
from jaxlm.checkpoints.files import write_json
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import init_state
out = Path(sys.argv[1])
model = jaxlm.init(out / "config.json")
made = Optimizer(name="sgd", schedule=Schedule(name="constant", steps=1)).make()
saved = Checkpoints(out / "checkpoints")
saved.save(init_state({"params": model.params}, made, jax.random.key(0)), {})
saved.close()
settings = {"model": str(out / "config.json"), "trainable": ["*"], "adapter": None, "ignore_fields": []}
(out / "config.yaml").write_text(yaml.safe_dump(settings))
"""
CONVERT_RUN = """
import resource, sys
import jaxlm.api, jaxlm.checkpoints.run, jaxlm.models.families.llama, tensorstore
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
idle = peak()
jaxlm.api.convert(sys.argv[1], sys.argv[2])
print(peak() - idle)
"""


def sparse_checkpoint(directory, names) -> int:
    """A float32 checkpoint of zeros that takes no space on disk; returns its bytes."""
    header, end = {}, 0
    for name, binding in names.bindings.items():
        size = 4
        for n in binding.stored_shape:
            size *= n
        shape = list(binding.stored_shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return end


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "fsdp=4,tensor=2"])
def test_peak_is_the_parameters_and_little_more(mesh, tmp_path):
    from jaxlm.api import parameter_shapes
    from jaxlm.model import tensor_names
    from jaxlm.models.registry import family

    fam = family("llama")
    config = fam.config(CONFIG)
    size = sparse_checkpoint(tmp_path, tensor_names(fam, config, parameter_shapes(fam, config), ()))
    assert 0.9e9 < size < 1.1e9
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tmp_path / "again"), mesh]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    assert report["parameters"] == size
    largest = 8192 * 1024 * 4
    assert report["convert"] <= 2 * largest + 100e6, report
    limit = 1.15 * size + 150e6 if not mesh else size + 4 * largest + 150e6  # compiling takes some of it
    assert report["load"] <= limit, report
    assert report["save"] <= limit, report
    assert (tmp_path / "again/model.safetensors").stat().st_size == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_run_is_converted_one_tensor_at_a_time(tmp_path):
    config = CONFIG | {"num_hidden_layers": 24, "hidden_size": 512, "intermediate_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "checkpoints").mkdir()
    subprocess.run([sys.executable, "-c", SAVE_RUN, str(tmp_path)], check=True)
    command = [sys.executable, "-c", CONVERT_RUN, str(tmp_path), str(tmp_path / "out")]
    took = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    size, largest = (tmp_path / "out/model.safetensors").stat().st_size, 8192 * 512 * 4
    assert size > 400e6 and took < 2 * largest + 100e6, (size, took)
