"""A repository on the Hugging Face hub: "org/name" becomes a directory in the cache of huggingface_hub.

Only a checkpoint's own files are asked for: config.json, the tokenizer and the safetensors, never a pickle. The weights
come last, and a file gets its name only when it is whole: so a directory that holds its weights holds the rest too.
"""

import contextlib
import dataclasses
import glob
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxlm.checkpoints import files
from jaxlm.checkpoints.safetensors import INDEX, SINGLE
from jaxlm.checkpoints.safetensors_header import some

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

_REPO = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_NO_REPO = re.compile(r"--|\.\.|[.-](/|$)|\.(git|gguf|pth)$")  # not allowed on the hub; .gguf and .pth are paths
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
_TIMEOUT = 10  # seconds for the first answer, as huggingface_hub waits for its own


def is_repo(name: str) -> bool:
    """Whether a name has the form "org/name" of a repository on the hub."""
    return bool(_REPO.fullmatch(name)) and not _NO_REPO.search(name)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a repository's files come from and go to: the arguments of every call to huggingface_hub."""

    repo: str
    revision: str | None
    token: str | None
    cache: str
    endpoint: str

    @property
    def name(self) -> str:
        return self.repo if self.revision is None else f"{self.repo} at revision {self.revision!r}"


def snapshot(
    repo: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The directory of a repository's checkpoint, downloaded where the cache lacks it.

    revision: a branch, tag or commit, default "main". token: default HF_TOKEN, or that of `hf auth login`. cache_dir:
    default huggingface_hub's (HF_HUB_CACHE). local_files_only, or HF_HUB_OFFLINE=1: no request at all. progress is told
    (bytes done, bytes in all) of the weights; without it a bar is shown where stderr is a terminal. HF_ENDPOINT names
    another hub. An error says what to do: FileNotFoundError, PermissionError, ConnectionError or ValueError.
    """
    from huggingface_hub import constants

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")  # its own constant is read at import
    if not is_repo(repo):
        raise ValueError(f"{repo!r} is not the name of a repository on the hub: expected 'org/name'")
    for option, value in (("revision", revision), ("token", token)):
        if value is not None and not value.strip():
            raise ValueError(f"{repo}: {option} is empty; leave it out for the default")
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"HF_ENDPOINT is {endpoint!r}, expected a URL that starts with https:// or http://")
    cache = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
    place = _Place(repo, revision, token, str(cache), endpoint)
    if local_files_only or constants.HF_HUB_OFFLINE:
        switch = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE=1"
        return _cached(place, f"{switch} forbids the download")
    try:
        info = _info(place)
    except ConnectionError as problem:
        try:
            directory = _cached(place, str(problem))
        except FileNotFoundError as absent:
            raise ConnectionError(str(absent)) from problem
        log.warning("%s: %s; using the copy in the cache, which may be older", place.name, problem)
        return directory
    return _complete(place, info, progress)


def _cached(place: _Place, why: str) -> Path:
    """The directory in the cache, without a request; FileNotFoundError unless it is complete."""
    directory = _in_cache(place)
    if directory is None:
        raise FileNotFoundError(f"{place.name} is not in the cache {place.cache}, and {why}")
    if missing := _missing(directory):
        raise FileNotFoundError(
            f"{place.name}: its download into {place.cache} was interrupted ({some(missing)} missing), and {why}"
        )
    return directory


def _in_cache(place: _Place) -> Path | None:
    """The directory that the revision had when it was last asked for."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(place.repo, files.CONFIG, cache_dir=place.cache, revision=place.revision)
    return Path(config).parent if isinstance(config, str) else None


def _missing(directory: Path) -> list[str]:
    """The weights that a directory should have and has not."""
    if (directory / SINGLE).is_file():
        return []
    if not (directory / INDEX).is_file():
        return [SINGLE]
    return [name for name in _shards(directory / INDEX) if not (directory / name).is_file()]


def _shards(index: Path) -> list[str]:
    """The files of an index; ValueError for anything that is not a safetensors file beside it."""
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map should map tensor names to files")
    names = {str(name) for name in places.values()}
    if bad := sorted(name for name in names if "/" in name or not name.endswith(".safetensors")):
        raise ValueError(f"{index}: places tensors in {some(bad)}; expected names of .safetensors files beside it")
    return sorted(names)


def _info(place: _Place) -> Any:
    """What the hub says of the revision: its commit, and its files with their sizes. ConnectionError if it is away."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=place.endpoint, token=place.token)
    with _explained(place, f"{place.endpoint} cannot be reached ({{}})"):
        return api.model_info(place.repo, revision=place.revision, files_metadata=True, timeout=_TIMEOUT)


def _complete(place: _Place, info: Any, progress: Progress | None) -> Path:
    """Downloads what the cache lacks of the commit in `info`: the small files, then the weights."""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    if files.CONFIG not in sizes:
        if pth := [name for name in sorted(sizes) if name.endswith(".pth")]:
            raise FileNotFoundError(
                f"{place.name} has no {files.CONFIG}, but {some(pth)}: if that is RWKV, download one file with "
                f"`hf download {place.repo} {pth[0]}` and load it by its path"
            )
        raise FileNotFoundError(f"{place.name} has no {files.CONFIG}; it holds {some(sorted(sizes))}")
    weights = _weights(place, sorted(sizes))
    small = [name for name in (files.CONFIG, files.GENERATION, *files.TOKENIZER, INDEX) if name in sizes]
    if weights == SINGLE and INDEX in small:
        small.remove(INDEX)  # with both, there would be two sets of weights to choose from
    directory = _in_cache(place)
    if directory is None or directory.name != info.sha or not all((directory / name).is_file() for name in small):
        # By its own name, so that the cache remembers which commit it stood for.
        directory = _fetch(place, place.revision, small, _bars(lambda *_: None, 0))
        if directory.name != info.sha:
            raise FileNotFoundError(f"{place.name} changed on the hub during the download; call again")
    wanted = [SINGLE] if weights == SINGLE else _shards(directory / INDEX)
    if absent := [name for name in wanted if name not in sizes]:
        raise FileNotFoundError(f"{place.name}: its {INDEX} names {some(absent)}, which the repository does not hold")
    if lacking := [name for name in wanted if not (directory / name).is_file()]:
        _fetch(place, info.sha, lacking, _bars(progress, sum(sizes[name] for name in lacking)))
    if missing := _missing(directory):
        raise ConnectionError(f"{place.name}: {some(missing)} did not arrive; call again")
    return directory


def _weights(place: _Place, names: list[str]) -> str:
    """The file to begin with: model.safetensors or the index of shards, whatever variants lie beside it."""
    for name in (SINGLE, INDEX):
        if name in names:
            return name
    if others := [name for name in names if name.endswith(".safetensors")]:
        raise FileNotFoundError(f"{place.name} has no {SINGLE} or {INDEX}; its safetensors are {some(others)}")
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise ValueError(
            f"{place.name} has only pickled PyTorch weights ({some(pickles)}), which are not loaded, because "
            f"unpickling can run any code; convert them once, where torch is installed: {_conversion(place)}"
        )
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        raise FileNotFoundError(
            f"{place.name} has only GGUF files ({some(ggufs)}): download one with `hf download {place.repo} "
            f"{ggufs[0]}` and load it by its path"
        )
    raise FileNotFoundError(f"{place.name} has no safetensors; it holds {some(names)}")


def _conversion(place: _Place) -> str:
    """The command that writes a pickled checkpoint as safetensors beside us."""
    where = f'"{place.repo}"' if place.revision is None else f'"{place.repo}", revision="{place.revision}"'
    to = f'"{place.repo.split("/")[1]}-safetensors"'
    return (
        "python -c 'from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"M.from_pretrained({where}).save_pretrained({to}); T.from_pretrained({where}).save_pretrained({to})'"
    )


def _fetch(place: _Place, revision: str | None, names: Iterable[str], bars: Any) -> Path:
    """Downloads these files, those that the cache has excepted."""
    from huggingface_hub import snapshot_download

    stopped = (
        f"{place.name}: the download stopped ({{}}); call again to get the rest: the files that have arrived are kept "
        f"in {place.cache}"
    )
    with _explained(place, stopped):
        return Path(
            snapshot_download(
                place.repo,
                revision=revision,
                token=place.token,
                cache_dir=place.cache,
                endpoint=place.endpoint,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=bars,
            )
        )


def _bars(progress: Progress | None, total: int) -> Any:
    """The class of huggingface_hub's bars: its own on a terminal, else one that shows nothing and tells `progress`."""
    from huggingface_hub.utils.tqdm import tqdm

    if progress is None and sys.stderr is not None and sys.stderr.isatty():
        return None
    done, lock = 0, threading.Lock()

    class Told(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            self.counts = kwargs.get("name") == "huggingface_hub.snapshot_download"  # the sum over all files
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if self.counts and progress is not None:
                with lock:  # each file has its thread
                    done += int(n or 0)
                    progress(done, max(total, done))

    return Told


@contextlib.contextmanager
def _explained(place: _Place, trouble: str) -> Iterator[None]:
    """Raises as one line what huggingface_hub raises: a refusal, or `trouble` with the reason put in."""
    from huggingface_hub import errors

    try:
        yield
    # HTTPError is that of httpx or of httpx2, whichever this version uses; bad JSON comes from what is no hub at all.
    except (errors.HTTPError, OSError, json.JSONDecodeError) as error:  # pyright: ignore[reportPrivateImportUsage]
        cause = _cause(error)
        if refusal := _refusal(place, cause):
            raise refusal from error
        local = isinstance(cause, OSError) and cause.errno is not None  # a full disk, a cache that cannot be written
        raise (OSError if local else ConnectionError)(trouble.format(_reason(cause))) from error


def _cause(error: BaseException) -> BaseException:
    """What made huggingface_hub look into its cache: not to find the file there is all that it tells."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _refusal(place: _Place, error: BaseException) -> Exception | None:
    """The error for a hub that has answered, and means it."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return PermissionError(
            f"{place.repo} is gated: accept its licence on {place.endpoint}/{place.repo}, then pass token= or set "
            "HF_TOKEN to a token of the account that did"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"{place.repo}: no such directory here, and no such repository on {place.endpoint}; if it is private, pass "
            "token= or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        revision = place.revision or "main"
        return FileNotFoundError(f"{place.repo} has no revision {revision!r}: expected a branch, tag or commit")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return PermissionError(
            f"{place.repo}: {place.endpoint} refuses access ({_reason(error)}); check token= or HF_TOKEN"
        )
    return None


def _reason(error: BaseException) -> str:
    """One line."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        said = error.response.headers.get("X-Error-Message") or error.response.reason_phrase
        return f"HTTP {error.response.status_code} {said}".strip()
    if isinstance(error, json.JSONDecodeError):
        return "it does not answer as a hub does"
    return str(error).split("\n")[0].rstrip(".") or type(error).__name__
