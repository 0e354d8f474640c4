"""Tokenized examples in a directory, memory-mapped: a run starts at once, and holds only the pages that it touches.

header.json    what it was made of, and from what; see `Header`
tokens.bin     uint16 or uint32, the examples one after another
mask.bin       a bit for each token, lowest first: whether it is to be predicted
offsets.bin    int64 [examples + 1]
bad_rows.jsonl the rows that were left out, each with its place and the reason
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.data.formats import Example, FormatConfig
from jaxlm.data.rows import BadRow

MAGIC, VERSION = "jaxlm token cache", 1
HEADER, TOKENS, MASK, OFFSETS, BAD = "header.json", "tokens.bin", "mask.bin", "offsets.bin", "bad_rows.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """What a cache holds and was made of.

    `sources`: {"path", "bytes", "sha256", "modified_ns"} of each file. `rows`: how many rows, by what became of them.
    `tokenizer`: its "source", "fingerprint", "vocab_size" and special ids. `sha256` is that of the tokens, mask and
    offsets: equal for caches with the same content. `data`: the other options they were prepared with.
    """

    dtype: str
    examples: int
    tokens: int
    loss_tokens: int
    longest: int
    sha256: str
    tokenizer: dict[str, Any]
    format: FormatConfig
    sources: tuple[dict[str, Any], ...]
    rows: dict[str, int]
    data: dict[str, Any]


class TokenCache:
    """An open cache. `tokens`, `offsets` and `lengths` are arrays; cache[i] is (ids int32 [n], mask bool [n])."""

    def __init__(self, path: Path, header: Header):
        self.path, self.header = path, header
        self.tokens = _mapped(path / TOKENS, header.dtype, header.tokens)
        self.offsets = _mapped(path / OFFSETS, "int64", header.examples + 1)
        self._bits = _mapped(path / MASK, "uint8", -(-header.tokens // 8))
        self.lengths = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != header.tokens or (self.lengths < 1).any():
            raise ValueError(f"{path}: {OFFSETS} does not fit {TOKENS}: the cache is damaged; prepare it again")

    def __len__(self) -> int:
        return self.header.examples

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        index = range(len(self))[index]
        at = np.arange(self.offsets[index], self.offsets[index + 1])
        return self.tokens[at].astype(np.int32), self.mask(at)

    def mask(self, at: np.ndarray) -> np.ndarray:
        """bool: the mask of tokens by their number in the cache."""
        return ((self._bits[at >> 3] >> (at & 7).astype(np.uint8)) & 1).astype(bool)

    def check(self) -> None:
        """Reads everything and compares the checksum; ValueError where it differs."""
        digests = [hashlib.sha256() for _ in range(3)]
        for digest, name in zip(digests, (TOKENS, MASK, OFFSETS), strict=True):
            with (self.path / name).open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        if _joined(digests) != self.header.sha256:
            raise ValueError(f"{self.path}: the checksum differs: the cache is damaged; prepare it again")


def open_cache(
    path: str | Path, *, tokenizer: Any = None, format: FormatConfig | None = None, check_sources: bool = True
) -> TokenCache:
    """Opens what `prepare` wrote.

    ValueError, with what to do, when it was made with another tokenizer or format than those given, when one of its
    source files has changed since, or when it is damaged or of another version. Sources that are gone are not missed.
    """
    path = Path(path)
    header = read_header(path)
    again = f"Prepare it again (jaxlm prepare ... {path} --overwrite), or give another directory."
    if tokenizer is not None and (found := fingerprint(tokenizer)) != header.tokenizer["fingerprint"]:
        raise ValueError(
            f"{path} was made with another tokenizer: {header.tokenizer['source']}, fingerprint "
            f"{header.tokenizer['fingerprint'][:12]}, and this one has {found[:12]}. {again}"
        )
    if format is not None and format != header.format:
        given, had = dataclasses.asdict(format), dataclasses.asdict(header.format)
        changed = [f"{name}={had[name]!r} (now {given[name]!r})" for name in given if given[name] != had[name]]
        raise ValueError(f"{path} was made with another format: {', '.join(changed)}. {again}")
    if check_sources:
        for source in header.sources:
            if problem := changed_source(source):
                raise ValueError(f"{path} is stale: {source['path']} {problem} since it was made. {again}")
    return TokenCache(path, header)


def read_header(path: Path) -> Header:
    """The header of a cache; ValueError for a directory that is none."""
    try:
        value = json.loads((path / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is no token cache: it has no {HEADER}; jaxlm prepare makes one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path / HEADER}: {problem}; prepare it again") from problem
    if not isinstance(value, dict) or value.get("magic") != MAGIC:
        raise ValueError(f"{path / HEADER} is not that of a token cache")
    if value.get("version") != VERSION:
        raise ValueError(
            f"{path} is a token cache of version {value.get('version')}, and this jaxlm reads version {VERSION}: "
            f"prepare it again (jaxlm prepare ... --overwrite)"
        )
    names = {field.name for field in dataclasses.fields(Header)}
    if (found := value.keys() - {"magic", "version"}) != names:
        raise ValueError(f"{path / HEADER}: fields {', '.join(sorted(found ^ names))} unknown or missing")
    form = {name: _tuples(part) for name, part in value["format"].items()}
    known = {name: value[name] for name in names}
    return Header(**known | {"format": FormatConfig(**form), "sources": tuple(value["sources"])})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _mapped(file: Path, dtype: str, count: int) -> np.ndarray:
    expected = np.dtype(dtype).itemsize * count
    if not file.is_file() or file.stat().st_size != expected:
        found = f"{file.stat().st_size} bytes" if file.is_file() else "nothing"
        raise ValueError(f"{file}: expected {expected} bytes, found {found}: the cache is damaged; prepare it again")
    return np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r", shape=(count,))


def fingerprint(tokenizer: Any) -> str:
    """sha256 of all that decides about a tokenizer's ids, its chat template and special tokens included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        pipeline: Any = sorted(tokenizer.get_vocab().items())
    else:
        pipeline = json.loads(backend.to_str())
        for state in ("truncation", "padding"):  # of the last call
            pipeline.pop(state, None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    parts = [pipeline, special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def describe_source(file: Path) -> dict[str, Any]:
    """What `changed_source` compares."""
    status = file.stat()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {
        "path": str(file.resolve()),
        "bytes": status.st_size,
        "sha256": digest,
        "modified_ns": status.st_mtime_ns,
    }


def changed_source(source: dict[str, Any]) -> str:
    """What has changed of a source file, or nothing. The content is read only where the time of the change differs."""
    file = Path(source["path"])
    if not file.is_file():
        return ""
    status = file.stat()
    if status.st_size != source["bytes"]:
        return f"has changed from {source['bytes']} to {status.st_size} bytes"
    if status.st_mtime_ns != source["modified_ns"] and describe_source(file)["sha256"] != source["sha256"]:
        return "has changed"
    return ""


class CacheWriter:
    """Writes the files of a cache; the header, and with it the cache, is complete after `finish`."""

    def __init__(self, directory: Path, vocab_size: int):
        self.directory = directory
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.examples = self.tokens = self.loss_tokens = self.longest = 0
        self._carried = np.zeros(0, bool)  # bits that do not fill a byte yet
        self._files = [(directory / name).open("wb") for name in (TOKENS, MASK, OFFSETS)]
        self._digests = [hashlib.sha256() for _ in self._files]
        self._bad = (directory / BAD).open("w", encoding="utf-8")
        self._write(2, np.zeros(1, "<i8"))

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in (*self._files, self._bad):
            file.close()

    def _write(self, which: int, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).tobytes()
        self._files[which].write(data)
        self._digests[which].update(data)

    def add(self, made: Sequence[Example]) -> None:
        if not made:
            return
        ids = np.concatenate([example.ids for example in made])
        mask = np.concatenate([self._carried, *(example.mask for example in made)])
        lengths = np.array([len(example.ids) for example in made])
        self._write(0, ids.astype(self.dtype))
        whole = len(mask) // 8 * 8
        self._write(1, np.packbits(mask[:whole], bitorder="little"))
        self.loss_tokens += int(mask.sum()) - int(self._carried.sum())
        self._carried = mask[whole:]
        self._write(2, (self.tokens + np.cumsum(lengths)).astype("<i8"))
        self.examples += len(made)
        self.tokens += len(ids)
        self.longest = max(self.longest, int(lengths.max()))

    def add_bad(self, row: BadRow) -> None:
        self._bad.write(json.dumps({"where": row.where, "reason": row.reason}, ensure_ascii=False) + "\n")

    def finish(self, **rest: Any) -> None:
        """Writes the header; `rest` are its fields that were not counted here."""
        self._write(1, np.packbits(self._carried, bitorder="little"))
        self.__exit__()
        counted = {name: getattr(self, name) for name in ("examples", "tokens", "loss_tokens", "longest")}
        header = Header(dtype=self.dtype.name, sha256=_joined(self._digests), **counted, **rest)
        value = {"magic": MAGIC, "version": VERSION, **dataclasses.asdict(header)}
        (self.directory / HEADER).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _joined(digests: Sequence[Any]) -> str:
    return hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest()
