"""PyTorch's .pth files: what torch wrote is read, in slices too; anything but tensors, and damage, is one error."""

import itertools
import os
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest

from jaxlm.checkpoints import pth
from jaxlm.checkpoints.pth import PthSource
from tests.checkpoints.pth_files import EMPTY, archive, dictionary, storage, tensor, text, write

R = np.random.default_rng(0)
X = R.standard_normal((6, 4)).astype(np.float32)


def error(path) -> str:
    with pytest.raises(ValueError) as caught:
        PthSource(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def everything(path) -> dict[str, np.ndarray]:
    with PthSource(path) as source:
        return {name: source.read(name) for name in source.tensors}


# Reading


@pytest.fixture
def file(tmp_path):
    tensors = {
        "a": X,
        "b": X.astype(ml_dtypes.bfloat16).reshape(2, 3, 4),
        "half": X.astype(np.float16),
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 5), np.float32),
        "n": np.arange(5),
        "yes": np.array([True, False]),
    }
    return write(tmp_path / "m.pth", tensors), tensors


def test_whole_tensors(file):
    path, tensors = file
    found = everything(path)
    assert list(found) == list(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


def laid(items) -> dict[str, bytes]:
    """Views of one storage of X's numbers: {name: (offset, shape, strides)}."""
    return {name: tensor(storage("0", "FloatStorage", 24), *view) for name, view in items.items()}


VIEWS = {
    "whole": (0, (6, 4), (4, 1)),
    "transposed": (0, (4, 6), (1, 4)),
    "columns": (1, (6, 2), (4, 1)),
    "every other row": (4, (3, 4), (8, 1)),
    "three axes": (2, (2, 2, 3), (1, 12, 4)),
    "a size of one": (3, (1, 4), (77, 1)),
    "one number": (23, (), ()),
    "none": (24, (0, 3), (3, 1)),
}


@pytest.fixture
def strided(tmp_path):
    path = archive(tmp_path / "m.pth", {"data.pkl": dictionary(laid(VIEWS)), "data/0": X.tobytes()})
    expected = {
        name: np.lib.stride_tricks.as_strided(X.reshape(-1)[offset:], shape, [4 * s for s in strides])
        for name, (offset, shape, strides) in VIEWS.items()
    }
    return path, expected


def test_views_that_share_a_storage(strided):
    path, expected = strided
    found = everything(path)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
        assert (found[name].flags.c_contiguous and found[name].base is None) or found[name].ndim == 0


def test_slices(strided, monkeypatch):
    path, expected = strided
    read = []
    monkeypatch.setattr(os, "preadv", lambda *a, real=os.preadv: read.append(real(*a)) or read[-1])
    with PthSource(path) as source:
        for name, value in expected.items():
            for start, stop in itertools.combinations(range(value.shape[0] + 1 if value.ndim else 0), 2):
                read.clear()
                np.testing.assert_array_equal(source.read(name, slice(start, stop)), value[start:stop], err_msg=name)
                reach = np.arange(24).reshape(6, 4).flat[VIEWS[name][0] :]
                mine = np.lib.stride_tricks.as_strided(reach, VIEWS[name][1], [8 * s for s in VIEWS[name][2]])[
                    start:stop
                ]
                assert sum(read) == 4 * (mine.max() - mine.min() + 1) if mine.size else not read
            for cut in [(1, 2, 1, 3)] if value.ndim == 2 and value.shape[0] > 2 and value.shape[1] > 2 else ():
                box = ((cut[0], cut[1]), (cut[2], cut[3]))
                np.testing.assert_array_equal(source.read_box(name, 0, value.shape, box), value[1:2, 1:3])
        with pytest.raises(ValueError, match="has 6 rows"):
            source.read("whole", slice(2, 7))
        with pytest.raises(ValueError, match="has 4 rows"):
            source.read("transposed", slice(2, 7))
    source.close()


@pytest.mark.torch
def test_what_torch_saves(tmp_path):
    import torch

    kinds = "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool"
    base = torch.randn(6, 4)
    layer = torch.nn.Linear(4, 3)
    tensors = {kind: (base * 9).to(getattr(torch, kind)) for kind in kinds.split()} | {
        "transposed": base.T,
        "columns": base[:, 1:3],
        "tied": base,
        "parameter": layer.weight,
        "scalar": torch.tensor(2.5),
    }
    torch.save(tensors, tmp_path / "a.pth")
    torch.save(layer.state_dict(), tmp_path / "b.pth")  # an OrderedDict with an attribute
    torch.save(tensors, tmp_path / "c.pth", pickle_protocol=4)
    for name, of in (("a", "a"), ("b", "b"), ("c", "a")):  # torch itself does not load c with weights_only
        expected = torch.load(tmp_path / f"{of}.pth", weights_only=True)
        found = everything(tmp_path / f"{name}.pth")
        assert list(found) == list(expected)
        for key, value in expected.items():
            value = value.detach()
            kind = value.dtype
            assert found[key].dtype.name == str(kind).removeprefix("torch.") and found[key].shape == tuple(value.shape)
            bits = value.contiguous().view(torch.uint8 if value.ndim else kind).numpy()
            assert found[key].tobytes() == bits.tobytes(), key


@pytest.mark.torch
def test_torch_reads_what_these_tests_write(file):
    import torch

    path, tensors = file
    found = torch.load(path, weights_only=True)
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name].float().numpy(), value.astype(np.float32))


@pytest.mark.torch
def test_what_torch_saves_that_is_no_tensor(tmp_path):
    import torch

    path = tmp_path / "m.pth"
    for value, expected in (
        (torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear', which is no part of a tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'torch.ComplexFloatStorage'"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "'torch._utils._rebuild_tensor_v3'"),
        ({"a": np.zeros(2)}, "numpy"),
        ({"a": torch.zeros(2), "_strategy": "cpu fp32"}, "'_strategy' is 'cpu fp32'; expected tensors"),
        ({"model": {"a": torch.zeros(2)}}, "'model' is a dict; expected tensors under their names"),
        ([torch.zeros(2)], "holds a list, expected a dict of tensors"),
        ({"a": torch.zeros(2).expand(3, 2)}, "overlap"),
    ):
        torch.save(value, path)
        assert expected in error(path)
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    assert "before PyTorch 1.6" in error(path) and "t.save(t.load(" in error(path)


# Refusals


def test_other_files(tmp_path):
    path = tmp_path / "m.pth"
    for raw, expected in (
        (b"", "does not begin as a zip archive"),
        (pth._LEGACY + b"\x80\x02M\xe9\x03.", "before PyTorch 1.6"),
        (b"\0" * 257 + b"ustar" + b"\0" * 300, "before PyTorch 1.6"),
        (b"PK\x03\x04" + b"\0" * 99, "its zip directory cannot be read"),
    ):
        path.write_bytes(raw)
        assert expected in error(path)
    with pytest.raises(FileNotFoundError):
        PthSource(tmp_path / "absent.pth")


MADE = {"a": X}
FLOATS = storage("0", "FloatStorage", 24)
CALL = b"\x80\x02cos\nsystem\n(" + text("true") + b"tR."
CONJUGATE = tensor(FLOATS, 0, (1,), (1,)).replace(EMPTY + b"tR", EMPTY + b"}" + text("conj") + b"\x88stR")
PICKLES = {
    "a call": (CALL, "asks for 'os.system', which is no part of a tensor: it is not loaded"),
    "by the stack": (b"\x80\x04" + text("builtins") + text("eval") + b"\x93.", "'builtins.eval'"),
    "an attribute": (b"\x80\x02ctorch\nFloatStorage.__init__\n.", "'torch.FloatStorage.__init__'"),
    "an instance": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "the opcode NEWOBJ"),
    "a copyreg code": (b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "a class": (b"\x80\x02ccollections\nOrderedDict\n.", "expected a dict"),
    "a type with arguments": (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "OrderedDict with 1"),
    "a call of text": (b"\x80\x02" + text("x") + b")R.", "calls 'x'"),
    "no end": (b"\x80\x02}", "exhausted before seeing STOP"),
    "nothing": (b"\x80\x02.", "empty stack"),
    "an unset memo": (b"\x80\x02h\x07.", "memo 7"),
    "a far memo": (b"\x80\x02}r\xff\xff\xff\xff0.", "the opcode POP"),
    "no mark": (b"\x80\x02t.", "a mark that it has not set"),
    "a list for a key": (b"\x80\x02}]K\x01s.", "a list for the key of a dict"),
    "a key twice": (b"\x80\x02}" + (text("a") + b"K\x01s") * 2 + b".", "the key 'a' twice"),
    "items of a list": (b"\x80\x02](K\x01K\x02u.", "sets items of a list"),
    "append to a dict": (b"\x80\x02}K\x01a.", "appends to a dict"),
    "a state": (b"\x80\x02]}b.", "sets the state of a list"),
    "no storage": (b"\x80\x02K\x01Q.", "something that is not a storage"),
    "a storage of dicts": (
        b"\x80\x02(" + text("storage") + b"ccollections\nOrderedDict\n" + text("0") + text("cpu") + b"K\x01tQ.",
        "something that is not a storage",
    ),
    "too few arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "a tensor is made of nothing"),
    "a conjugate": (dictionary({"a": CONJUGATE}), "conjugated or negated"),
    "a negative size": (dictionary({"a": tensor(FLOATS, 0, (-1,), (1,))}), "are not numbers of elements"),
    "a negative offset": (dictionary({"a": tensor(FLOATS, -1, (1,), (1,))}), "are not numbers of elements"),
    "a negative stride": (dictionary({"a": tensor(FLOATS, 9, (2,), (-1,))}), "are not numbers of elements"),
    "unequal ranks": (dictionary({"a": tensor(FLOATS, 0, (2, 2), (1,))}), "are not numbers of elements"),
    "too large": (dictionary({"a": tensor(FLOATS, 0, (0, 2**62), (1, 1))}), "impossibly large"),
    "beyond its storage": (dictionary({"a": tensor(FLOATS, 1, (6, 4), (4, 1))}), "ends at element 25 of storage '0'"),
    "an offset beyond": (dictionary({"a": tensor(FLOATS, 25, (0,), (1,))}), "ends at element 25"),
    "overlapping": (dictionary({"a": tensor(FLOATS, 0, (6, 4), (3, 1))}), "overlap"),
    "repeated": (dictionary({"a": tensor(FLOATS, 0, (2**40,), (0,))}), "overlap"),
    "no such record": (dictionary({"a": tensor(storage("7", "FloatStorage", 9), 0, (9,), (1,))}), "data/7 that is not"),
    "a record outside": (dictionary({"a": tensor(storage("../x", "FloatStorage", 9), 0, (9,), (1,))}), "data/../x"),
    "other counts": (dictionary({"a": tensor(storage("0", "FloatStorage", 25), 0, (9,), (1,))}), "has 96 bytes; 25"),
    "other numbers": (dictionary({"a": tensor(storage("0", "LongStorage", 24), 0, (9,), (1,))}), "int64 need 192"),
    "a name of bytes": (b"\x80\x02}K\x01" + tensor(FLOATS, 0, (9,), (1,)) + b"s.", "1 is a Tensor; expected tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_are_refused(tmp_path, case):
    raw, expected = PICKLES[case]
    assert expected in error(write(tmp_path / "m.pth", MADE, data_pkl=raw))


def test_a_small_pickle_of_endless_tuples(tmp_path):
    """Each of 200 tuples holds the one before twice: whoever spelt that out, or compared it, would not end."""
    bomb = b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 200
    for end in (b".", b"R.", b"Q.", b"}b.", b")R."):
        error(write(tmp_path / "m.pth", MADE, data_pkl=bomb + end))


def test_archives_that_are_refused(tmp_path):
    path = tmp_path / "m.pth"
    write(path, MADE, byteorder=b"big")
    assert "b'big' byte order" in error(path)
    write(path, MADE, constants_pkl=b"\x80\x02).")
    assert "TorchScript" in error(path)
    write(path, MADE, data_pkl=None)
    assert "without a data.pkl" in error(path)
    archive(path, {"data.pkl": dictionary(laid(VIEWS)), "data/0": X.tobytes()}, zipfile.ZIP_DEFLATED)
    assert "is compressed" in error(path)
    raw = bytearray(write(path, MADE).read_bytes())
    raw[raw.find(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)
    assert "is encrypted" in error(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(write(path, MADE), "a") as made:
        made.writestr("model/data/0", X.tobytes())
    assert "two records are called 'model/data/0'" in error(path)


def test_records_that_overlap(tmp_path):
    raw = bytearray(write(tmp_path / "m.pth", MADE | {"b": X}).read_bytes())
    at = [raw.find(b"PK\x01\x02")]
    while (following := raw.find(b"PK\x01\x02", at[-1] + 1)) >= 0:
        at.append(following)
    place = {bytes(raw[i + 46 : i + 46 + raw[i + 28]]): i + 42 for i in at}
    first = slice(place[b"model/data/0"], place[b"model/data/0"] + 4)
    second = slice(place[b"model/data/1"], place[b"model/data/1"] + 4)
    raw[second] = raw[first]
    (tmp_path / "m.pth").write_bytes(raw)
    assert "overlap" in error(tmp_path / "m.pth")


def test_damage_is_an_error_or_harmless(tmp_path):
    """Flipped bytes and truncations, 1000 in all: a ValueError, or tensors whose bytes lie within the file."""
    whole, chance = write(tmp_path / "m.pth", {"a": X, "b": X.T.copy()}).read_bytes(), random.Random(0)
    path, refused = tmp_path / "n.pth", 0
    interesting = [i for i in range(len(whole)) if not X.tobytes().find(whole[i : i + 9]) >= 0]
    for trial in range(1000):
        raw = bytearray(whole)
        if trial % 6 == 0:
            raw = raw[: chance.randrange(len(raw))]
        for _ in range(chance.randint(1, 3) if trial % 6 else 0):
            raw[chance.choice(interesting)] = chance.choice([0, 1, 255, chance.randrange(256)])
        path.write_bytes(raw)
        try:
            source = PthSource(path)
        except ValueError as problem:
            refused += "n.pth" in str(problem)
            continue
        with source:
            for name in source.tensors:
                assert source.read(name).nbytes <= len(raw)
    assert 500 < refused < 1000


def test_a_file_that_changes_meanwhile(tmp_path):
    path = write(tmp_path / "m.pth", MADE)
    with PthSource(path) as source:
        os.truncate(path, 100)
        with pytest.raises(ValueError, match="has changed since it was opened"):
            source.read("a")
