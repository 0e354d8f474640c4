"""Safetensors files: a strict reader that allocates only what is asked for, and a writer that streams tensor by tensor.

A file is an 8-byte little-endian header length, that much JSON (safetensors_header.py), and the tensors' bytes back to
back. Nothing is mapped into memory, so no page of a checkpoint stays resident; and the raw header is kept, so that a
file can be written back byte for byte.
"""

import contextlib
import functools
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoints import contiguous
from jaxlm.checkpoints.safetensors_header import make_header, parse_header, parse_json, some
from jaxlm.checkpoints.source import Box, TensorInfo

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000  # the safetensors package's own limit
_MAX_PROBLEMS = 50
_BLOCK = 16 << 20  # bytes copied at a time when an array to be written is not contiguous
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")


class SafetensorsSource:
    """A checkpoint directory (single or sharded), or one .safetensors file, opened for reading.

    The files stay open until `close`, so replacing the directory meanwhile does no harm. Raises one ValueError with
    everything that is wrong with the checkpoint; FileNotFoundError when there is none.
    """

    tensors: dict[str, TensorInfo]
    keeps_dtypes = True
    headers: dict[str, bytes]  # file name -> its JSON header, padding included
    index: bytes | None  # model.safetensors.index.json as it is on disk

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.tensors, self.headers, self.index = {}, {}, None
        self._files: dict[str, io.FileIO] = {}
        self._begins: dict[str, int] = {}  # tensor name -> its first byte in the file
        problems: list[str] = []
        try:
            directory, names, self.index = _locate(self.path)
            weight_map = None if self.index is None else _weight_map(self.index, problems)
            if weight_map is not None:
                names = sorted(set(weight_map.values()))
            places: dict[str, list[str]] = {}  # tensor name -> the files that hold it
            for name in names:
                problems += self._open(directory / name, places, weight_map)
            problems += [
                f"tensor {tensor!r} is in more than one file: {', '.join(files)}"
                for tensor, files in places.items()
                if len(files) > 1
            ]
            if weight_map is not None:
                problems += _compare(weight_map, places, self.headers)
            if problems:
                raise ValueError(_report(self.path, problems))
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path, places: dict[str, list[str]], weight_map: dict[str, str] | None) -> list[str]:
        """Opens one file and notes its tensors; returns its problems."""
        try:
            file = self._files[path.name] = open(path, "rb", buffering=0)  # noqa: SIM115 (open until close())
        except FileNotFoundError:
            if weight_map is None:
                raise
            wanted = [name for name, shard in weight_map.items() if shard == path.name]
            return [f"{path.name}: missing, but the index places {some(wanted)} there"]
        except OSError as e:
            return [f"{path.name}: cannot be opened: {e.strerror}"]
        raw, size, problem = _raw_header(file)
        if problem:
            return [f"{path.name}: {problem}"]
        start = 8 + len(raw)
        entries, _, problems = parse_header(raw, size - start)
        if not problems:
            self.headers[path.name] = raw
        for name, entry in entries.items():
            places.setdefault(name, []).append(path.name)
            if entry.dtype is not None:
                self.tensors[name] = TensorInfo(path.name, entry.dtype, entry.shape)
                self._begins[name] = start + entry.begin
        return [f"{path.name}: {problem}" for problem in problems]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or the range `rows` of its first axis (step 1, within bounds), in an array of its own."""
        fill = functools.partial(self._fill, name=name)
        return contiguous.read_rows(name, self.tensors[name], self._begins[name], rows, fill)

    def read_box(self, name: str, begin: int, shape: Sequence[int], box: Box) -> np.ndarray:
        """A box of the elements from `begin` on, seen as an array of `shape`; reads the box's bytes and no others."""
        fill = functools.partial(self._fill, name=name)
        return contiguous.read_box(name, self.tensors[name], self._begins[name], begin, shape, box, fill)

    def _fill(self, view: memoryview, begin: int, name: str) -> None:
        """Reads the bytes of a tensor's file from a place on."""
        file = self._files[self.tensors[name].file]
        while view.nbytes:
            count = os.preadv(file.fileno(), [view], begin)
            if count == 0:
                raise ValueError(
                    f"{self.tensors[name].file}: ends inside tensor {name!r}; the file has changed since it was opened"
                )
            view, begin = view[count:], begin + count

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "SafetensorsSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _locate(path: Path) -> tuple[Path, list[str], bytes | None]:
    """Where the checkpoint's files are: (directory, file names, raw index or None)."""
    if path.is_file():
        if path.suffix in _PICKLES:
            raise ValueError(pickle_message(path.parent, path.name))
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: not a .safetensors file")
        return path.parent, [path.name], None
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or directory")
    names = sorted(os.listdir(path))
    if INDEX in names:
        index = (path / INDEX).read_bytes()
        if SINGLE in names and SINGLE not in (_weight_map(index, []) or {}).values():
            raise ValueError(f"{path}: holds both {SINGLE} and {INDEX}, which does not name it; remove the stale one")
        return path, [], index
    if SINGLE in names:
        return path, [SINGLE], None
    if others := [name for name in names if name.endswith(".safetensors")]:
        if any("-of-" in name for name in others):
            raise FileNotFoundError(f"{path}: holds {some(others)}, but not {INDEX}, which says what is in which")
        raise FileNotFoundError(f"{path}: no {SINGLE}; it holds {some(others)}: name one of them to load it")
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise ValueError(pickle_message(path, some(pickles)))
    raise FileNotFoundError(f"{path}: no {SINGLE} or {INDEX}; the directory holds {some(names)}")


def pickle_message(directory: Path, what: str) -> str:
    return (
        f"{directory}: {what}: pickled PyTorch weights are not loaded, because unpickling can run any code; convert "
        "them once, where torch is installed: python -c 'from transformers import AutoModelForCausalLM as M; "
        f'M.from_pretrained("{directory}").save_pretrained("{directory}-safetensors")\''
    )


def _report(path: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{path}: {problems[0]}"
    shown = [f"\n  {problem}" for problem in problems[:_MAX_PROBLEMS]]
    more = f"\n  and {len(problems) - _MAX_PROBLEMS} more" if problems[_MAX_PROBLEMS:] else ""
    return f"{path}: {len(problems)} problems{''.join(shown)}{more}"


def _weight_map(index: bytes, problems: list[str]) -> dict[str, str] | None:
    """Tensor name -> shard, from the index file."""
    content = parse_json(index, INDEX, problems)
    if content is None:
        return None
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{INDEX}: weight_map should map tensor names to files")
        return None
    # A shard lies beside its index: a path that leads elsewhere is a mistake, or an attack.
    bad = {n: f for n, f in weight_map.items() if not isinstance(f, str) or f in ("", ".", "..") or "/" in f}
    problems += [f"{INDEX}: tensor {name!r} is placed in {file!r}, not a file name" for name, file in bad.items()]
    return {name: file for name, file in weight_map.items() if name not in bad}


def _compare(weight_map: dict[str, str], places: dict[str, list[str]], headers: Mapping[str, bytes]) -> Iterator[str]:
    """Where the index and the shards that could be read disagree."""
    for name, file in weight_map.items():
        held = places.get(name, [])
        if file in headers and file not in held:
            where = f"it is in {', '.join(held)}" if held else "no file holds it"
            yield f"{INDEX}: tensor {name!r} is placed in {file}, but {where}"
    for name, held in places.items():
        if name not in weight_map:
            yield f"{held[0]}: tensor {name!r} is not in {INDEX}"


def _raw_header(file: io.FileIO) -> tuple[bytes, int, str | None]:
    """(JSON header, size of the file, problem)."""
    size = os.fstat(file.fileno()).st_size
    start = os.pread(file.fileno(), 8, 0)
    if len(start) < 8:
        return b"", size, f"truncated: {size} bytes are too few for a safetensors file"
    length = int.from_bytes(start, "little")
    if length > _MAX_HEADER:
        return b"", size, f"not a safetensors file: a header of {length} bytes (at most {_MAX_HEADER} are allowed)"
    if length > size - 8:
        return b"", size, f"truncated: its header has {length} bytes, the whole file {size}"
    raw = os.pread(file.fileno(), length, 8)
    return raw, size, None if len(raw) == length else "truncated while its header was read"


def write_file(
    path: Path | None,
    header: Iterable[tuple[str, Any, Sequence[int]]],
    metadata: Mapping[str, str],
    read: Callable[[str], np.ndarray],
    raw_header: bytes | None = None,
    on_tensor: Callable[[int], None] | None = None,
) -> None:
    """Writes a new file of the (name, dtype, shape) tensors of `header`, holding one tensor at a time, and syncs it.

    With `raw_header`, which must describe the same tensors, that header is written verbatim and its order kept.
    `on_tensor` is told each tensor's bytes. ValueError if an array is not as the header says; OSError names the file.
    Without a path every tensor is read, in the same order, and nothing written: where several processes make each
    tensor together, that is what those do that do not write.
    """
    header = list(header)
    wanted = {name: (np.dtype(dtype), tuple(shape)) for name, dtype, shape in header}
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in wanted.values())
    raw = make_header(header, metadata) if raw_header is None else raw_header
    entries, _, problems = parse_header(raw, total)
    if problems or {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != wanted:
        raise ValueError(f"{path}: the header given describes other tensors{''.join(f'; {p}' for p in problems)}")
    order = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
    if path is None:
        for name in order:
            read(name)
        return
    with open(path, "xb", buffering=0) as file:
        _write(file, memoryview(len(raw).to_bytes(8, "little") + raw))
        for name in order:
            _write_tensor(file, name, read, *wanted[name])
            if on_tensor:
                on_tensor(entries[name].end - entries[name].begin)
        with _naming(path):
            os.fsync(file.fileno())


def _write_tensor(
    file: io.FileIO, name: str, read: Callable[[str], np.ndarray], dtype: np.dtype, shape: tuple[int, ...]
) -> None:
    # A function of its own, so that this array is gone before the next one is made.
    array = read(name)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"tensor {name!r} came as {array.dtype} {array.shape}; its header says {dtype} {shape}")
    if not array.size:
        return
    if array.flags.c_contiguous:
        _write(file, contiguous.as_bytes(array))
        return
    step = max(1, _BLOCK * len(array) // array.nbytes)  # rows at a time: no second copy of a whole transposed tensor
    for start in range(0, len(array), step):
        _write(file, contiguous.as_bytes(np.ascontiguousarray(array[start : start + step])))


def _write(file: io.FileIO, view: memoryview) -> None:
    with _naming(file.name):
        while view.nbytes:
            view = view[file.write(view) or 0 :]


@contextlib.contextmanager
def _naming(path: Any) -> Iterator[None]:
    """A full disk is reported with the file's name, which Python leaves out."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
