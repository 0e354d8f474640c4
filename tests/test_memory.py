"""Loading and saving a gigabyte: what is resident beside the parameters stays within a few tensors."""

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
idle = peak()
model = jaxlm.load(sys.argv[1])
loaded = peak()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
model.save(sys.argv[2])
print(json.dumps({"parameters": size, "load": loaded - idle, "save": peak() - idle}))
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
def test_peak_is_the_parameters_and_little_more(tmp_path):
    from jaxlm.api import parameter_shapes
    from jaxlm.model import tensor_names
    from jaxlm.models.registry import family

    fam = family("llama")
    config = fam.config(CONFIG)
    size = sparse_checkpoint(tmp_path, tensor_names(fam, config, parameter_shapes(fam, config), ()))
    assert 0.9e9 < size < 1.1e9
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(tmp_path / "again")]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    assert report["parameters"] == size
    limit = 1.15 * size + 150e6
    assert report["load"] <= limit, report
    assert report["save"] <= limit, report
    assert (tmp_path / "again/model.safetensors").stat().st_size == (tmp_path / "model.safetensors").stat().st_size
