"""A training run's checkpoint as a source: its parameters under their Hugging Face names, read a slice at a time.

orbax keeps every leaf of the state as an array of its own in one OCDBT store, which tensorstore reads
(https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html); `train.checkpoint` writes stacks a
layer at a time, so that one layer can be read alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoints.load import Names
from jaxlm.checkpoints.source import Box, Source, TensorInfo, box_of_rows

SETTINGS = "config.yaml"
CHECKPOINTS, STATE = "checkpoints", "state"  # run directory / CHECKPOINTS / step / STATE


class Leaf:
    """An array of a store; indexing reads just that."""

    def __init__(self, array: Any):
        self._array = array
        self.shape, self.dtype = tuple(array.shape), np.dtype(array.dtype.numpy_dtype)

    def __getitem__(self, index: tuple[int, ...]) -> np.ndarray:
        return self._array[index].read().result()


def steps(run: Path) -> list[int]:
    """The steps of which a run has complete checkpoints; orbax writes under another name until one is whole."""
    found = (run / CHECKPOINTS).glob(f"*/{STATE}")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def leaves(state: Path) -> dict[str, Leaf]:
    """{path: array} of the parameters that trained: "params/layers/attn/q/w", and an adapter's."""
    import tensorstore

    about = json.loads((state / "_METADATA").read_text(encoding="utf-8"))
    driver = "zarr3" if about.get("use_zarr3") else "zarr"
    found = {}
    for entry in about["tree_metadata"].values():
        keys = [str(part["key"]) for part in entry["key_metadata"]]
        if keys[0] == "trainable" and entry["value_metadata"]["value_type"] != "None":
            store = {"driver": "ocdbt", "base": f"file://{state.absolute()}/", "path": ".".join(keys) + "/"}
            spec = {"driver": driver, "kvstore": store}
            found["/".join(keys[1:])] = Leaf(tensorstore.open(spec, read=True, open=True).result())
    return found


class RunSource:
    """The tensors of a run at one step. frozen: the source of those that did not train."""

    def __init__(self, state: Path, names: Names, frozen: Source | None):
        self.names, self.frozen = names, frozen
        self.leaves = {
            path.removeprefix("params/"): leaf for path, leaf in leaves(state).items() if path.startswith("params/")
        }
        self.tensors: dict[str, TensorInfo] = {}
        for name, binding in names.bindings.items():
            have = [path in self.leaves for path in binding.paths]
            if all(have):
                dtype = self.leaves[binding.paths[0]].dtype
                self.tensors[name] = TensorInfo(str(state.parent), dtype, binding.stored_shape)
            elif any(have):
                raise ValueError(f"{state}: {name} is {', '.join(binding.paths)}, of which only some trained")
            elif frozen is not None and name in frozen.tensors:
                self.tensors[name] = frozen.tensors[name]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or a range of its rows; of a stack only this tensor's element is read."""
        binding = self.names.bindings[name]
        if binding.paths[0] not in self.leaves:
            assert self.frozen is not None
            return self.frozen.read(name, rows)
        return binding.rule.join([self.leaves[path][binding.index] for path in binding.paths])[rows]

    def read_box(self, name: str, begin: int, shape: Sequence[int], box: Box) -> np.ndarray:
        """A box of the tensor's elements; the tensor is read whole."""
        return box_of_rows(self, name, begin, shape, box)

    def close(self) -> None:
        if self.frozen is not None:
            self.frozen.close()


def shard_axes(path: str) -> tuple[int, ...]:
    """The axes along which a parameter is a stack of tensors: a checkpoint keeps each of those by itself."""
    keys = path.split("/")
    return tuple(range(sum(key in keys for key in ("layers", "experts"))))


def settings(run: Path) -> dict[str, Any]:
    """The settings of a run; ValueError when its checkpoints are not a model by themselves."""
    import yaml

    found = yaml.safe_load((run / SETTINGS).read_text(encoding="utf-8"))
    if found.get("adapter"):
        raise ValueError(f"{run} trained an adapter, and its checkpoints hold nothing else: see `model` in it")
    if found["trainable"] != ["*"] and str(found["model"]).endswith(".json"):
        raise ValueError(f"{run} trained a part of a model that began from scratch: the whole is in its `model` alone")
    return found
