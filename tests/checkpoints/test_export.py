"""Exports: the same bytes back, shards that others can read, and an old directory that survives every interruption."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxlm.checkpoints import export
from jaxlm.checkpoints.export import staged, write_checkpoint
from jaxlm.checkpoints.manifest import Manifest
from jaxlm.checkpoints.safetensors import INDEX, SINGLE, SafetensorsSource

BF16 = np.dtype(ml_dtypes.bfloat16)
ROOT = Path(__file__).parents[2]


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "embed": rng.standard_normal((16, 8)).astype(BF16),
        "norm": rng.standard_normal(8).astype(np.float32),
        "half": rng.standard_normal((8, 8)).astype(np.float16),
        "ids": np.arange(5),
        "flag": np.array([True, False]),
        "scale": np.array(0.5, BF16),
        "none": np.zeros((0, 3), np.float32),
    }


def make_checkpoint(directory: Path, sharded: bool) -> Path:
    """As save_pretrained lays it out: a config, and one file or shards with an index."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    items = list(some_tensors().items())
    if not sharded:
        safetensors.numpy.save_file(dict(items), directory / SINGLE, {"format": "pt"})
        return directory
    weight_map = {}
    for i, part in enumerate((items[:2], items[2:5], items[5:]), 1):
        file = f"model-{i:05d}-of-00003.safetensors"
        safetensors.numpy.save_file(dict(part), directory / file, {"format": "pt"})
        weight_map |= {name: file for name, _ in part}
    index = {"metadata": {"total_parameters": 227, "total_size": 500}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return directory


def manifest_of(source: SafetensorsSource, **kept) -> Manifest:
    return Manifest(files=source.headers, tensors=source.tensors, index=source.index, **kept)


def specs(source: SafetensorsSource) -> dict:
    return {name: (info.dtype, info.shape) for name, info in source.tensors.items()}


def hashes(directory: Path) -> dict[str, str]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in safetensors.numpy.load_file(path).items()}


def assert_no_leftovers(directory: Path) -> None:
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []


# What is written


@pytest.mark.parametrize("sharded", [False, True])
def test_load_and_save_gives_the_same_bytes(tmp_path, sharded):
    old = make_checkpoint(tmp_path / "old", sharded)
    with SafetensorsSource(old) as source, staged(tmp_path / "new") as staging:
        (staging / "config.json").write_text("{}")
        write_checkpoint(staging, specs(source), source.read, manifest_of(source))
    assert hashes(old) == hashes(tmp_path / "new")
    assert_no_leftovers(tmp_path)


def test_the_same_bytes_in_place_with_buffers_and_duplicates(tmp_path):
    """The parameters alone are given: the buffer and the tied head come from the manifest. Tensors are read lazily."""
    tensors = some_tensors() | {"head": some_tensors()["embed"], "buffer": np.arange(4, dtype=np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / SINGLE).rename(model / SINGLE)
    before = hashes(model)
    with SafetensorsSource(model) as source:
        manifest = manifest_of(source, buffers={"buffer": tensors["buffer"]}, aliases={"head": "embed"})
        for _ in range(2):  # the second time, the files that are read are no longer in the directory
            parameters = {name: spec for name, spec in specs(source).items() if name not in ("head", "buffer")}
            with staged(model, overwrite=True) as staging:
                write_checkpoint(staging, parameters, source.read, manifest)
            assert hashes(model) == before


def test_new_dtypes_and_shards(tmp_path):
    old = make_checkpoint(tmp_path / "old", sharded=True)
    heard: list[tuple[int, int]] = []
    with SafetensorsSource(old) as source, staged(tmp_path / "new") as staging:
        wanted = {name: (np.float32, info.shape) for name, info in source.tensors.items()}
        manifest = manifest_of(source)
        read = lambda name: source.read(name).astype(np.float32)
        write_checkpoint(staging, wanted, read, manifest, 300, lambda *done: heard.append(done))
    loaded = load(tmp_path / "new")
    assert loaded.keys() == some_tensors().keys()
    for name, value in some_tensors().items():
        np.testing.assert_array_equal(loaded[name], value.astype(np.float32), strict=True)
    files = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(tmp_path / "new")) == [*files, INDEX]
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 208, "total_size": 832}
    where = {name: int(file[6:11]) for name, file in index["weight_map"].items()}
    assert where == {"norm": 1, "embed": 2, "half": 3, "ids": 3, "flag": 3, "none": 3, "scale": 3}
    assert heard[-1] == (832, 832) and len(heard) == 7
    SafetensorsSource(tmp_path / "new").close()


def test_one_file_under_any_name_comes_out_under_the_standard_one(tmp_path):
    safetensors.numpy.save_file(some_tensors(), tmp_path / "other.safetensors", {"author": "somebody"})
    with SafetensorsSource(tmp_path / "other.safetensors") as source, staged(tmp_path / "new") as staging:
        write_checkpoint(staging, specs(source), source.read, manifest_of(source))
    assert list(hashes(tmp_path / "new").items()) == [(SINGLE, hashes(tmp_path)["other.safetensors"])]


def test_without_a_manifest_and_with_another_formats_manifest(tmp_path):
    tensors = some_tensors()
    wanted = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    write_checkpoint(tmp_path / "a", wanted, tensors.__getitem__)
    write_checkpoint(tmp_path / "b", wanted, tensors.__getitem__, Manifest(files={}, tensors={}))
    safetensors.numpy.save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == {SINGLE: hashes(tmp_path)[SINGLE]}


def test_metadata_that_all_files_share_is_kept(tmp_path):
    for file, extra in (("s1", {"licence": "x", "part": "1"}), ("s2", {"licence": "x", "part": "2"})):
        safetensors.numpy.save_file({file: np.ones(2, np.float32)}, tmp_path / file, extra)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"s1": "s1", "s2": "s2"}}))
    with SafetensorsSource(tmp_path) as source, staged(tmp_path / "new") as staging:
        wanted = {name: (np.float16, (2,)) for name in source.tensors}
        write_checkpoint(staging, wanted, lambda name: source.read(name).astype(np.float16), manifest_of(source))
    with safetensors.safe_open(tmp_path / "new" / SINGLE, "numpy") as file:
        assert file.metadata() == {"format": "pt", "licence": "x"}


@pytest.mark.parametrize(("dtype", "expected"), [(BF16, np.float32), (np.float16, np.float16)])
def test_a_duplicate_keeps_its_dtype_only_while_its_tensor_does(tmp_path, dtype, expected):
    embed = some_tensors()["embed"]
    safetensors.numpy.save_file({"embed": embed, "head": embed.astype(np.float32)}, tmp_path / SINGLE)
    with SafetensorsSource(tmp_path) as source, staged(tmp_path / "new") as staging:
        manifest = manifest_of(source, aliases={"head": "embed"})
        write_checkpoint(staging, {"embed": (dtype, (16, 8))}, lambda n: source.read(n).astype(dtype), manifest)
        with pytest.raises(ValueError, match="'head' is a duplicate of 'embed', which is not among"):
            write_checkpoint(staging, {"x": (dtype, (1,))}, source.read, manifest)
    loaded = load(tmp_path / "new")
    assert (loaded["embed"].dtype, loaded["head"].dtype) == (dtype, expected)
    np.testing.assert_array_equal(loaded["head"].astype(np.float32), embed.astype(dtype).astype(np.float32))


def test_an_export_holds_one_tensor_at_a_time(tmp_path):
    wanted = {f"w{i}": (np.float32, (256, 1024)) for i in range(12)}
    tracemalloc.start()
    with staged(tmp_path / "new") as staging:
        write_checkpoint(staging, wanted, lambda name: np.ones((256, 1024), np.float32), max_shard_bytes=4 << 20)
    assert tracemalloc.get_traced_memory()[1] < (1 << 20) + 200_000
    tracemalloc.stop()
    assert len(list((tmp_path / "new").glob("*-of-00003.safetensors"))) == 3


def test_write_checkpoint_refuses(tmp_path):
    with pytest.raises(ValueError, match="at least one tensor"):
        write_checkpoint(tmp_path, {}, np.zeros)
    with pytest.raises(ValueError, match="max_shard_bytes should be positive, not 0"):
        write_checkpoint(tmp_path, {"a": (np.float32, (1,))}, lambda _: np.zeros(1, np.float32), max_shard_bytes=0)


# Where it is written


@pytest.fixture(params=["one exchange", "two renames"])
def swap(request, monkeypatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(export, "_exchange", lambda *_: False)
    return request.param


@pytest.fixture
def old(tmp_path) -> Path:
    """A directory that an export is to replace."""
    directory = make_checkpoint(tmp_path / "model", sharded=True)
    (directory / "notes").mkdir()
    (directory / "notes" / "adapter.safetensors").write_text("not at the top: no weights of this checkpoint")
    (directory / "readme").write_text("mine")
    (directory / "link").symlink_to("nowhere")
    return directory


def write_some(staging: Path, read=lambda _: np.ones(4, np.float32)) -> None:
    (staging / "config.json").write_text('{"new": 1}')
    write_checkpoint(staging, {"w": (np.float32, (4,)), "x": (np.float32, (4,))}, read)


def test_a_new_directory(tmp_path):
    with staged(tmp_path / "a" / "b") as staging:
        assert staging.parent == tmp_path / "a" and "jaxlm-export" in staging.name
        write_some(staging)
        assert not (tmp_path / "a" / "b").exists()
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["config.json", SINGLE]
    assert_no_leftovers(tmp_path / "a")


def test_an_empty_directory_needs_no_permission(tmp_path):
    (tmp_path / "out").mkdir(mode=0o700)
    with staged(tmp_path / "out") as staging:
        write_some(staging)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", SINGLE]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_a_full_directory_does(old):
    before = hashes(old)
    with pytest.raises(ValueError, match=r"model: exists and is not empty; pass overwrite=True"), staged(old):
        raise AssertionError("must not begin")
    assert hashes(old) == before
    assert_no_leftovers(old.parent)


@pytest.mark.parametrize("linkable", [True, False])
def test_overwriting_carries_other_files_over(old, swap, linkable, monkeypatch):
    if not linkable:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
    through = old.parent / "alias"
    through.symlink_to(old)
    with staged(through, overwrite=True) as staging:
        write_some(staging)
    assert through.is_symlink()
    assert sorted(os.listdir(old)) == ["config.json", "link", SINGLE, "notes", "readme"]
    assert (old / "readme").read_text() == "mine" and json.loads((old / "config.json").read_text()) == {"new": 1}
    assert (old / "notes" / "adapter.safetensors").exists() and os.readlink(old / "link") == "nowhere"
    assert load(old)["w"].tolist() == [1, 1, 1, 1]
    assert_no_leftovers(old.parent)


def test_places_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    cases = {tmp_path / "file": "is a file", Path("/"): "is a mount point", Path("."): "current directory"}
    for path, expected in cases.items():
        with pytest.raises(ValueError, match=expected), staged(path, overwrite=True):
            raise AssertionError("must not begin")
    (tmp_path / "model" / "disk").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("disk"))
    with pytest.raises(ValueError, match="disk: is a mount point, so"), staged(tmp_path / "model", True) as staging:
        write_some(staging)
    assert os.listdir(tmp_path / "model") == ["disk"]


def test_two_exports_at_once(old, swap):
    with staged(old, overwrite=True) as staging:
        with pytest.raises(ValueError, match="another export into it is running"), staged(old, overwrite=True):
            raise AssertionError("must not begin")
        write_some(staging)
    assert (old / SINGLE).exists()
    assert_no_leftovers(old.parent)


def test_the_old_directory_is_not_taken_for_a_leftover_while_it_is_removed(old, monkeypatch):
    rmtree = export.shutil.rmtree

    def interrupted(path, **options):
        with pytest.raises(ValueError, match="another export into it is running"), staged(old, overwrite=True):
            raise AssertionError("must not begin")
        rmtree(path, **options)

    monkeypatch.setattr(export.shutil, "rmtree", interrupted)
    with staged(old, overwrite=True) as staging:
        write_some(staging)
    assert_no_leftovers(old.parent)


def test_a_directory_filled_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(OSError), staged(tmp_path / "out") as staging:
        write_some(staging)
        (tmp_path / "out" / "theirs").mkdir(parents=True)
    assert os.listdir(tmp_path / "out") == ["theirs"]
    assert_no_leftovers(tmp_path)


def test_a_file_system_without_locks(old, monkeypatch, caplog):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(export.fcntl, "flock", fail)
    with staged(old, overwrite=True) as staging:
        write_some(staging)
    assert "cannot be locked (No locks available); make sure that no other export" in caplog.text
    assert load(old)["w"].tolist() == [1, 1, 1, 1]
    assert_no_leftovers(old.parent)


# What may happen on the way


class Mishap(Exception):
    pass


@pytest.mark.parametrize("kind", [Mishap, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("where", ["read", "body", "_sync_files", "_carry_over", "_sync_directories", "_exchange"])
def test_an_exception_leaves_the_old_directory(old, kind, where, monkeypatch):
    def fail(*_):
        raise kind(where)

    if where.startswith("_"):
        monkeypatch.setattr(export, where, fail)
    before = hashes(old)
    with pytest.raises(kind, match=where), staged(old, overwrite=True) as staging:
        write_some(staging, lambda name: fail() if where == "read" and name == "x" else np.ones(4, np.float32))
        if where == "body":
            fail()
    assert hashes(old) == before
    assert_no_leftovers(old.parent)


@pytest.mark.parametrize("kind", [Mishap, KeyboardInterrupt])
def test_an_exception_between_two_renames_puts_the_old_directory_back(old, kind, monkeypatch):
    rename, calls = os.rename, []

    def fail_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise kind
        rename(source, target)

    monkeypatch.setattr(export, "_exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", fail_second)
    before = hashes(old)
    with pytest.raises(kind), staged(old, overwrite=True) as staging:
        write_some(staging)
    assert hashes(old) == before and len(calls) == 3
    assert_no_leftovers(old.parent)


def run(code: str, directory: Path) -> subprocess.CompletedProcess:
    prelude = "import os, resource, signal, sys; import numpy as np; from pathlib import Path\n"
    prelude += "from jaxlm.checkpoints import export\ndie = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
    command = [sys.executable, "-c", prelude + code, str(directory)]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )


HEEDED = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
EXPORT = """
def read(name):
    if name == "w2" and AT == "tensor": die()
    return np.full(4096, 7, np.float32)
with export.staged(sys.argv[1], overwrite=True) as staging:
    (staging / "config.json").write_text("{}")
    export.write_checkpoint(staging, {f"w{i}": (np.float32, (4096,)) for i in range(4)}, read, None, 40_000)
    if AT == "carry": export._sync_directories = die
    if AT == "swap": export._swap = die
    if AT == "swapped": export._sync = lambda path: die() if path == staging.parent else None
    if AT == "renamed":
        export._exchange, export.shutil.rmtree = lambda *_: False, die
    if AT == "renames":
        export._exchange, rename = lambda *_: False, os.rename
        os.rename = lambda old, new: die() if Path(old) == staging else rename(old, new)
"""


@pytest.mark.parametrize("at", ["tensor", "carry", "swap", "swapped", "renames", "renamed"])
def test_a_killed_export(old, at):
    """SIGKILL at six moments: the old directory is whole, or the new one; the next export clears what is left."""
    before = hashes(old)
    result = run(f"AT = {at!r}" + EXPORT, old)
    assert result.returncode == -signal.SIGKILL, result.stderr
    names = sorted(path.name for path in old.parent.iterdir())
    if at == "renames":  # the window that the module describes; Linux has none
        assert names == [".model.jaxlm-export", ".model.jaxlm-old"]
        assert hashes(old.parent / ".model.jaxlm-old") == before
    elif at in ("swapped", "renamed"):
        leftover = ".model.jaxlm-export" if at == "swapped" else ".model.jaxlm-old"
        assert names == [leftover, "model"]
        assert hashes(old.parent / leftover) == before
        assert load(old).keys() == {"w0", "w1", "w2", "w3"}
    else:
        assert names == [".model.jaxlm-export", "model"]
        assert hashes(old) == before
    with staged(old, overwrite=True) as staging:
        assert os.listdir(staging) == []
        write_some(staging)
    assert sorted(os.listdir(old)) == ["config.json", "link", SINGLE, "notes", "readme"]
    assert load(old)["w"].tolist() == [1, 1, 1, 1]
    assert_no_leftovers(old.parent)


def test_an_interrupted_terminal(old):
    """A real SIGINT while a tensor is written."""
    before = hashes(old)
    code = 'AT, die = "tensor", lambda: os.kill(os.getpid(), signal.SIGINT)\n' + HEEDED + EXPORT
    assert "KeyboardInterrupt" in run(code, old).stderr
    assert hashes(old) == before
    assert_no_leftovers(old.parent)


def test_no_room_left(old):
    """A limit on the size of files stands for a full disk: the same failing write(), in the middle of a tensor."""
    before = hashes(old)
    result = run('AT = ""; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))' + EXPORT, old)
    assert "OSError" in result.stderr and "model-00001-of-00002.safetensors" in result.stderr
    assert hashes(old) == before
    assert_no_leftovers(old.parent)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_sync_that_fails(old, code, monkeypatch):
    def fail(_):
        raise OSError(code, os.strerror(code))

    before = hashes(old)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=rf"{os.strerror(code)}.*{SINGLE}"), staged(old, overwrite=True) as staging:
        write_some(staging)
    assert hashes(old) == before
    assert_no_leftovers(old.parent)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels have no renameat2")
def test_directories_are_exchanged_in_one_step(tmp_path):
    (tmp_path / "a" / "in a").mkdir(parents=True)
    (tmp_path / "b" / "in b").mkdir(parents=True)
    assert export._exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["in b"] and os.listdir(tmp_path / "b") == ["in a"]
    with pytest.raises(FileNotFoundError):
        export._exchange(tmp_path / "a", tmp_path / "absent")
