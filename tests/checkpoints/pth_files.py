"""Files in the format of torch.save, written without torch; test_pth.py has torch read one."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(bool): "BoolStorage",
}
EMPTY = b"ccollections\nOrderedDict\n)R"


def number(value: int) -> bytes:
    size = max(1, (value.bit_length() + 8) // 8)
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def sizes(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str, kind: str, count: int) -> bytes:
    return (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    )


def tensor(stored: bytes, offset: int, shape: Sequence[int], strides: Sequence[int]) -> bytes:
    arguments = stored + number(offset) + sizes(shape) + sizes(strides) + b"\x89" + EMPTY
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    return b"\x80\x02" + EMPTY + b"(" + b"".join(text(name) + value for name, value in items.items()) + b"u."


def steps(shape: Sequence[int]) -> list[int]:
    return [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]


def write(path: Path, tensors: Mapping[str, np.ndarray], **changes: bytes | None) -> Path:
    """A file with a storage for each tensor. changes: records to put in (or leave out), `data_pkl` for data.pkl."""
    items = {
        name: tensor(storage(str(i), STORAGES[value.dtype], value.size), 0, value.shape, steps(value.shape))
        for i, (name, value) in enumerate(tensors.items())
    }
    records: dict[str, bytes | None] = {"data.pkl": dictionary(items), "byteorder": b"little"}
    records |= {f"data/{i}": value.tobytes() for i, value in enumerate(tensors.values())}
    records["version"] = b"3\n"
    return archive(path, records | {name.replace("_", ".", 1): value for name, value in changes.items()})


def archive(path: Path, records: Mapping[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, value in records.items():
            if value is not None:
                made.writestr(f"model/{name}", value)
    return path
