"""What a loader needs of a checkpoint on disk: every tensor under its Hugging Face name, and a way to read it."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np


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

    def close(self) -> None: ...
