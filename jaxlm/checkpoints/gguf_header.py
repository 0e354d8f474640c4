"""The header of a GGUF file, version 2 or 3: metadata and where each tensor lies.

Written for speed on large vocabularies: a string array costs one pass over its lengths and one decoding of the whole.
"""

import dataclasses
import math
import mmap
import struct
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class GgmlType:
    """A storage type: `size` bytes for every `block` values; `dtype` is None for quantized blocks."""

    id: int
    name: str
    block: int
    size: int
    dtype: np.dtype | None = None


def _types() -> dict[int, GgmlType]:
    plain = [(0, "F32", "<f4"), (1, "F16", "<f2"), (24, "I8", "<i1"), (25, "I16", "<i2"), (26, "I32", "<i4"),
             (27, "I64", "<i8"), (28, "F64", "<f8"), (30, "BF16", ml_dtypes.bfloat16)]  # fmt: skip
    blocks = [(2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34),
              (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144),
              (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66),
              (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18),
              (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (29, "IQ1_M", 256, 56),
              (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36),
              (41, "Q1_0", 128, 18)]  # fmt: skip
    types = [GgmlType(id, name, 1, np.dtype(kind).itemsize, np.dtype(kind)) for id, name, kind in plain]
    return {t.id: t for t in types + [GgmlType(*block) for block in blocks]}


TYPES = _types()

# Metadata value types: struct format of the scalars; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in the file: `shape` in row-major order, `offset` from the start of the file."""

    type: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def lines(self) -> int:
        """Number of runs along the last axis; quantized blocks never cross one."""
        return math.prod(self.shape[:-1])

    @property
    def line_bytes(self) -> int:
        return self.shape[-1] // self.type.block * self.type.size


class _Cursor:
    """Reads values one after the other; past the end of the file it raises, saying what it was reading."""

    def __init__(self, data: mmap.mmap, file: str):
        self.data, self.file, self.at, self.what = data, file, 0, "header"

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.file}: {problem}")

    def truncated(self) -> ValueError:
        return self.error(f"truncated: the {len(self.data)} bytes end inside the {self.what}")

    def unpack(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + form)
        if self.at + size > len(self.data):
            raise self.truncated()
        values = struct.unpack_from("<" + form, self.data, self.at)
        self.at += size
        return values

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.truncated()
        self.at += size
        return self.data[self.at - size : self.at]

    def string(self) -> str:
        raw = self.take(*self.unpack("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"the {self.what} is not UTF-8: {raw[:40]!r}") from None

    def strings(self, count: int) -> list[str]:
        data, at, parts = self.data, self.at, []
        length = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + length(data, at)[0]
                parts.append(data[begin:at])
        except (struct.error, OverflowError, ValueError):
            raise self.truncated() from None
        if at > len(data):
            raise self.truncated()
        self.at = at
        try:
            # One decoding for all of them; NUL separates, unless some string contains it.
            texts = b"\0".join(parts).decode("utf-8").split("\0") if parts else []
            return texts if len(texts) == count else [part.decode("utf-8") for part in parts]
        except UnicodeDecodeError:
            bad = next(i for i, part in enumerate(parts) if not _is_utf8(part))
            raise self.error(f"entry {bad} of the {self.what} is not UTF-8: {parts[bad][:40]!r}") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error(f"the {self.what} is of the unknown type {kind}")
        item, count = self.unpack("IQ")
        if count > len(self.data) - self.at:  # every item takes a byte at least
            raise self.truncated()
        if item == _STRING:
            return self.strings(count)
        if item not in _SCALARS:
            raise self.error(f"the {self.what} is an array of the unsupported type {item}")
        dtype = np.dtype("<" + _SCALARS[item])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).copy()


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def parse(fd: int, file: str) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata and tensors of an open file; `file` is its name in errors."""
    try:
        # Mapped rather than read, because its length is known only at its end; unmapped again before returning.
        data = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise ValueError(f"{file}: is empty") from None
    with data:
        cursor = _Cursor(data, file)
        if (magic := data[:4]) != b"GGUF":
            raise cursor.error(f"is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        cursor.at, cursor.what = 4, "header"
        _check_version(cursor, *cursor.unpack("I"))
        n_tensors, n_entries = cursor.unpack("QQ")
        metadata = _metadata(cursor, n_entries)
        return metadata, _tensors(cursor, n_tensors, metadata)


def _check_version(cursor: _Cursor, version: int) -> None:
    if version in (2, 3):
        return
    if version == 1:
        raise cursor.error("is GGUF version 1 of 2023, which is not supported; convert it again with llama.cpp")
    if version in (2 << 24, 3 << 24):
        raise cursor.error("is a big-endian GGUF file, which is not supported")
    raise cursor.error(f"is GGUF version {version}; versions 2 and 3 are supported")


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        cursor.what = f"key of metadata entry {i}"
        key = cursor.string()
        cursor.what = f"metadata {key!r}"
        value = cursor.value(*cursor.unpack("I"))
        if key in metadata:
            raise cursor.error(f"{cursor.what} is there twice")
        metadata[key] = value
    if metadata.get("split.count", 0) > 1:
        raise cursor.error(
            f"is part {metadata.get('split.no', 0) + 1} of {metadata['split.count']} of a split model; "
            "join the parts with llama.cpp's llama-gguf-split --merge"
        )
    return metadata


def _tensors(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, Stored]:
    tensors: dict[str, Stored] = {}
    for i in range(count):
        cursor.what = f"name of tensor {i}"
        name = cursor.string()
        cursor.what = f"description of tensor {name!r}"
        (rank,) = cursor.unpack("I")
        if not 1 <= rank <= 4:
            raise cursor.error(f"tensor {name!r} has {rank} dimensions; 1 to 4 are possible")
        shape = cursor.unpack(f"{rank}Q")[::-1]
        kind, offset = cursor.unpack("IQ")
        if kind not in TYPES:
            raise cursor.error(f"tensor {name!r} is of the unknown type {kind}")
        if 0 in shape or shape[-1] % TYPES[kind].block:
            raise cursor.error(f"tensor {name!r} of type {TYPES[kind].name} has the impossible shape {list(shape)}")
        if name in tensors:
            raise cursor.error(f"tensor {name!r} is there twice")
        tensors[name] = Stored(TYPES[kind], shape, offset)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.error(f"metadata 'general.alignment' must be a power of two, got {alignment!r}")
    return _placed(cursor, tensors, alignment)


def _placed(cursor: _Cursor, tensors: dict[str, Stored], alignment: int) -> dict[str, Stored]:
    """The tensors with offsets from the start of the file, checked to lie in it without overlapping."""
    base = -(-cursor.at // alignment) * alignment
    end, before = 0, ""
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].offset):
        if stored.offset < end or stored.offset % alignment:
            where = f"is not aligned to {alignment} bytes" if stored.offset % alignment else f"overlaps {before!r}"
            raise cursor.error(f"tensor {name!r} at data offset {stored.offset} {where}")
        end, before = stored.offset + stored.lines * stored.line_bytes, name
        if base + end > len(cursor.data):
            raise cursor.error(
                f"truncated: tensor {name!r} needs bytes up to {base + end}, the file has {len(cursor.data)}"
            )
    return {name: dataclasses.replace(stored, offset=base + stored.offset) for name, stored in tensors.items()}
