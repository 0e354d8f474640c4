"""The GGUF container: header, metadata, dequantization, and damaged files."""

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from jaxlm.checkpoints.gguf import GgufFile
from jaxlm.checkpoints.gguf_header import TYPES
from tests.checkpoints.gguf_cases import llama_file, opened, write


def scalar(field) -> Any:
    value = field.contents()
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.slow
def test_header_equals_gguf_reader(smollm2_gguf):
    file, reader = GgufFile(smollm2_gguf), GGUFReader(smollm2_gguf)
    expected = {key: scalar(field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata.keys() == expected.keys()
    for key, value in file.metadata.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected[key], key
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        stored = file.tensors[tensor.name]
        assert stored.type.name == tensor.tensor_type.name
        assert stored.shape == tuple(tensor.shape.tolist()[::-1])
        assert stored.offset == tensor.data_offset
    for name in ("token_embd.weight", "blk.3.attn_q.weight", "blk.29.ffn_down.weight", "output_norm.weight"):
        (tensor,) = (t for t in reader.tensors if t.name == name)
        np.testing.assert_array_equal(file.read(name), quants.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize(("fixture", "limit"), [("smollm2_gguf", 0.5), ("gemma3_gguf", 2.0)])
def test_header_is_fast(fixture, limit, request):
    """Vocabularies of 49,152 and 262,144; gguf.GGUFReader takes 2.5 s and 11 s."""
    path = request.getfixturevalue(fixture)

    def seconds() -> float:
        start = time.perf_counter()
        GgufFile(path).close()
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < limit


def test_every_metadata_type(tmp_path):
    writer = GGUFWriter(path := tmp_path / "x.gguf", "llama")
    values = {
        "uint8": 200, "int8": -3, "uint16": 60_000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31),
        "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1 / 3, "bool": True, "string": "ä🦙\n",
    }  # fmt: skip
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    arrays = {"x.ints": [1, -2, 3], "x.floats": [0.5, 1.5], "x.bools": [True, False], "x.strings": ["", "é", "a\0b"]}
    for key, value in arrays.items():
        writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GgufFile(path).metadata
    assert {kind: metadata[f"x.{kind}"] for kind in values} == values
    assert {key: list(metadata[key]) for key in arrays} == arrays


@pytest.mark.parametrize("alignment", [0, 8, 64])
def test_version_2_and_alignment(tmp_path, alignment):
    a, b = np.arange(5, dtype=np.float32), np.ones((3, 2), np.float16)
    path = write(tmp_path / "x.gguf", "llama", {}, {"a": a, "b": b}, alignment)
    raw = bytearray(path.read_bytes())
    raw[4:8] = struct.pack("<I", 2)
    path.write_bytes(raw)
    file = GgufFile(path)
    np.testing.assert_array_equal(file.read("a"), a)
    np.testing.assert_array_equal(file.read("b", slice(1, 3)), b[1:])


def blocks(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Quantized random numbers, or random bytes for a type that gguf cannot quantize to."""
    rng = np.random.default_rng(kind.value)
    try:
        return quants.quantize(rng.standard_normal(shape).astype(np.float32), kind)
    except NotImplementedError:
        return rng.integers(0, 256, quants.quant_shape_to_byte_shape(shape, kind), np.uint8)


QUANTIZED = [GGMLQuantizationType(t.id) for t in TYPES.values() if t.dtype is None]
UNREADABLE = [kind for kind in QUANTIZED if kind not in quants._type_traits]


@pytest.mark.parametrize("kind", [k for k in QUANTIZED if k not in UNREADABLE], ids=lambda k: k.name)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes are also infinite scales
def test_dequantizes_like_gguf(tmp_path, kind):
    matrix, stack = blocks(kind, (7, 512)), blocks(kind, (3, 5, 256))
    path = write(tmp_path / "x.gguf", "llama", {}, {"matrix": (matrix, kind), "stack": (stack, kind)})
    file = GgufFile(path)
    for name, data in (("matrix", matrix), ("stack", stack)):
        expected = quants.dequantize(data, kind)
        values = file.read(name)
        assert values.dtype == np.float32 and values.flags.owndata | (values.base is not None)
        np.testing.assert_array_equal(values, expected)
        np.testing.assert_array_equal(file.read(name, slice(1, 3)), expected[1:3])
        assert file.read(name, slice(2, 2)).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("kind", UNREADABLE, ids=lambda k: k.name)
def test_type_that_gguf_cannot_dequantize(tmp_path, kind):
    path = write(tmp_path / "x.gguf", "llama", {}, {"w": (blocks(kind, (2, 256)), kind)})
    with pytest.raises(ValueError, match=rf"x\.gguf: tensor 'w' is of type {kind.name}, which the installed gguf"):
        GgufFile(path).read("w")


def test_block_sizes_are_those_of_gguf():
    from gguf.constants import GGML_QUANT_SIZES

    assert {t.id: (t.block, t.size) for t in TYPES.values()} == {k.value: v for k, v in GGML_QUANT_SIZES.items()}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "F64"])
def test_plain_types_keep_their_dtype(tmp_path, kind):
    dtype = next(t.dtype for t in TYPES.values() if t.name == kind)
    values = (np.arange(24).reshape(4, 6) / 8).astype(dtype)
    data = (values.view(np.uint8), GGMLQuantizationType.BF16) if kind == "BF16" else values
    file = GgufFile(write(tmp_path / "x.gguf", "llama", {}, {"w": data}))
    assert file.read("w").dtype == dtype
    np.testing.assert_array_equal(file.read("w", slice(1, 4)), values[1:])


# Damaged files: one ValueError that names the file and the thing


def damaged(tmp_path: Path, change) -> Path:
    path = llama_file(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: b"", "is empty"),
        (lambda raw: b"GGML" + raw[4:], "is not a GGUF file: it starts with b'GGML'"),
        (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "is GGUF version 1"),
        (lambda raw: raw[:4] + struct.pack("<I", 9) + raw[8:], "is GGUF version 9; versions 2 and 3 are supported"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "is a big-endian GGUF file"),
        (lambda raw: raw[:20], "truncated: the 20 bytes end inside the header"),
        (lambda raw: raw[:100], "truncated: the 100 bytes end inside the metadata '"),
        (lambda raw: raw[:1100], r"truncated: the 1100 bytes end inside the (name|description) of tensor"),
        (lambda raw: raw[:-64], "truncated: tensor 'output.weight' needs bytes up to"),
        (
            lambda raw: raw.replace(b"blk.1.attn_k.weight", b"blk.1.attn_q.weight"),
            "tensor 'blk.1.attn_q.weight' is .* twice",
        ),
        (
            lambda raw: raw.replace(b"llama.rope.freq_base", b"llama.context_length"),
            "metadata 'llama.context_length' is there twice",
        ),
        (lambda raw: raw.replace(b"llama.vocab_size", b"\xff" * 16), "the key of metadata entry 11 is not UTF-8"),
    ],
)
def test_damaged_file(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"x\.gguf: {message}"):
        opened(damaged(tmp_path, change))


def tensor_entry(raw: bytes, name: bytes) -> int:
    """Where a tensor's rank is in the file."""
    return raw.index(name) + len(name)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, struct.pack("<I", 9), "has 9 dimensions"),
        (4, struct.pack("<Q", 0), r"has the impossible shape \[0\]"),
        (12, struct.pack("<I", 777), "is of the unknown type 777"),
        (12, struct.pack("<I", 12), r"of type Q4_K has the impossible shape \[32\]"),
        (16, struct.pack("<Q", 33), "is not aligned to 32 bytes"),
        (16, struct.pack("<Q", 2**40), "needs bytes up to"),
        (16, struct.pack("<Q", 32), "overlaps"),
    ],
)
def test_damaged_tensor_description(tmp_path, at, value, message):
    def change(raw: bytes) -> bytes:
        start = tensor_entry(raw, b"output_norm.weight") + at
        return raw[:start] + value + raw[start + len(value) :]

    with pytest.raises(ValueError, match=rf"x\.gguf: .*tensor '.*{message}"):
        opened(damaged(tmp_path, change))


def test_enormous_counts_are_truncation(tmp_path):
    """A damaged length must not be allocated."""
    raw = write(tmp_path / "y.gguf", "llama", {"x.list": ["a", "b"]}, {"a": np.zeros(1, np.float32)}).read_bytes()
    at = raw.index(b"x.list") + len(b"x.list") + 4 + 4
    for value in (2**62, 2**64 - 1, 10**5):
        path = tmp_path / "x.gguf"
        path.write_bytes(raw[:at] + struct.pack("<Q", value) + raw[at + 8 :])
        with pytest.raises(ValueError, match=r"x\.gguf: truncated: .* inside the metadata 'x\.list'"):
            GgufFile(path)


def test_split_model(tmp_path):
    path = write(tmp_path / "x.gguf", "llama", {"split.no": 1, "split.count": 3}, {"a": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"x\.gguf: is part 2 of 3 of a split model; join the parts"):
        GgufFile(path)
