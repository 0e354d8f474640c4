"""PyTorch's .pth and .bin files, as torch.save writes them since 1.6, read without torch and without running anything.

Such a file is a zip archive, its records stored as they are: NAME/data.pkl, a pickle that describes the tensors
(pickled.py), and NAME/data/0, 1, ..., the numbers of their storages. Only the pickle is read when the file is opened.
"""

import io
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxlm.checkpoints import contiguous, pickled
from jaxlm.checkpoints.source import Box, TensorInfo, box_of_rows

_MAX_PICKLE = 100_000_000
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled
_LOCAL = struct.Struct("<4s22xHH")  # of a record's header in a zip archive: signature, length of name and of extras


class PthSource:
    """One .pth or .bin file opened for reading: its tensors by name, each read when asked for, and only so far.

    The file stays open until `close`. ValueError, naming the file, for one that holds anything but tensors under names,
    is damaged, or has the format of before PyTorch 1.6.
    """

    tensors: dict[str, TensorInfo]
    keeps_dtypes = True

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 (open until close())
        try:
            self._views, self._begins = _table(self._file)
            self.tensors = {
                name: TensorInfo(self.path.name, view.storage.dtype, view.shape) for name, view in self._views.items()
            }
        except ValueError as problem:
            self.close()
            raise ValueError(f"{self.path}: {problem}") from None
        except BaseException:
            self.close()
            raise

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or the range `rows` of its first axis (step 1, within bounds), in an array of its own."""
        view, info = self._views[name], self.tensors[name]
        if view.contiguous:
            return contiguous.read_rows(name, info, self._begins[name], rows, self._fill)
        start, stop = contiguous.row_range(name, view.shape, rows)
        shape, size = (stop - start, *view.shape[1:]), info.dtype.itemsize
        if 0 in shape:
            return np.empty(shape, info.dtype)
        reach = sum((n - 1) * stride for n, stride in zip(shape, view.strides, strict=True))
        span = np.empty(reach + 1, info.dtype)
        self._fill(contiguous.as_bytes(span), self._begins[name] + start * view.strides[0] * size)
        laid = np.lib.stride_tricks.as_strided(span, shape, [stride * size for stride in view.strides])
        return laid.copy()

    def read_box(self, name: str, begin: int, shape: Sequence[int], box: Box) -> np.ndarray:
        """A box of the elements from `begin` on, seen as an array of `shape`; of a strided tensor, whole rows."""
        if not self._views[name].contiguous:
            return box_of_rows(self, name, begin, shape, box)
        return contiguous.read_box(name, self.tensors[name], self._begins[name], begin, shape, box, self._fill)

    def _fill(self, view: memoryview, begin: int) -> None:
        while view.nbytes:
            count = os.preadv(self._file.fileno(), [view], begin)
            if count == 0:
                raise ValueError(f"{self.path}: ends at byte {begin}; the file has changed since it was opened")
            view, begin = view[count:], begin + count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "PthSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _table(file: io.FileIO) -> tuple[dict[str, pickled.Tensor], dict[str, int]]:
    """{name: its view of a storage} and {name: the byte of the file at which the view begins}."""
    records = _records(file)
    # In every archive of torch.save: all records lie in one folder, of any name.
    folder = next(
        (name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")), None
    )
    if folder is None:
        raise ValueError(
            f"a zip archive without a data.pkl, so torch.save did not write it; it holds {len(records)} files"
        )
    if f"{folder}byteorder" in records and (order := _read(file, records[f"{folder}byteorder"], 16)) != b"little":
        raise ValueError(f"its numbers are stored in {order!r} byte order; only little-endian files are read")
    content = pickled.unpickle(_read(file, records[f"{folder}data.pkl"], _MAX_PICKLE))
    if not isinstance(content, dict):
        raise ValueError(f"holds a {type(content).__name__}, expected a dict of tensors (a state_dict)")
    views, begins = {}, {}
    for name in pickled.names(content):
        view = views[name] = content[name]
        place = records.get(f"{folder}data/{view.storage.key}")
        if place is None:
            raise ValueError(
                f"truncated or damaged: tensor {name!r} is in a record data/{view.storage.key} that is not there"
            )
        begin, end = place
        size = view.storage.dtype.itemsize
        if end - begin != view.storage.count * size:
            raise ValueError(
                f"the storage of tensor {name!r} has {end - begin} bytes; {view.storage.count} numbers of "
                f"{view.storage.dtype} need {view.storage.count * size}"
            )
        begins[name] = begin + view.offset * size
    return views, begins


def _read(file: io.FileIO, place: tuple[int, int], most: int) -> bytes:
    begin, end = place
    if end - begin > most:
        raise ValueError(f"a record of {end - begin} bytes, where at most {most} are expected")
    raw = os.pread(file.fileno(), end - begin, begin)
    if len(raw) < end - begin:
        raise ValueError("truncated while it was read")
    return raw


def _records(file: io.FileIO) -> dict[str, tuple[int, int]]:
    """{name: (first byte, end)} of every file in the archive."""
    start = os.pread(file.fileno(), 512, 0)
    if start.startswith(_LEGACY) or start[257:262] == b"ustar":
        name = os.fspath(file.name)
        raise ValueError(
            "has the format of before PyTorch 1.6, which is not read; write it anew where torch is installed: python "
            f'-c \'import torch as t; t.save(t.load("{name}", "cpu", weights_only=True), "new.pth")\''
        )
    if not start.startswith(b"PK\x03\x04"):
        raise ValueError("not a PyTorch file: it does not begin as a zip archive")
    try:
        with zipfile.ZipFile(file) as archive:
            entries, end = archive.infolist(), archive.start_dir
    # All that zipfile is known to raise for a damaged directory.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, OSError, struct.error) as error:
        raise ValueError(f"truncated or damaged: its zip directory cannot be read ({error})") from None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError("a TorchScript archive, which holds a program; save the model's state_dict() with torch.save")
    places: dict[str, tuple[int, int]] = {}
    for entry in entries:
        if entry.filename in places:
            raise ValueError(f"damaged: two records are called {entry.filename!r}")
        places[entry.filename] = _place(file, entry, end)
    position, previous = 0, ""
    for name, (begin, stop) in sorted(places.items(), key=lambda item: item[1]):
        if begin < position:
            raise ValueError(f"damaged: the records {previous!r} and {name!r} overlap")
        position, previous = stop, name
    return places


def _place(file: io.FileIO, entry: zipfile.ZipInfo, end: int) -> tuple[int, int]:
    """The bytes of a record, which lie before the zip directory at `end`."""
    name = entry.filename
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError(f"the record {name!r} is compressed, which torch.save never does; not read")
    if entry.flag_bits & 1:
        raise ValueError(f"the record {name!r} is encrypted; not read")
    raw = os.pread(file.fileno(), _LOCAL.size, entry.header_offset) if 0 <= entry.header_offset < end else b""
    if len(raw) < _LOCAL.size:
        raise ValueError(f"truncated or damaged: the record {name!r} is at byte {entry.header_offset} of {end}")
    signature, named, extra = _LOCAL.unpack(raw)
    begin = entry.header_offset + _LOCAL.size + named + extra
    if signature != b"PK\x03\x04" or begin + entry.file_size > end:
        raise ValueError(f"truncated or damaged: the record {name!r} of {entry.file_size} bytes is not at byte {begin}")
    return begin, begin + entry.file_size
