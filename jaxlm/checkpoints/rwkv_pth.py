"""The config.json that BlinkDL's RWKV .pth files lack, from the names and shapes of their tensors.

The version is told as model.py of the package `rwkv` (0.8.32) tells it; the keys are those of models/rwkv_config.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.checkpoints.pth import PthSource
from jaxlm.checkpoints.safetensors import pickle_message
from jaxlm.checkpoints.source import TensorInfo

MODEL_TYPES = ("rwkv", "rwkv5", "rwkv5_2", "rwkv6", "rwkv7")
_DIVISOR = 8  # the group norm's eps is 1e-5 times its square; model.py has 64e-5 in every version
_LAYER = re.compile(r"blocks\.(\d+)\.")
_NEEDED = ("emb.weight", "head.weight", "blocks.0.att.key.weight", "blocks.0.ffn.key.weight")


def beside(directory: Path, config: bool) -> Path | None:
    """The pickled file with the weights of an RWKV directory; None where there is none, or safetensors are there too.

    That is a .pth file; where there is a config.json (which says how to read it), pytorch_model.bin as well.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    if any(path.suffix == ".safetensors" for path in files):
        return None
    found = [path for path in files if path.suffix == ".pth"]
    found = found or [path for path in files if config and path.name == "pytorch_model.bin"]
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise ValueError(f"{directory}: holds {len(found)} .pth files ({names} ...): name one of them to load it")
    return found[0] if found else None


def read_config(path: Path) -> dict[str, Any]:
    """The config of a .pth file; one that is not RWKV's is a ValueError that says what to do with it."""
    with PthSource(path) as source:
        if missing := [name for name in _NEEDED if name not in source.tensors]:
            raise ValueError(
                f"{pickle_message(path.parent, path.name)} (only RWKV's .pth files are read as they are, and this one "
                f"has no tensor {missing[0]!r})"
            )
        return config(source.tensors, str(path))


def config(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, Any]:
    """config.json for the tensors of a .pth file; ValueError for shapes that no RWKV has."""
    block = _Block(tensors, where)
    vocab_size, width = block.shape("emb.weight")
    made: dict[str, Any] = {
        "rwkv_names": "blinkdl",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(found[1]) for name in tensors if (found := _LAYER.match(name))),
        "intermediate_size": block.shape("blocks.0.ffn.key.weight")[0],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": tensors["emb.weight"].dtype.name,
    }
    if "blocks.0.att.r_k" in tensors:
        return {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], **made, **_seven(block)}
    made["attention_hidden_size"] = block.shape("blocks.0.att.key.weight")[0]
    version = _version(tensors)
    if version == 4:
        return {"model_type": "rwkv", **made}
    made["head_size_divisor"] = _DIVISOR
    if version == 6:
        return {"model_type": "rwkv6", **made, **_six(block)}
    bonus = "time_faaaa" if "blocks.0.att.time_faaaa" in tensors else "time_first"
    heads = block.shape("blocks.0.att.time_decay", 1)[0]
    made |= {"head_size": block.divided(made["attention_hidden_size"], heads), "rwkv_bonus": bonus}
    if version == 5.2:
        return {"model_type": "rwkv5_2", **made}
    return {"model_type": "rwkv5", "model_version": {5: "5_0", 5.1: "5_1"}[version], **made}


def _version(tensors: Mapping[str, TensorInfo]) -> float:
    """4, 5, 5.1, 5.2 or 6: the most that a name or a shape speaks for."""
    version = 4.0
    if any("ln_x" in name for name in tensors):
        version = 5.0
    if any("gate.weight" in name for name in tensors):
        version = 5.1
    decays = [info.shape for name, info in tensors.items() if "att.time_decay" in name]
    if version >= 5 and any(len(shape) > 1 and shape[1] > 1 for shape in decays):
        version = 5.2
    return 6.0 if any("time_maa" in name for name in tensors) else version


class _Block:
    """The shapes of the tensors of a layer, with an error where one is not there."""

    def __init__(self, tensors: Mapping[str, TensorInfo], where: str):
        self.tensors, self.where = tensors, where

    def shape(self, name: str, rank: int = 2) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"{self.where}: has no tensor {name!r}, from whose shape the config would follow")
        shape = self.tensors[name].shape
        if len(shape) < rank or 0 in shape:
            raise ValueError(
                f"{self.where}: tensor {name!r} has the shape {list(shape)}, expected {rank} sizes above 0"
            )
        return shape

    def divided(self, width: int, heads: int) -> int:
        if width % heads:
            raise ValueError(f"{self.where}: {heads} heads do not divide the width of the time mixing, {width}")
        return width // heads


def _six(block: _Block) -> dict[str, Any]:
    return {
        "head_size": block.shape("blocks.0.att.time_faaaa")[1],
        "time_mix_extra_dim": block.shape("blocks.0.att.time_maa_w1")[1] // 5,  # of w, k, v, r and g, side by side
        "time_decay_extra_dim": block.shape("blocks.0.att.time_decay_w1")[1],
    }


def _seven(block: _Block) -> dict[str, Any]:
    ranks = {"decay": "w1", "a": "a1", "v": "v1", "gate": "g1"}
    # The first layer gives its values to the others: it has no v1, or one that nothing reads; a single layer, too.
    layers = {"v": 1 if "blocks.1.att.r_k" in block.tensors else 0}
    made: dict[str, Any] = {"head_dim": block.shape("blocks.0.att.r_k")[1], "head_size_divisor": _DIVISOR}
    for rank, name in ranks.items():
        tensor = f"blocks.{layers.get(rank, 0)}.att.{name}"
        if tensor in block.tensors or tensor != "blocks.0.att.v1":
            made[f"{rank}_low_rank_dim"] = block.shape(tensor)[1]
    return made
