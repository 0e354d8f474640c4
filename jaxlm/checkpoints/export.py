"""Checkpoints written to a directory that changes in one step: whatever happens on the way, the old one stays whole.

An export into `out` is written to `.out.jaxlm-export` beside it and swapped into place when it is complete and synced.
A killed run leaves that directory behind; the next export into the same place removes it. Where the kernel or the file
system cannot exchange two directories (anything but Linux; some network file systems), two renames do it, and a kill
between them leaves the old directory as `.out.jaxlm-old`, which the next export into the same place puts back first.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoints import files
from jaxlm.checkpoints.manifest import Manifest
from jaxlm.checkpoints.safetensors import INDEX, SINGLE, write_file
from jaxlm.checkpoints.safetensors_header import parse_header

log = logging.getLogger(__name__)

Spec = tuple[np.dtype, tuple[int, ...]]  # dtype and shape
Identity = tuple[int, int]  # device and inode


@contextlib.contextmanager
def staged(directory: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A new directory to write into; it takes the place of `directory` when the block ends without an exception.

    A non-empty `directory` needs `overwrite`; those of its files that the block did not write are carried over, except
    *.safetensors and their index. ValueError, before anything is written, when it cannot be replaced.
    """
    target = Path(os.path.realpath(directory))
    _check_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging, aside = target.with_name(f".{target.name}.jaxlm-export"), target.with_name(f".{target.name}.jaxlm-old")
    staging.mkdir(exist_ok=True)
    with contextlib.ExitStack() as locks:
        mine = [locks.enter_context(_locked(staging, target))]
        try:
            _empty(staging)
            _recover(target, aside)
            replacing = target.is_dir() and any(target.iterdir())
            if replacing and not overwrite:
                raise ValueError(f"{target}: exists and is not empty; pass overwrite=True (--overwrite) to replace it")
            yield staging
            _sync_files(staging)
            if target.is_dir():
                _carry_over(target, staging)
            if replacing:
                # The old directory will lie where the next run looks for leftovers: it stays locked until removed.
                mine.append(locks.enter_context(_locked(target, target)))
            _sync_directories(staging)
            if replacing:
                _swap(staging, target, aside)
            else:
                os.rename(staging, target)
            _sync(target.parent)
        finally:
            # Before the swap these are unfinished files, after it the old ones; another run's are never touched.
            with contextlib.suppress(OSError):
                if _identity(staging) in mine:
                    shutil.rmtree(staging, ignore_errors=True)


def _check_place(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; an export needs a directory")
    if os.path.ismount(target):
        raise ValueError(
            f"{target}: is a mount point, which cannot be replaced in one step; name a directory inside it"
        )
    if Path.cwd().is_relative_to(target):
        raise ValueError(f"{target}: is or holds the current directory; run the export from outside it")


@contextlib.contextmanager
def _locked(directory: Path, target: Path) -> Iterator[Identity]:
    """Holds a directory's lock, which ends with the process; yields what identifies the directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{target}: another export into it is running") from None
        except OSError as e:
            log.warning("%s: cannot be locked (%s); make sure that no other export writes there", directory, e.strerror)
        status = os.fstat(fd)
        identity = status.st_dev, status.st_ino
        if not directory.exists() or identity != _identity(directory):  # it was moved before the lock was ours
            raise ValueError(f"{target}: another export into it is running")
        yield identity
    finally:
        os.close(fd)


def _identity(path: Path) -> Identity:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def _entries(directory: Path) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return list(entries)


def _empty(directory: Path) -> None:
    for entry in _entries(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def _recover(target: Path, aside: Path) -> None:
    """Finishes what a run that was killed between or after two renames left."""
    if aside.is_dir() and not target.exists():
        os.rename(aside, target)
    elif aside.is_dir():
        shutil.rmtree(aside)


def _swap(staging: Path, target: Path, aside: Path) -> None:
    """Puts `staging` in the place of `target`. The old directory ends under the staging name, or is removed."""
    if _exchange(staging, target):
        return
    log.info("%s: directories cannot be exchanged here; replaced by two renames", target)
    try:
        os.rename(target, aside)
        os.rename(staging, target)
    except BaseException:
        if not target.exists() and aside.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two directories in one step; False where that is not possible."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, swap = -100, 2  # AT_FDCWD (unused: both paths are absolute), RENAME_EXCHANGE
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


# What belongs to the model that is being replaced: next to another model's weights it would be read as theirs.
_OF_A_MODEL = (files.CONFIG, files.GENERATION, *files.TOKENIZER)
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pth", ".pt")


def _carry_over(old: Path, new: Path, top: bool = True) -> None:
    """Gives `new` the files of `old` that it lacks, those of the old model excepted; hard links where possible."""
    for entry in _entries(old):
        path = new / entry.name
        if top and (entry.name in _OF_A_MODEL or entry.name.endswith(_WEIGHTS)):
            continue
        if entry.is_dir(follow_symlinks=False):
            if os.path.ismount(entry.path):  # removing the old directory would empty what is mounted
                raise ValueError(f"{entry.path}: is a mount point, so {old} cannot be replaced")
            if path.is_dir() or not os.path.lexists(path):
                path.mkdir(exist_ok=True)
                _carry_over(Path(entry.path), path, top=False)
        elif not os.path.lexists(path):
            try:
                os.link(entry.path, path, follow_symlinks=False)
            except OSError:
                shutil.copy2(entry.path, path, follow_symlinks=False)
                if not path.is_symlink():
                    _sync(path)
    shutil.copymode(old, new)  # last: the old mode may forbid writing


def _sync_files(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for path in (Path(root, name) for name in names):
            if path.is_file() and not path.is_symlink():
                _sync(path)


def _sync_directories(directory: Path) -> None:
    for root, _, _ in os.walk(directory, topdown=False):
        _sync(Path(root))


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        os.close(fd)


def write_checkpoint(
    staging: Path | None,
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    manifest: Manifest | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes {name: (dtype, shape)} as safetensors, and the index if there are several files; one tensor in memory.

    The manifest adds its buffers and the duplicates that it names. When every tensor then has its old dtype and shape,
    the files come out as they were, byte for byte; otherwise they are cut at `max_shard_bytes` and named as the
    transformers package names them. `read(name)` gives a tensor in its dtype; `progress` is told (bytes done, all).
    Without `staging` every tensor is read as it would be, and nothing is written (`write_file`).
    """
    wanted, read = _complete(tensors, read, manifest)
    if not wanted:
        raise ValueError("a checkpoint needs at least one tensor")
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes should be positive, not {max_shard_bytes}")
    total, done = sum(_nbytes(spec) for spec in wanted.values()), 0

    def on_tensor(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    kept: Mapping[str, bytes] = {}
    if manifest and wanted == {name: (info.dtype, info.shape) for name, info in manifest.tensors.items()}:
        kept = manifest.files
    if manifest and kept:
        files: dict[str, list[str]] = {name: [] for name in kept}
        for name, info in manifest.tensors.items():
            files[info.file].append(name)
        index = manifest.index
    else:
        files = _shards(wanted, max_shard_bytes)
        index = _index(files, wanted) if len(files) > 1 else None
    metadata = _metadata(manifest)
    for file, names in files.items():
        # A single file without an index is found only under its standard name.
        path = None if staging is None else staging / (SINGLE if index is None else file)
        write_file(path, [(name, *wanted[name]) for name in names], metadata, read, kept.get(file), on_tensor)
    if staging is not None and index is not None:
        (staging / INDEX).write_bytes(index)


def _complete(
    tensors: Mapping[str, tuple[Any, tuple[int, ...]]], read: Callable[[str], np.ndarray], manifest: Manifest | None
) -> tuple[dict[str, Spec], Callable[[str], np.ndarray]]:
    """The tensors together with the manifest's buffers and duplicates, and how to read them all."""
    wanted = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()}
    if manifest is None:
        return wanted, read
    buffers = {name: value for name, value in manifest.buffers.items() if name not in wanted}
    aliases = {name: target for name, target in manifest.aliases.items() if name not in wanted}
    for name, target in aliases.items():
        if target not in wanted:
            raise ValueError(f"tensor {name!r} is a duplicate of {target!r}, which is not among the tensors to write")
        was, own = manifest.tensors[target], manifest.tensors[name]
        # A duplicate goes where its tensor goes, and keeps its own dtype where that one does.
        unchanged = wanted[target] == (was.dtype, was.shape)
        wanted[name] = (own.dtype, own.shape) if unchanged else wanted[target]
    wanted |= {name: (value.dtype, value.shape) for name, value in buffers.items()}

    def read_any(name: str) -> np.ndarray:
        if name in buffers:
            return buffers[name]
        if name in aliases:
            return read(aliases[name]).astype(wanted[name][0], copy=False)
        return read(name)

    return wanted, read_any


def _nbytes(spec: Spec) -> int:
    return spec[0].itemsize * math.prod(spec[1])


def _shards(wanted: Mapping[str, Spec], max_bytes: int) -> dict[str, list[str]]:
    """File -> tensors, in the order given, a new file where the next tensor would not fit; larger ones stand alone."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in wanted.items():
        if shards[-1] and size + _nbytes(spec) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(spec)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _index(files: Mapping[str, list[str]], wanted: Mapping[str, Spec]) -> bytes:
    metadata = {
        "total_parameters": sum(math.prod(shape) for _, shape in wanted.values()),
        "total_size": sum(_nbytes(spec) for spec in wanted.values()),
    }
    weight_map = {name: file for file, names in files.items() for name in names}
    return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n").encode()


def _metadata(manifest: Manifest | None) -> dict[str, str]:
    """Header metadata of new files: what all the old ones agree on. Readers expect a format; "pt" names the layout."""
    old = [parse_header(raw, 0)[1].items() for raw in manifest.files.values()] if manifest else []
    return {"format": "pt"} | dict(sorted(functools.reduce(lambda a, b: a & b, old, old[0])) if old else [])
