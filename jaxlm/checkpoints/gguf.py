"""GGUF, the file format of llama.cpp: the header parser, and a file presented under Hugging Face names.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's converter renames tensors and changes a
few of them (rows of q and k permuted, Gemma's norms stored as 1 + w, experts stacked, Conv1D transposed); a family's
`Gguf` table says which, and `GgufSource` undoes it, so that the rest of jaxlm only ever sees the original names.
"""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoints.gguf_header import Stored, parse
from jaxlm.checkpoints.source import Box, TensorInfo, box_of_rows


class GgufFile:
    """A GGUF file opened for reading: its metadata, the tensors it stores, and their values on demand.

    `metadata` holds plain Python values; arrays are lists of strings or numpy arrays. Raises ValueError naming the
    file and what is wrong with it (no GGUF, version 1, truncated, damaged, split over several files).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self.metadata, self.tensors = parse(self._fd, str(self.path))
        except BaseException:
            self.close()
            raise

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.value("general.architecture", str)

    def value(self, key: str, kind: type | tuple[type, ...] = object) -> Any:
        """A metadata value that must exist and be of a type."""
        if key not in self.metadata:
            raise ValueError(f"{self.path}: the metadata has no {key!r}")
        value = self.metadata[key]
        if not isinstance(value, kind):
            raise ValueError(f"{self.path}: metadata {key!r} has the unexpected value {_short(value)}")
        return value

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor under its GGUF name, or a range of its first axis; quantized types as float32."""
        if name not in self.tensors:
            raise ValueError(f"{self.path}: has no tensor {name!r}")
        stored = self.tensors[name]
        start, stop = _range(rows, stored.shape[0])
        if len(stored.shape) == 1:
            return self.lines(name, 0, 1)[0, start:stop].copy()
        inner = stored.lines // stored.shape[0]
        return self.lines(name, start * inner, stop * inner).reshape(stop - start, *stored.shape[1:])

    def lines(self, name: str, start: int, stop: int) -> np.ndarray:
        """A range of the tensor seen as [everything before the last axis, last axis], freshly allocated."""
        stored = self.tensors[name]
        if start == stop:  # gguf's decoders do not take empty arrays
            return np.empty((0, stored.shape[-1]), stored.type.dtype or np.float32)
        raw = np.empty((stop - start) * stored.line_bytes, np.uint8)
        self._fill(raw, stored.offset + start * stored.line_bytes, name)
        if stored.type.dtype is not None:
            return raw.view(stored.type.dtype).reshape(stop - start, stored.shape[-1])
        return self._dequantized(raw.reshape(stop - start, stored.line_bytes), name)

    def _dequantized(self, raw: np.ndarray, name: str) -> np.ndarray:
        # Only for its block decoders: gguf takes 0.2 s to import, and its reader seconds for a large vocabulary.
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        stored = self.tensors[name]
        try:
            values = dequantize(raw, GGMLQuantizationType[stored.type.name])
        except (NotImplementedError, KeyError) as error:
            kind = f"type {stored.type.name}, which the installed gguf package cannot dequantize"
            raise ValueError(f"{self.path}: tensor {name!r} is of {kind}") from error
        return np.ascontiguousarray(values, np.float32)

    def _fill(self, into: np.ndarray, offset: int, name: str) -> None:
        view, done = into.data, 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if not got:
                raise ValueError(f"{self.path}: ends at byte {offset + done}, inside tensor {name!r}")
            done += got

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """How one kind of tensor is stored: names with {layer} and {expert}, and what llama.cpp's converter did to it.

    A GGUF name without {expert} for a Hugging Face name with it is a stack of experts, [E, ...].
    """

    gguf: str
    hf: str
    heads: str | None = None  # rows permuted for interleaved RoPE, over this many heads (a metadata key)
    offset: float = 0.0  # Hugging Face's value = stored value + offset
    transpose: bool = False
    half: int | None = None  # the first or second half of axis -2 (gate and up stacked)
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A family's side of GGUF: its tensors, and its config.json rebuilt from the metadata."""

    arch: str  # general.architecture
    tensors: tuple[GgufTensor, ...]
    config: Callable[[GgufFile], dict[str, Any]]
    applies: Callable[[Mapping[str, Any]], bool] = lambda metadata: True  # of several families with one `arch`
    in_config: tuple[str, ...] = ()  # tensors that `config` reads, which have no Hugging Face counterpart


def select(file: GgufFile, tables: Iterable[Gguf]) -> Gguf:
    """The table for a file, by its architecture."""
    tables = list(tables)
    for table in tables:
        if table.arch == file.architecture and table.applies(file.metadata):
            return table
    known = ", ".join(sorted({table.arch for table in tables}))
    raise ValueError(f"{file.path}: GGUF architecture {file.architecture!r} is not supported; supported: {known}")


class GgufSource:
    """The `Source` of a GGUF file: its tensors under Hugging Face names, dequantized as they are read."""

    def __init__(self, file: GgufFile, table: Gguf):
        self.file, self.table = file, table
        self._origin = _resolve(file, table)
        self.tensors = {hf: self._info(*origin) for hf, origin in self._origin.items()}

    def _info(self, name: str, rule: GgufTensor, expert: int | None) -> TensorInfo:
        stored = self.file.tensors[name]
        shape = stored.shape if expert is None else stored.shape[1:]
        if rule.half is not None:
            shape = (*shape[:-2], shape[-2] // 2, shape[-1])
        shape = shape[::-1] if rule.transpose else shape
        return TensorInfo(self.file.path.name, np.dtype(stored.type.dtype or np.float32), shape)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or a contiguous range of its first axis; only the lines it needs are read and dequantized."""
        if name not in self._origin:
            raise ValueError(f"{self.file.path}: has no tensor for {name!r}")
        stored_name, rule, expert = self._origin[name]
        shape = self.tensors[name].shape
        start, stop = _range(rows, shape[0])
        if rule.transpose:
            return np.ascontiguousarray(self.file.read(stored_name).T[start:stop])
        if rule.heads is not None:
            values = self._unpermuted(stored_name, rule.heads, start, stop)
        elif expert is not None or rule.half is not None:
            first = self._first_line(stored_name, rule, expert)
            inner = int(np.prod(shape[1:-1]))
            values = self.file.lines(stored_name, first + start * inner, first + stop * inner)
            values = values.reshape(stop - start, *shape[1:])
        else:
            values = self.file.read(stored_name, slice(start, stop))
        if rule.offset:
            values = (values.astype(np.float32) + np.float32(rule.offset)).astype(values.dtype)
        return values

    def read_box(self, name: str, begin: int, shape: Sequence[int], box: Box) -> np.ndarray:
        """A box of the tensor's elements; whole rows are dequantized."""
        return box_of_rows(self, name, begin, shape, box)

    def _first_line(self, name: str, rule: GgufTensor, expert: int | None) -> int:
        stored = self.file.tensors[name]
        first = 0 if expert is None else expert * (stored.lines // stored.shape[0])
        return first + (rule.half or 0) * stored.shape[-2] // 2

    def _unpermuted(self, name: str, heads: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of q or k: each head's rows are stored as pairs (i, i + H/2) of the original."""
        size = self.file.tensors[name].shape[0]
        n_heads = _heads(self.file, heads)
        if size % (2 * n_heads):
            raise ValueError(f"{self.file.path}: tensor {name!r} has {size} rows, which {n_heads} heads do not divide")
        head = size // n_heads
        begin = start // head * head
        values = self.file.read(name, slice(begin, -(-stop // head) * head))
        values = values.reshape(-1, head // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        return np.ascontiguousarray(values[start - begin : stop - begin])

    def close(self) -> None:
        self.file.close()


def _heads(file: GgufFile, key: str) -> int:
    """The head count under a key; without one for keys and values, they have as many as the queries."""
    prefix = f"{file.architecture}."
    if prefix + key not in file.metadata:
        key = key.removesuffix("_kv")
    value = file.value(prefix + key)
    if isinstance(value, np.ndarray) and len(set(value.tolist())) == 1:  # one per layer
        value = int(value[0])
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{file.path}: metadata {prefix + key!r} must be one positive number, got {_short(value)}")
    return value


def _count(file: GgufFile, key: str, most: int, default: int | None = None) -> int:
    """A number of layers or experts, which a damaged file must not make us count to."""
    key = f"{file.architecture}.{key}"
    value = default if default is not None and key not in file.metadata else file.value(key, int)
    if not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{file.path}: metadata {key!r} is {value}, which {len(file.tensors)} tensors cannot be")
    return value


def _resolve(file: GgufFile, table: Gguf) -> dict[str, tuple[str, GgufTensor, int | None]]:
    """For each Hugging Face name: the stored tensor, its rule, and which expert of a stack. Strict both ways."""
    layers, experts = (
        range(_count(file, "block_count", len(file.tensors))),
        range(_count(file, "expert_count", 2**16, 0)),
    )
    origin: dict[str, tuple[str, GgufTensor, int | None]] = {}
    used, problems = set(table.in_config), []
    wanted: dict[str, tuple[str, bool]] = {}  # Hugging Face name -> (first GGUF name it may have, required)
    for rule in table.tensors:
        stacked = "{expert}" in rule.hf and "{expert}" not in rule.gguf
        axes = [layers if "{layer}" in rule.hf else (None,), experts if "{expert}" in rule.hf else (None,)]
        for layer, expert in itertools.product(*axes):
            name, hf = rule.gguf.format(layer=layer, expert=expert), rule.hf.format(layer=layer, expert=expert)
            wanted.setdefault(hf, (name, not rule.optional))
            if name not in file.tensors:
                continue
            used.add(name)
            if hf in origin:
                problems.append(f"tensors {origin[hf][0]!r} and {name!r} are both {hf!r}")
            origin[hf] = (name, rule, expert if stacked else None)
            problems += _misfits(file.tensors[name], name, rule, len(experts) if stacked else None)
    problems = list(dict.fromkeys(problems))
    missing = dict.fromkeys(name for hf, (name, required) in wanted.items() if required and hf not in origin)
    if missing:
        problems.append(f"missing {_names(missing)}")
    if unexpected := [name for name in file.tensors if name not in used]:
        problems.append(f"unexpected {_names(unexpected)}")
    if problems:
        raise ValueError(f"{file.path}: does not fit GGUF architecture {table.arch!r}: {'; '.join(problems)}")
    return origin


def _misfits(stored: Stored, name: str, rule: GgufTensor, experts: int | None) -> list[str]:
    """What is wrong with a tensor's rank or type for what its rule does to it."""
    rank = (experts is not None) + (rule.half is not None or rule.transpose)
    if len(stored.shape) < rank + 1 or (rule.transpose and len(stored.shape) != 2):
        return [f"tensor {name!r} has shape {list(stored.shape)}"]
    if experts is not None and stored.shape[0] != experts:
        return [f"tensor {name!r} has shape {list(stored.shape)}, but the metadata states {experts} experts"]
    if rule.half is not None and stored.shape[-2] % 2:
        return [f"tensor {name!r} has an odd number of rows, {stored.shape[-2]}, for gate and up"]
    if stored.type.dtype is not None and stored.type.dtype.kind in "iu":
        return [f"tensor {name!r} holds integers ({stored.type.name})"]
    return []


def _range(rows: slice, size: int) -> tuple[int, int]:
    start, stop, step = rows.indices(size)
    if step != 1:
        raise ValueError(f"rows must be contiguous, got {rows}")
    return start, max(start, stop)


def _names(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"tensor{'s' * (len(names) > 1)} " + ", ".join(map(repr, names[:most])) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
