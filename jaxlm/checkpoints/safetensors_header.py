"""The JSON header of a safetensors file: parsed strictly, and made as the safetensors package makes it.

{name: {dtype, shape, data_offsets}}, where the offsets count from the end of the header, and `__metadata__`, a map of
text to text (https://github.com/huggingface/safetensors, "Format").
"""

import collections
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

# In the order in which the safetensors package lays tensors out: widest first, so that every tensor is aligned.
DTYPES: dict[str, np.dtype] = {
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F32": np.dtype("<f4"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a header; `begin` and `end` count from the end of the header. `dtype` is None if unsupported."""

    dtype: np.dtype | None
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json(raw: bytes, what: str, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object in `raw`; what is wrong with it, a key given twice included, goes to `problems`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(items)
        if len(content) < len(items):
            counts = collections.Counter(key for key, _ in items)
            problems.extend(f"{what} has the key {key!r} {count} times" for key, count in counts.items() if count > 1)
        return content

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs)
    except UnicodeDecodeError as e:
        problems.append(f"{what} is not UTF-8 text (byte {e.start})")
    except (ValueError, RecursionError) as e:
        problems.append(f"{what} is not valid JSON: {e}")
    else:
        if isinstance(content, dict):
            return content
        problems.append(f"{what} is not a JSON object but {type(content).__name__}")
    return None


def parse_header(raw: bytes, data_bytes: int) -> tuple[dict[str, Entry], dict[str, str], list[str]]:
    """(entries, metadata, problems) of a JSON header that `data_bytes` bytes of tensors follow."""
    problems: list[str] = []
    content = parse_json(raw, "the header", problems)
    if content is None:
        return {}, {}, problems
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(f"__metadata__ should map names to text, not {metadata!r:.80}")
        metadata = {}
    entries: dict[str, Entry] = {}
    unsupported: dict[str, list[str]] = {}
    for name, spec in content.items():
        problem = _spec_problem(spec)
        if problem:
            problems.append(f"tensor {name!r}: {problem}")
            continue
        dtype, (begin, end) = DTYPES.get(spec["dtype"]), spec["data_offsets"]
        entries[name] = Entry(dtype, tuple(spec["shape"]), begin, end)
        if dtype is None:
            unsupported.setdefault(spec["dtype"], []).append(name)
        elif end - begin != math.prod(spec["shape"]) * dtype.itemsize:
            expected = math.prod(spec["shape"]) * dtype.itemsize
            problems.append(
                f"tensor {name!r} has {end - begin} bytes; {spec['dtype']} {spec['shape']} needs {expected}"
            )
    problems += [_unsupported(code, names) for code, names in unsupported.items()]
    if len(entries) == len(content):  # otherwise the unreadable entries would show as holes
        problems += _layout(entries, data_bytes)
    return entries, metadata, problems


def _spec_problem(spec: Any) -> str | None:
    """What is wrong with the form of one entry of a header."""
    if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"}:
        return f"should have exactly dtype, shape and data_offsets, not {spec!r:.120}"
    dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(dtype, str):
        return f"dtype should be text, not {dtype!r:.80}"
    # type() rather than isinstance: true is no size. numpy refuses more than 2**63 bytes even when a size is 0.
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        return f"shape should be a list of sizes, not {shape!r:.80}"
    if math.prod(max(n, 1) for n in shape) >= 2**59:
        return f"shape {shape!r:.80} is impossibly large"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        return f"data_offsets should be two numbers, not {offsets!r:.80}"
    if not 0 <= offsets[0] <= offsets[1]:
        return f"data_offsets {offsets!r:.80} are not a range of bytes"
    return None


def _unsupported(code: str, names: list[str]) -> str:
    if code.startswith(("F8_", "F6_", "F4")):
        return f"{code} is not supported until quantized import lands: {some(names)}"
    return f"unknown dtype {code!r} (known: {', '.join(DTYPES)}): {some(names)}"


def _layout(entries: dict[str, Entry], data_bytes: int) -> Iterator[str]:
    """Every byte after the header must belong to exactly one tensor."""
    position, previous = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin > position:
            yield f"bytes {position} to {entry.begin}, before tensor {name!r}, belong to no tensor"
        elif entry.begin < position:
            yield f"tensor {name!r} begins at byte {entry.begin}, inside tensor {previous!r}, which ends at {position}"
        if entry.end > position:
            position, previous = entry.end, name
    if data_bytes < position:
        yield f"truncated: the header describes {position} bytes of tensors, the file holds {data_bytes}"
    elif data_bytes > position:
        yield f"the last {data_bytes - position} bytes belong to no tensor"


def dtype_code(name: str, dtype: Any) -> str:
    """The name that safetensors has for a dtype; ValueError, naming the tensor, if it has none."""
    code = _CODES.get(np.dtype(dtype))
    if code is None:
        raise ValueError(f"tensor {name!r}: dtype {np.dtype(dtype)} cannot be written (known: {', '.join(DTYPES)})")
    return code


def make_header(header: Iterable[tuple[str, Any, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """A JSON header for (name, dtype, shape) tensors, laid out as the safetensors package lays them out."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in sorted(header, key=lambda item: (_RANK.get(np.dtype(item[1]), -1), item[0])):
        if name in content or name == "__metadata__":
            raise ValueError(f"tensor name {name!r} is reserved or given twice")
        end = position + math.prod(shape) * np.dtype(dtype).itemsize
        content[name] = {"dtype": dtype_code(name, dtype), "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return raw + b" " * (-len(raw) % 8)


def some(names: Sequence[str]) -> str:
    return ("nothing" if not names else ", ".join(names[:4])) + (f" and {len(names) - 4} more" if names[4:] else "")
