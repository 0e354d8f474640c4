"""What a loader needs of a checkpoint on disk: every tensor under its Hugging Face name, and a way to read it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

Box = tuple[tuple[int, int], ...]  # (start, stop) along every axis


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: the file of the checkpoint that holds it, its dtype (numpy or ml_dtypes) and its shape."""

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]


class Source(Protocol):
    """A checkpoint opened for reading; nothing but headers is in memory until `read`."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or a contiguous range of its first axis, freshly allocated (never a view of mapped pages)."""
        ...

    def read_box(self, name: str, begin: int, shape: Sequence[int], box: Box) -> np.ndarray:
        """A box of the elements from `begin` on, seen as an array of `shape` that cuts the tensor's axes further."""
        ...

    def close(self) -> None: ...


def box_of_rows(source: Source, name: str, begin: int, shape: Sequence[int], box: Box) -> np.ndarray:
    """`read_box` for a source that reads rows: those that hold the box, and of them the box."""
    row = math.prod(source.tensors[name].shape[1:])
    step = math.prod(shape[1:])
    (start, stop), *inner = box
    first, last = begin + start * step, begin + stop * step
    values = source.read(name, slice(first // row, last // row)).reshape(stop - start, *shape[1:])
    return np.ascontiguousarray(values[(slice(None), *(slice(*one) for one in inner))])
