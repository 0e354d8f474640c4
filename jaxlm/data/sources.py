"""Where rows come from: JSONL, Parquet, plain text and Hugging Face `datasets`, all with random access.

A source is a file, several files, a glob pattern, a directory of files of one kind, a directory written by
`datasets.Dataset.save_to_disk`, or org/name of a data set on the hub.
"""

import bisect
import glob
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jaxlm.data.rows import BadRow, Rows, near
from jaxlm.opening import on_hub

KINDS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md", ".rst"),
}
DOCUMENTS = ("file", "blank", "line", "separator=LINE")
SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # of datasets' save_to_disk

Span = tuple[int, int, int]  # bytes start..stop of a file, and the line where they begin


def open_rows(
    source: str | Path | Sequence[str | Path],
    *,
    kind: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    documents: str = "file",
) -> Rows:
    """The rows of a source.

    `kind` ("jsonl", "parquet" or "text") stands in for the files' endings; `split` and `subset` belong to Hugging Face
    data sets. `documents` says what one row of a text file is: the "file", what lies between "blank" lines, a "line",
    or what lies between lines equal to X ("separator=X"). Text rows have one column, "text".
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}{near(kind, KINDS)}")
    rule = _rule(documents)
    parts = [source] if isinstance(source, (str, Path)) else list(source)
    if not parts:
        raise ValueError("no source is given")
    if dataset := _dataset(parts, kind):
        if documents != "file":
            raise ValueError(f"documents={documents!r} is for text files, and {parts[0]} is a Hugging Face data set")
        return dataset(split, subset)
    given = {"split": split, "subset": subset}
    if extra := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"{', '.join(extra)}: only for a Hugging Face data set, and {parts[0]} is none")
    files = [file for part in parts for file in _files(Path(part), kind)]
    kinds = {file: kind or _kind(file) for file in files}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"{', '.join(map(str, parts))} holds files of several kinds ({', '.join(sorted(set(kinds.values())))}): "
            f"name the files, or use a pattern like 'data/*.jsonl'"
        )
    if kinds[files[0]] != "text" and documents != "file":
        raise ValueError(f"documents={documents!r} is for text files, and {files[0]} is {kinds[files[0]]}")
    make: dict[str, Callable[[Path], Rows]] = {
        "jsonl": Jsonl,
        "parquet": Parquet,
        "text": lambda file: Text(file, rule),
    }
    return joined([make[kinds[file]](file) for file in files])


def _dataset(parts: Sequence[str | Path], kind: str | None) -> Callable[[str | None, str | None], "HuggingFace"] | None:
    """How to open a data set of the `datasets` package, if that is what a source is."""
    source, directory = parts[0], Path(parts[0])
    if len(parts) > 1:
        return None
    if directory.is_dir() and any((directory / name).is_file() for name in SAVED):
        return lambda split, subset: _saved(directory, split, subset)
    endings = [ending for endings in KINDS.values() for ending in endings]
    if kind is None and on_hub(source) and directory.suffix not in endings:  # data/rows.jsonl, mistyped, is no name
        return lambda split, subset: _hub(str(source), split, subset)
    return None


def _files(path: Path, kind: str | None) -> list[Path]:
    """The files of a path, a directory or a pattern, sorted by name."""
    if path.is_file():
        return [path]
    if path.is_dir():
        endings = KINDS[kind] if kind else tuple(e for endings in KINDS.values() for e in endings)
        found = sorted(file for file in path.iterdir() if file.suffix in endings and file.is_file())
        if not found:
            raise FileNotFoundError(f"{path} holds no file ending in {', '.join(endings)}")
        return found
    if found := sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()):
        return found
    raise FileNotFoundError(
        f"{path}: no such file, directory or pattern (a data set on the Hugging Face hub is named org/name)"
    )


def _kind(file: Path) -> str:
    for kind, endings in KINDS.items():
        if file.suffix in endings:
            return kind
    known = [ending for endings in KINDS.values() for ending in endings]
    raise ValueError(
        f"{file}: what it holds cannot be told from its ending {file.suffix!r}{near(file.suffix, known)}; pass "
        f"kind= (--kind), one of {', '.join(KINDS)}"
    )


# Files cut into pieces of bytes


def _rule(documents: str) -> Callable[[BinaryIO], Iterable[Span]]:
    name, _, separator = documents.partition("=")
    if name == "separator" and separator:
        return lambda file: _between(file, lambda line: line.rstrip(b"\r\n") == separator.encode())
    rules = {
        "file": lambda file: [(0, size, 1)] if (size := file.seek(0, 2)) else [],
        "line": _lines,
        "blank": lambda file: _between(file, lambda line: not line.strip()),
    }
    if documents not in rules:
        raise ValueError(f"documents={documents!r}: expected one of {', '.join(DOCUMENTS)}{near(documents, DOCUMENTS)}")
    return rules[documents]


def _lines(file: BinaryIO) -> Iterable[Span]:
    """Every line that is not blank, without its end."""
    start = 0
    for number, line in enumerate(file, 1):
        if line.strip():
            yield start, start + len(line.rstrip(b"\r\n")), number
        start += len(line)


def _between(file: BinaryIO, separates: Callable[[bytes], bool]) -> Iterable[Span]:
    """What lies between separating lines, without the end of its last line."""
    start, first, begin, stop = 0, 0, 0, 0
    for number, line in enumerate(file, 1):
        if separates(line):
            if first:
                yield begin, stop, first
            first = 0
        elif first or line.strip():
            if not first:
                begin, first = start, number
            stop = start + len(line.rstrip(b"\r\n"))
        start += len(line)
    if first:
        yield begin, stop, first


class _Pieces(Rows):
    """A file whose rows are spans of its bytes, found in one pass when it is opened."""

    def __init__(self, file: Path, rule: Callable[[BinaryIO], Iterable[Span]]):
        self.file, self.files = file, (file,)
        self._spans = array("q")
        with file.open("rb") as opened:
            for span in rule(opened):
                self._spans.extend(span)

    def __len__(self) -> int:
        return len(self._spans) // 3

    def where(self, index: int) -> str:
        return f"{self.file}:{self._spans[3 * index + 2]}"

    def _text(self, opened: BinaryIO, index: int) -> str:
        """The text of a row; raises BadRow where it is not UTF-8."""
        start, stop, line = self._spans[3 * index : 3 * index + 3]
        opened.seek(start)
        data = opened.read(stop - start)
        try:
            return data.decode("utf-8-sig" if start == 0 else "utf-8")
        except UnicodeDecodeError as problem:
            line += data.count(b"\n", 0, problem.start)
            reason = f"not UTF-8: {problem.reason} 0x{data[problem.start]:02x} at byte {start + problem.start}"
            raise BadRow(f"{self.file}:{line}", reason) from None

    def row(self, text: str, index: int) -> dict[str, Any]:
        """A row from its text; raises BadRow."""
        raise NotImplementedError

    def read(self, start: int, stop: int) -> list[dict[str, Any] | BadRow]:
        made: list[dict[str, Any] | BadRow] = []
        with self.file.open("rb") as opened:
            for index in range(start, stop):
                try:
                    made.append(self.row(self._text(opened, index), index))
                except BadRow as bad:
                    made.append(bad)
        return made


class Text(_Pieces):
    """Documents of a text file: one column, "text"."""

    columns = ("text",)

    def row(self, text: str, index: int) -> dict[str, Any]:
        return {"text": text}


class Jsonl(_Pieces):
    """One JSON object a line; blank lines do not count."""

    def __init__(self, file: Path):
        with file.open("rb") as opened:
            if opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                raise ValueError(f"{file}: a JSON array, expected JSONL: one object a line (jq -c '.[]' converts it)")
        super().__init__(file, _lines)

    def row(self, text: str, index: int) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as problem:
            at = f" at column {problem.colno}" if isinstance(problem, json.JSONDecodeError) else ""
            raise BadRow(self.where(index), f"invalid JSON: {getattr(problem, 'msg', problem)}{at}") from None
        if not isinstance(value, dict):
            raise BadRow(self.where(index), f"expected a JSON object, found {type(value).__name__}")
        return value


class Parquet(Rows):
    """A Parquet file, read a row group at a time; the last group is kept."""

    def __init__(self, file: Path):
        self.file, self.files = file, (file,)
        self._opened: Any = None
        self._kept: tuple[int, Any] = (-1, None)
        metadata = self._parquet().metadata
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self.columns = tuple(self._parquet().schema_arrow.names)

    def _parquet(self) -> Any:
        if self._opened is None:
            import pyarrow
            import pyarrow.parquet

            try:
                self._opened = pyarrow.parquet.ParquetFile(self.file)
            except pyarrow.ArrowInvalid as problem:
                raise ValueError(f"{self.file}: not a Parquet file: {problem}") from problem
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "_kept": (-1, None)}

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        return f"{self.file}: row {index}"

    def only(self, columns: Sequence[str]) -> "Parquet":
        self.columns = tuple(name for name in self.columns or () if name in columns)
        return self

    def _group(self, group: int) -> Any:
        if self._kept[0] != group:
            self._kept = group, self._parquet().read_row_group(group, columns=list(self.columns or ()))
        return self._kept[1]

    def read(self, start: int, stop: int) -> list[dict[str, Any] | BadRow]:
        made: list[dict[str, Any] | BadRow] = []
        while start < stop:
            group = bisect.bisect_right(self._starts, start) - 1
            first, end = self._starts[group], min(stop, self._starts[group + 1])
            table = self._group(group).slice(start - first, end - start)
            made += _as_rows(lambda a, n, table=table: table.slice(a, n).to_pylist(), end - start, start, self.where)
            start = end
        return made


class HuggingFace(Rows):
    """A split of a data set of the `datasets` package."""

    def __init__(self, dataset: Any, name: str):
        self.dataset, self.name = dataset.with_format(None), name
        self.columns = tuple(dataset.column_names)
        self.files = tuple(dict.fromkeys(Path(file["filename"]) for file in dataset.cache_files))

    def __len__(self) -> int:
        return len(self.dataset)

    def where(self, index: int) -> str:
        return f"{self.name}: row {index}"

    def only(self, columns: Sequence[str]) -> "HuggingFace":
        self.dataset = self.dataset.select_columns([name for name in self.columns or () if name in columns])
        self.columns = tuple(self.dataset.column_names)
        return self

    def read(self, start: int, stop: int) -> list[dict[str, Any] | BadRow]:
        def rows(first: int, count: int) -> list[dict[str, Any]]:
            columns = self.dataset[start + first : start + first + count]
            return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

        return _as_rows(rows, stop - start, start, self.where)


def _as_rows(
    get: Callable[[int, int], list[dict[str, Any]]], count: int, start: int, where: Callable[[int], str]
) -> list[dict[str, Any] | BadRow]:
    """All rows at once, or one by one where one of them holds a string that is not UTF-8."""
    try:
        return list(get(0, count))
    except UnicodeDecodeError as problem:
        if count == 1:
            return [BadRow(where(start), f"not UTF-8: {problem.reason} at byte {problem.start} of a value")]
        return [row for i in range(count) for row in _as_rows(lambda a, n, i=i: get(i, n), 1, start + i, where)]


def _saved(directory: Path, split: str | None, subset: str | None) -> HuggingFace:
    import datasets

    if subset is not None:
        raise ValueError(f"subset={subset!r} is for data sets of the hub, and {directory} is a directory")
    return HuggingFace(*_split(datasets.load_from_disk(str(directory)), str(directory), split))


def _hub(source: str, split: str | None, subset: str | None) -> HuggingFace:
    import datasets

    return HuggingFace(*_split(datasets.load_dataset(source, subset), source, split))


def _split(loaded: Any, name: str, split: str | None) -> tuple[Any, str]:
    """One split of what was loaded, and how to call it."""
    if not isinstance(loaded, dict):
        if split is not None and split != str(loaded.split):
            raise ValueError(f"{name} has no splits, so there is no {split!r}")
        return loaded, name
    if split is None and len(loaded) == 1:
        split = next(iter(loaded))
    if split not in loaded:
        said = "has several splits" if split is None else f"has no split {split!r}{near(split, loaded)}"
        raise ValueError(f"{name} {said}: pass split= (--split), one of {', '.join(loaded)}")
    return loaded[split], f"{name}[{split}]"


class Joined(Rows):
    """Several sources, one after another."""

    def __init__(self, parts: Sequence[Rows]):
        self.parts = list(parts)
        self._starts = [0]
        for part in self.parts:
            self._starts.append(self._starts[-1] + len(part))
        self.files = tuple(file for part in self.parts for file in part.files)
        self.columns = self.parts[0].columns
        for part in self.parts:
            if part.columns != self.columns:
                raise ValueError(
                    f"{part.files[0]} has the columns {', '.join(part.columns or ())}, but {self.parts[0].files[0]} "
                    f"has {', '.join(self.columns or ())}"
                )

    def __len__(self) -> int:
        return self._starts[-1]

    def _part(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def where(self, index: int) -> str:
        part = self._part(index)
        return self.parts[part].where(index - self._starts[part])

    def only(self, columns: Sequence[str]) -> "Joined":
        return Joined([part.only(columns) for part in self.parts])

    def read(self, start: int, stop: int) -> list[dict[str, Any] | BadRow]:
        made: list[dict[str, Any] | BadRow] = []
        while start < stop:
            part = self._part(start)
            end, first = min(stop, self._starts[part + 1]), self._starts[part]
            made += self.parts[part].read(start - first, end - first)
            start = end
        return made


def joined(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else Joined(parts)
