"""Tiny RWKV models of every version, random and without structure, in files; and what the `rwkv` package (0.8.32, the
author's own, Apache-2.0) computes of them. The shapes are those of the published .pth files."""

import dataclasses
import functools
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.models.cases import VOCAB as V

D, HEAD, F, L, LENGTH = 64, 32, 96, 3, 300
H = D // HEAD
# Some draws make of float32's rounding ten times what these do, in the package as well.
SEEDS = {"4": 40, "5.0": 50, "5.1": 59, "5.2": 64, "6": 60, "7": 70}
CONFIGS = {
    "4": {"model_type": "rwkv"},
    "5.0": {"model_type": "rwkv5", "model_version": "5_0", "head_size": HEAD},
    "5.1": {"model_type": "rwkv5", "model_version": "5_1", "head_size": HEAD},
    "5.2": {"model_type": "rwkv5_2", "head_size": HEAD},
    "6": {"model_type": "rwkv6", "head_size": HEAD, "time_mix_extra_dim": 8, "time_decay_extra_dim": 12},
    "7": {
        "model_type": "rwkv7", "head_dim": HEAD, "head_size_divisor": 8, "decay_low_rank_dim": 12, "a_low_rank_dim": 8,
        "v_low_rank_dim": 10, "gate_low_rank_dim": 20,
    },
}  # fmt: skip


def config(version: str) -> dict[str, Any]:
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "vocab_size": V}
    return CONFIGS[version] | sizes | {"rwkv_names": "blinkdl"}


def weights(version: str) -> dict[str, np.ndarray]:
    """Every tensor of a .pth file, float32: matrices that keep the size of what they multiply, decays from nearly one
    to nearly nothing, blends over all of 0 to 1."""
    rng = np.random.default_rng(SEEDS[version])
    out: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, size: float = 1.0) -> None:
        out[name] = size * rng.normal(size=(rows, columns)) / columns**0.5

    def norm(name: str, n: int = D) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = 1 + 0.3 * rng.normal(size=n), 0.3 * rng.normal(size=n)

    normal = lambda *shape: rng.normal(size=shape)
    matrix("emb.weight", V, D, 0.3)  # so small that the eps of the norms shows
    for i in range(L):
        block, att, ffn = f"blocks.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        for name in ("ln1", "ln2", *["ln0"] * (i == 0)):
            norm(block + name)
        for name in ("receptance", "key", "value", *["gate"] * (version in ("5.1", "5.2", "6"))):
            matrix(f"{att}{name}.weight", D, D)
        matrix(att + "output.weight", D, D)
        matrix(ffn + "key.weight", F, D, 1.5)
        matrix(ffn + "value.weight", D, F)
        if version != "7":
            matrix(ffn + "receptance.weight", D, D)
        if version != "4":
            norm(att + "ln_x")
        if version == "7":
            _seven(out, i, rng)
            continue
        kind = "maa" if version == "6" else "mix"
        mixes = {"4": "kvr", "5.0": "kvr", "6": "xwkvrg"}.get(version, "kvrg")
        for name in [f"{att}time_{kind}_{m}" for m in mixes] + [f"{ffn}time_{kind}_{m}" for m in "kr"]:
            out[name] = rng.uniform(size=(1, 1, D))
        decays = {"4": (D,), "5.0": (H,), "5.1": (H,), "5.2": (H, HEAD), "6": (1, 1, D)}[version]
        out[att + "time_decay"] = rng.uniform(-6, 1.5, size=decays)
        bonus = {"4": ("time_first", (D,)), "5.0": ("time_first", (H,)), "5.1": ("time_faaaa", (H,))}
        name, shape = bonus.get(version, ("time_faaaa", (H, HEAD)))
        out[att + name] = normal(*shape)
        if version == "6":
            out |= {f"{att}time_maa_w1": normal(D, 40) / 8, f"{att}time_maa_w2": normal(5, 8, D) / 8}
            out |= {f"{att}time_decay_w1": normal(D, 12) / 8, f"{att}time_decay_w2": normal(12, D) / 4}
    norm("ln_out")
    matrix("head.weight", V, D, 2.0)
    return {name: array.astype(np.float32) for name, array in out.items()}


def _seven(out: dict[str, np.ndarray], i: int, rng: np.random.Generator) -> None:
    att = f"blocks.{i}.att."
    for name in "rwkvag":
        out[f"{att}x_{name}"] = rng.uniform(size=(1, 1, D))
    for name, rank in (("w", 12), ("a", 8), ("v", 10), ("g", 20)):  # v of the first layer too: it is never used
        out[f"{att}{name}1"], out[f"{att}{name}2"] = rng.normal(size=(D, rank)) / 8, rng.normal(size=(rank, D)) / 2
        if name != "g":
            out[f"{att}{name}0"] = (3 if name == "w" else 1) * rng.normal(size=(1, 1, D))
    out[att + "k_k"], out[att + "k_a"] = 1 + 0.3 * rng.normal(size=(1, 1, D)), 1 + 0.3 * rng.normal(size=(1, 1, D))
    out[att + "r_k"] = rng.normal(size=(H, HEAD)) / HEAD**0.5
    out[f"blocks.{i}.ffn.x_k"] = rng.uniform(size=(1, 1, D))


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """tokens [LENGTH], what the package makes of them: logits [LENGTH, V], and the state after them as it keeps it."""

    directory: Path  # config.json and safetensors, by the names of the .pth file
    tokens: np.ndarray
    logits: np.ndarray
    state: list[np.ndarray]
    model: Any
    keep: Any  # owns the directory

    def generate(self, prompt: list[int], n: int) -> list[int]:
        """Greedily, a token at a time."""
        logits, state = self.model.forward(list(prompt), None)
        made = [int(logits.argmax())]
        while len(made) < n:
            logits, state = self.model.forward([made[-1]], state)
            made.append(int(logits.argmax()))
        return made


@functools.cache
def reference(version: str) -> Reference:
    keep = tempfile.TemporaryDirectory(prefix="jaxlm-rwkv-")
    directory, tensors = Path(keep.name), weights(version)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config(version)))
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, directory / "weights.pth")
    path = str(directory / "weights")
    model = package(version).RWKV(path, "cpu fp32", **({} if version == "7" else {"verbose": False}))
    tokens = np.random.default_rng(1).integers(0, V, LENGTH).astype(np.int32)
    logits, state = model.forward(tokens.tolist(), None, full_output=True)
    return Reference(directory, tokens, logits.numpy(), [s.numpy() for s in state], model, keep)


@functools.cache
def package(version: str) -> Any:
    """The package's module; version 7 is another class under the same name. Not compiled by torch: that takes longer
    than running does."""
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "1" if version == "7" else "0"}
    found = importlib.util.find_spec("rwkv")
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0]) / "model.py"
    spec = importlib.util.spec_from_file_location(f"rwkv_{version.replace('.', '_')}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    script = torch.jit.ScriptModule, torch.jit.script_method, torch.jit.script
    torch.jit.ScriptModule, torch.jit.script_method, torch.jit.script = torch.nn.Module, *[lambda f: f] * 2
    try:
        spec.loader.exec_module(module)
    finally:
        torch.jit.ScriptModule, torch.jit.script_method, torch.jit.script = script
    return module
