"""The reader and writer of safetensors files: what they give back, what they refuse, and how much memory they take."""

import errno
import json
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlm.checkpoints.safetensors import INDEX, SINGLE, SafetensorsSource, write_file
from jaxlm.checkpoints.safetensors_header import DTYPES

BF16 = np.dtype(ml_dtypes.bfloat16)


def mixed() -> dict[str, np.ndarray]:
    """Every dtype in one file, a scalar, a tensor of size zero and a name that is not ASCII."""
    rng = np.random.default_rng(0)
    tensors = {f"t.{code}": rng.integers(0, 2, (5, 3)).astype(dtype) for code, dtype in DTYPES.items()}
    return tensors | {
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 7), BF16),
        "wörter/層": np.arange(3, dtype=np.int8),
        "rows": rng.standard_normal((6, 4, 2)).astype(np.float16),
    }


def blob(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def spec(dtype: str, shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def save_shards(directory: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: dict | None = None) -> None:
    for file, tensors in shards.items():
        safetensors.numpy.save_file(tensors, directory / file, {"format": "pt"})
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


def error(path: Path) -> str:
    opened = len(os.listdir("/dev/fd"))
    with pytest.raises(ValueError) as caught:
        SafetensorsSource(path)
    assert len(os.listdir("/dev/fd")) == opened
    return str(caught.value)


def assert_same(left: np.ndarray, right: np.ndarray) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert left.tobytes() == right.tobytes()


# Reading


def test_every_dtype_shape_and_name(tmp_path):
    safetensors.numpy.save_file(mixed(), tmp_path / SINGLE)
    with SafetensorsSource(tmp_path) as source:
        assert source.tensors.keys() == mixed().keys()
        for name, value in mixed().items():
            assert_same(source.read(name), value)
            assert source.tensors[name] == (type(source.tensors[name]))(SINGLE, value.dtype, value.shape)
    with pytest.raises(ValueError, match="closed"):
        source.read("rows")


def test_a_single_file_by_its_path(tmp_path):
    safetensors.numpy.save_file(mixed(), tmp_path / "any.safetensors")
    with SafetensorsSource(tmp_path / "any.safetensors") as source:
        assert_same(source.read("scalar"), np.array(2.5, np.float32))


def test_shards(tmp_path):
    a, b = {"x": np.arange(4, dtype=BF16)}, {"y": np.arange(6.0).reshape(2, 3)}
    save_shards(tmp_path, {"model-00001-of-00002.safetensors": a, "model-00002-of-00002.safetensors": b})
    (tmp_path / "consolidated.safetensors").write_bytes(b"of no concern: the index does not name it")
    with SafetensorsSource(tmp_path) as source:
        assert_same(source.read("x"), a["x"])
        assert_same(source.read("y"), b["y"])
        assert sorted(source.headers) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert source.index == (tmp_path / INDEX).read_bytes()


@pytest.mark.parametrize(
    "rows", [slice(0, 6), slice(2, 5), slice(5, None), slice(None, 1), slice(3, 3), slice(2, 4, 1)]
)
def test_a_range_of_rows(tmp_path, rows):
    safetensors.numpy.save_file(mixed(), tmp_path / SINGLE)
    with SafetensorsSource(tmp_path) as source:
        assert_same(source.read("rows", rows), np.ascontiguousarray(mixed()["rows"][rows]))


@pytest.mark.parametrize("rows", [slice(0, 7), slice(-1, None), slice(4, 2), slice(0, 6, 2), slice(7, None)])
def test_rows_out_of_range(tmp_path, rows):
    safetensors.numpy.save_file(mixed(), tmp_path / SINGLE)
    with SafetensorsSource(tmp_path) as source, pytest.raises(ValueError, match=r"'rows' has 6 rows: slice"):
        source.read("rows", rows)


def test_a_scalar_has_no_rows(tmp_path):
    safetensors.numpy.save_file(mixed(), tmp_path / SINGLE)
    with SafetensorsSource(tmp_path) as source, pytest.raises(ValueError, match="'scalar' is a scalar"):
        source.read("scalar", slice(0, 1))


def test_reading_allocates_what_is_asked_for_and_maps_nothing(tmp_path):
    safetensors.numpy.save_file({"w": np.zeros((64, 65536), np.float32)}, tmp_path / SINGLE)
    with SafetensorsSource(tmp_path) as source:
        for rows, size in ((slice(8, 10), 2 << 18), (slice(None), 64 << 18)):
            tracemalloc.start()
            assert source.read("w", rows).nbytes == size
            assert tracemalloc.get_traced_memory()[1] < size + 50_000
            tracemalloc.stop()
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(tmp_path) not in maps.read_text()


# Bad files: each problem, then all at once

GOOD = spec("F32", [2], 0, 8)
BAD_FILES = {
    "nothing": (b"", "truncated: 0 bytes"),
    "seven bytes": (b"1234567", "truncated: 7 bytes"),
    "huge header": (b"\xff" * 16, "not a safetensors file: a header of 18446744073709551615 bytes"),
    "header past the end": (blob({"a": GOOD})[:30], "truncated: its header has"),
    "data cut": (blob({"a": GOOD}, b"1234567"), "truncated: the header describes 8 bytes of tensors, the file holds 7"),
    "data left over": (blob({"a": GOOD}, b"123456789"), "the last 1 bytes belong to no tensor"),
    "not JSON": (blob(b'{"a": '), "the header is not valid JSON: Expecting value"),
    "too deep": (blob(b'{"a":' + b"[" * 100_000), "the header is not valid JSON"),
    "a list": (blob([1]), "the header is not a JSON object but list"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "the header is not UTF-8 text (byte 2)"),
    "metadata": (blob({"__metadata__": {"a": 1}, "a": GOOD}, b"12345678"), "__metadata__ should map names to text"),
    "overlap": (blob({"a": GOOD, "b": spec("F32", [1], 4, 8)}, b"12345678"), "'b' begins at byte 4, inside tensor 'a'"),
    "same bytes": (blob({"a": GOOD, "b": GOOD}, b"12345678"), "'b' begins at byte 0, inside tensor 'a'"),
    "inside": (blob({"a": GOOD, "b": spec("U8", [2], 2, 4)}, b"12345678"), "'b' begins at byte 2, inside tensor 'a'"),
    "hole": (
        blob({"a": GOOD, "b": spec("U8", [1], 9, 10)}, b"1234567890"),
        "bytes 8 to 9, before tensor 'b', belong to no tensor",
    ),
    "hole in front": (blob({"a": spec("U8", [1], 2, 3)}, b"123"), "bytes 0 to 2, before tensor 'a'"),
    "byte count": (blob({"a": spec("F32", [3], 0, 8)}, b"12345678"), "'a' has 8 bytes; F32 [3] needs 12"),
    "scalar count": (blob({"a": spec("F32", [], 0, 8)}, b"12345678"), "'a' has 8 bytes; F32 [] needs 4"),
    "negative offset": (blob({"a": spec("U8", [1], -1, 0)}), "'a': data_offsets [-1, 0] are not a range"),
    "backward": (blob({"a": spec("U8", [0], 4, 0)}, b"1234"), "'a': data_offsets [4, 0] are not a range"),
    "three offsets": (blob({"a": GOOD | {"data_offsets": [0, 4, 8]}}, b"12345678"), "data_offsets should be two"),
    "float offset": (blob({"a": GOOD | {"data_offsets": [0, 8.0]}}, b"12345678"), "data_offsets should be two numbers"),
    "negative size": (blob({"a": spec("F32", [-2, -1], 0, 8)}, b"12345678"), "should be a list of sizes, not [-2"),
    "size true": (blob({"a": spec("U8", [True], 0, 1)}, b"1"), "shape should be a list of sizes, not [True]"),
    "huge size": (blob({"a": spec("U8", [0, 2**80], 0, 0)}), "is impossibly large"),
    "no dtype": (blob({"a": {"shape": [2], "data_offsets": [0, 8]}}, b"12345678"), "'a': should have exactly dtype"),
    "dtype null": (blob({"a": GOOD | {"dtype": None}}, b"12345678"), "'a': dtype should be text, not None"),
    "dtype": (blob({"a": GOOD | {"dtype": "F31"}}, b"12345678"), "unknown dtype 'F31' (known: U64, I64"),
    "float8": (
        blob({"a": spec("F8_E4M3", [8], 0, 8)}, b"12345678"),
        "F8_E4M3 is not supported until quantized import lands: a",
    ),
    "duplicate": (
        blob(b'{"a":%s,"a":%s}' % (2 * (b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',)), b"1"),
        "the header has the key 'a' 2 times",
    ),
    "duplicate field": (
        blob(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"),
        "the header has the key 'dtype' 2 times",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file(tmp_path, case):
    content, expected = BAD_FILES[case]
    (tmp_path / SINGLE).write_bytes(content)
    message = error(tmp_path)
    assert message.startswith(f"{tmp_path}: {SINGLE}: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("cut", range(0, 700, 37))
def test_a_file_cut_anywhere(tmp_path, cut):
    safetensors.numpy.save_file({n: v for n, v in mixed().items() if n.startswith("t.F")}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[: cut * len(whole) // 700])
    assert "truncated" in error(tmp_path)


def test_a_file_cut_after_it_was_opened(tmp_path):
    safetensors.numpy.save_file({"w": np.zeros(1000)}, tmp_path / SINGLE)
    with SafetensorsSource(tmp_path) as source:
        with open(tmp_path / SINGLE, "r+b") as file:
            file.truncate(500)
        with pytest.raises(ValueError, match="ends inside tensor 'w'; the file has changed"):
            source.read("w")


def test_all_problems_in_one_error(tmp_path):
    """Five shards: one good, one missing, one truncated, one with float8, one that repeats a tensor; a wrong index."""
    value = np.zeros(2, np.float32)
    shards = {f"s{i}": {f"x{i}": value} for i in range(5)} | {"s1": {"x1": value, "x0": value, "stray": value}}
    weight_map = {"x0": "s0", "x1": "s1", "x2": "s2", "x3": "s3", "x4": "s4", "gone": "s0", "moved": "s0", "y": "s2"}
    shards["s1"]["moved"] = value
    save_shards(tmp_path, shards, weight_map)
    (tmp_path / "s2").unlink()
    (tmp_path / "s3").write_bytes((tmp_path / "s3").read_bytes()[:-1])
    (tmp_path / "s4").write_bytes(blob({"x4": spec("F8_E5M2", [1], 0, 1), "z": spec("U8", [2], 1, 2)}, b"12"))
    message = error(tmp_path).splitlines()
    assert message[0] == f"{tmp_path}: 9 problems"
    assert [line.strip() for line in message[1:]] == [
        "s2: missing, but the index places x2, y there",
        "s3: truncated: the header describes 8 bytes of tensors, the file holds 7",
        "s4: tensor 'z' has 1 bytes; U8 [2] needs 2",
        "s4: F8_E5M2 is not supported until quantized import lands: x4",
        "tensor 'x0' is in more than one file: s0, s1",
        f"{INDEX}: tensor 'gone' is placed in s0, but no file holds it",
        f"{INDEX}: tensor 'moved' is placed in s0, but it is in s1",
        f"s1: tensor 'stray' is not in {INDEX}",
        f"s4: tensor 'z' is not in {INDEX}",
    ]


def test_a_long_list_of_problems_is_cut(tmp_path):
    save_shards(tmp_path, {"s": {f"x{i}": np.zeros(1) for i in range(200)}}, {"other": "s"})
    message = error(tmp_path)
    assert "201 problems" in message and message.endswith("and 151 more") and message.count("\n") == 51


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (b"{", f"{INDEX} is not valid JSON"),
        (b"\xff", f"{INDEX} is not UTF-8 text"),
        (b"[]", "is not a JSON object but list"),
        (b"{}", "weight_map should map tensor names to files"),
        (b'{"weight_map": {}}', "weight_map should map tensor names to files"),
        (b'{"weight_map": {"a": 1}}', "tensor 'a' is placed in 1, not a file name"),
        (b'{"weight_map": {"a": "../s"}}', "tensor 'a' is placed in '../s', not a file name"),
        (b'{"weight_map": {"a": ".."}}', "tensor 'a' is placed in '..', not a file name"),
        (b'{"weight_map": {"a": "."}}', "tensor 'a' is placed in '.', not a file name"),
        (b'{"weight_map": {"a": "s", "a": "s"}}', "has the key 'a' 2 times"),
    ],
)
def test_a_bad_index(tmp_path, index, expected):
    save_shards(tmp_path, {"s": {"a": np.zeros(1)}})
    (tmp_path / INDEX).write_bytes(index)
    assert expected in error(tmp_path)


def test_a_shard_that_is_a_directory(tmp_path):
    save_shards(tmp_path, {}, {"a": "s"})
    (tmp_path / "s").mkdir()
    assert "s: cannot be opened: Is a directory" in error(tmp_path)


# Directories without a checkpoint of ours


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        SafetensorsSource(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=rf"no {SINGLE} or {INDEX}; the directory holds nothing"):
        SafetensorsSource(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"the directory holds config\.json"):
        SafetensorsSource(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: not a \.safetensors file"):
        SafetensorsSource(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "rwkv.pt"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        message = error(path)
        assert name in message and "not loaded, because unpickling can run any code" in message
        assert "save_pretrained" in message and "\n" not in message


def test_files_under_other_names_are_not_guessed(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"it holds adapter_model\.safetensors: name one of them"):
        SafetensorsSource(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"holds model-00001-of-00002\.safetensors, but not {INDEX}"):
        SafetensorsSource(tmp_path)


def test_a_single_file_beside_an_index_that_does_not_name_it(tmp_path):
    save_shards(tmp_path, {"s": {"a": np.zeros(1)}})
    safetensors.numpy.save_file({"a": np.zeros(1)}, tmp_path / SINGLE)
    assert "remove the stale one" in error(tmp_path)
    save_shards(tmp_path, {SINGLE: {"a": np.zeros(1)}})
    SafetensorsSource(tmp_path).close()


# Writing


def write(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, **options) -> None:
    header = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    write_file(path, header, {"format": "pt"} if metadata is None else metadata, tensors.__getitem__, **options)


def test_a_new_file_is_what_the_safetensors_package_writes(tmp_path):
    safetensors.numpy.save_file(mixed(), tmp_path / "theirs", {"format": "pt"})
    sizes: list[int] = []
    write(tmp_path / "ours", dict(reversed(mixed().items())), on_tensor=sizes.append)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sorted(sizes) == sorted(value.nbytes for value in mixed().values())


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "note": 'déjà "vu"\n'}])
@pytest.mark.parametrize("tensors", [mixed(), {"only": np.array(True)}, {"x" * n: np.ones(n) for n in range(1, 9)}])
def test_a_new_file_is_aligned_and_loads(tmp_path, tensors, metadata):
    write(tmp_path / "new", tensors, metadata)
    with safetensors.safe_open(tmp_path / "new", "numpy") as theirs:
        assert (theirs.metadata() or {}) == metadata
    loaded = safetensors.numpy.load_file(tmp_path / "new")
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert_same(loaded[name], value)
    raw = (tmp_path / "new").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0


def test_a_raw_header_is_kept(tmp_path):
    """An order, spacing, padding and metadata that nobody would write anew."""
    raw = json.dumps({"b": spec("U8", [3], 0, 3), "__metadata__": {"k": "v"}, "a": spec("F32", [1], 3, 7)}, indent=3)
    before = blob(raw.encode() + b"   ", b"1234567")
    (tmp_path / "before.safetensors").write_bytes(before)
    with SafetensorsSource(tmp_path / "before.safetensors") as source:
        header = [(name, info.dtype, info.shape) for name, info in source.tensors.items()]
        write_file(tmp_path / "after", header, {}, source.read, source.headers["before.safetensors"])
        assert (tmp_path / "after").read_bytes() == before
        with pytest.raises(ValueError, match="the header given describes other tensors"):
            write_file(tmp_path / "no", header[:1], {}, source.read, source.headers["before.safetensors"])
    assert not (tmp_path / "no").exists()


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    header = [(f"w{i}", np.float32, (512, 2048)) for i in range(8)]
    tracemalloc.start()
    write_file(tmp_path / "new", header, {}, lambda name: np.full((512, 2048), int(name[1:]), np.float32))
    assert tracemalloc.get_traced_memory()[1] < (4 << 20) + 100_000
    tracemalloc.stop()
    assert safetensors.numpy.load_file(tmp_path / "new")["w5"][-1, -1] == 5


def test_a_transposed_tensor_is_not_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.checkpoints.safetensors._BLOCK", 1 << 16)
    value = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024).T
    tracemalloc.start()
    write(tmp_path / "new", {"w": value})
    assert tracemalloc.get_traced_memory()[1] < 300_000
    tracemalloc.stop()
    assert_same(safetensors.numpy.load_file(tmp_path / "new")["w"], np.ascontiguousarray(value))


def test_writing_refuses(tmp_path):
    value = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match=r"'w' came as float64 \(2,\); its header says float32 \(2,\)"):
        write_file(tmp_path / "a", [("w", np.float32, (2,))], {}, lambda _: value.astype(np.float64))
    with pytest.raises(ValueError, match=r"'w' came as float32 \(2,\); its header says float32 \(1, 2\)"):
        write_file(tmp_path / "b", [("w", np.float32, (1, 2))], {}, lambda _: value)
    with pytest.raises(ValueError, match="'w': dtype float8_e5m2 cannot be written"):
        write_file(tmp_path / "c", [("w", ml_dtypes.float8_e5m2, (2,))], {}, lambda _: value)
    for header in ([("__metadata__", np.float32, (2,))], [("w", np.float32, (2,)), ("w", np.float32, (2,))]):
        with pytest.raises(ValueError, match="is reserved or given twice"):
            write_file(tmp_path / "d", header, {}, lambda _: value)
    (tmp_path / "e").write_text("kept")
    with pytest.raises(FileExistsError):
        write(tmp_path / "e", {"w": value})
    assert (tmp_path / "e").read_text() == "kept"


def test_a_file_that_cannot_be_synced(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*new'"):
        write(tmp_path / "new", mixed())
