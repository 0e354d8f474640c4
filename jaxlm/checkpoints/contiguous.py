"""Slices of a tensor that lies back to back in a file: their bytes are read, and no others."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.checkpoints.source import Box, TensorInfo

Fill = Callable[[memoryview, int], None]  # reads the bytes of a file from a place on; all of them, or it raises


def read_rows(name: str, info: TensorInfo, begin: int, rows: slice, fill: Fill) -> np.ndarray:
    """The tensor that begins at byte `begin`, or the range `rows` of its first axis, in an array of its own."""
    start, stop = row_range(name, info.shape, rows)
    shape = info.shape
    if rows != slice(None):
        begin += start * math.prod(shape[1:]) * info.dtype.itemsize
        shape = (stop - start, *shape[1:])
    array = np.empty(shape, info.dtype)
    fill(as_bytes(array), begin)
    return array


def read_box(
    name: str, info: TensorInfo, begin: int, first: int, shape: Sequence[int], box: Box, fill: Fill
) -> np.ndarray:
    """A box of the elements from `first` on, seen as an array of `shape` (`Source.read_box`)."""
    if first + math.prod(shape) > math.prod(info.shape) or not _within(box, shape):
        raise ValueError(f"tensor {name!r} of shape {info.shape} has no box {box} of {shape} from element {first}")
    array = np.empty([stop - start for start, stop in box], info.dtype)
    view, size, done = as_bytes(array), info.dtype.itemsize, 0
    starts, run = _runs(shape, box)
    for start in (begin + (starts + first) * size).tolist():
        fill(view[done : done + run * size], start)
        done += run * size
    return array


def as_bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, which has no buffer protocol of its own in bfloat16."""
    return array.reshape(-1).view(np.uint8).data


def row_range(name: str, shape: tuple[int, ...], rows: slice) -> tuple[int, int]:
    """The range's bounds. Python would clamp a range that is out of bounds; a short read must not pass unnoticed."""
    if not shape:
        if rows == slice(None):
            return 0, 0
        raise ValueError(f"tensor {name!r} is a scalar: it has no rows {rows}")
    start = 0 if rows.start is None else rows.start
    stop = shape[0] if rows.stop is None else rows.stop
    if rows.step not in (None, 1) or not 0 <= start <= stop <= shape[0]:
        raise ValueError(f"tensor {name!r} has {shape[0]} rows: {rows} is not a contiguous range of them")
    return start, stop


def _within(box: Box, shape: Sequence[int]) -> bool:
    return len(box) == len(shape) and all(0 <= a <= b <= size for (a, b), size in zip(box, shape, strict=True))


def _runs(shape: Sequence[int], box: Box) -> tuple[np.ndarray, int]:
    """The elements at which the contiguous runs of a box begin, in order, and how many elements each has."""
    outer = len(shape)
    while outer and box[outer - 1] == (0, shape[outer - 1]):
        outer -= 1
    strides = [math.prod(shape[i + 1 :]) for i in range(outer)]
    first, run = 0, math.prod(shape)
    if outer:  # the last axis that is cut is contiguous within the runs
        start, stop = box[outer - 1]
        first, run = start * strides[-1], (stop - start) * strides[-1]
    starts = np.array([first], np.int64)
    for (start, stop), stride in zip(box[: max(0, outer - 1)], strides, strict=False):
        starts = (starts[:, None] + np.arange(start, stop, dtype=np.int64) * stride).reshape(-1)
    return starts, run
