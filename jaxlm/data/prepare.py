"""A source of rows made into a cache of tokens, once, by as many processes as are given."""

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxlm.checkpoints.export import staged
from jaxlm.data.cache import CacheWriter, TokenCache, describe_source, fingerprint, open_cache, read_header
from jaxlm.data.formats import Example, Format, FormatConfig, examples, formatter
from jaxlm.data.rows import BadRow, Rows, near
from jaxlm.data.sources import open_rows

CHUNK = 512  # rows at a time
SHOWN = 5  # bad rows in a message
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to tokenize and how: the options of `jaxlm prepare`, and the fields of its YAML file.

    The options of `open_rows`, those of `FormatConfig` (`format` is its name), and `max_bad_rows`, the share of rows,
    from 0 to 1, that may be bad before that is an error.
    """

    source: tuple[str, ...]
    tokenizer: str
    kind: str | None = None
    split: str | None = None
    subset: str | None = None
    documents: str = "file"
    format: str = "text"
    columns: tuple[tuple[str, str], ...] = ()
    ignore_columns: tuple[str, ...] = ()
    eos: bool = True
    train_on_prompt: bool = False
    turns: str = "all"
    chat_template: str | None = None
    max_bad_rows: float = 0.0

    def __post_init__(self):
        if isinstance(self.max_bad_rows, bool) or not 0 <= self.max_bad_rows <= 1:
            raise ValueError(f"max_bad_rows={self.max_bad_rows}: expected a share of the rows, from 0 to 1")

    @property
    def format_config(self) -> FormatConfig:
        """The format; the file of a chat template is read here."""
        template = Path(self.chat_template).read_text(encoding="utf-8") if self.chat_template else None
        return FormatConfig(
            name=self.format,
            columns=self.columns,
            ignore_columns=self.ignore_columns,
            eos=self.eos,
            train_on_prompt=self.train_on_prompt,
            turns=self.turns,
            chat_template=template,
        )

    @property
    def rows(self) -> dict[str, Any]:
        """The arguments of `open_rows` beside the source."""
        return {name: getattr(self, name) for name in ("kind", "split", "subset", "documents")}


def read_config(file: str | Path, **given: Any) -> PrepareConfig:
    """A YAML file with the fields of PrepareConfig, at its top or under "data"; `given` fields win over it."""
    import yaml

    try:
        value = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as problem:
        raise ValueError(f"{file}: {problem}") from problem
    if isinstance(value, Mapping) and "data" in value:
        value = value["data"]
    if not isinstance(value, Mapping):
        raise ValueError(f"{file}: expected names and values, found {type(value).__name__}")
    return make_config({**value, **given}, str(file))


def make_config(value: Mapping[str, Any], where: str) -> PrepareConfig:
    """A PrepareConfig from plain values, checked by name and type."""
    fields = {field.name: field for field in dataclasses.fields(PrepareConfig)}
    for name in value:
        if name not in fields:
            raise ValueError(f"{where}: unknown field {name!r}{near(name, fields)}; there are {', '.join(fields)}")
    for name in ("source", "tokenizer"):
        if not value.get(name):
            raise ValueError(f"{where}: {name!r} is missing")
    made = dict(value)
    for name in ("source", "ignore_columns"):
        part = made.get(name, ())
        made[name] = (part,) if isinstance(part, str) else tuple(part)
    columns = made.get("columns", ())
    made["columns"] = tuple(columns.items()) if isinstance(columns, Mapping) else tuple(map(tuple, columns))
    for name, part in made.items():
        kinds = {bool: (bool,), float: (int, float), str: (str,), tuple: (tuple,)}
        wanted = kinds[type(fields[name].default)] if type(fields[name].default) in kinds else (str, tuple, type(None))
        if not isinstance(part, wanted) or (isinstance(part, bool) and bool not in wanted):
            raise ValueError(f"{where}: {name}={part!r}: expected {' or '.join(kind.__name__ for kind in wanted)}")
    return PrepareConfig(**made)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a checkpoint, of a .gguf file, of a directory that holds nothing but a tokenizer, or in a file:
    a tokenizer.json, or the vocabulary of RWKV's World."""
    from jaxlm.checkpoints import rwkv_tokenizer
    from jaxlm.opening import on_hub, open_checkpoint

    if on_hub(source):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source)  # of a repository, just these files
    path = Path(source)
    if path.suffix in (".json", ".txt") and path.is_file():
        return rwkv_tokenizer.load(path)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    return open_checkpoint(source).tokenizer()


def prepare(
    config: PrepareConfig,
    out: str | Path,
    *,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> TokenCache:
    """Tokenizes a source into the directory `out`, and opens it; the cache is there whole, or not at all.

    A cache in `out` that is what would be made is opened as it is; anything else there needs `overwrite`. ValueError
    that names them when more than `config.max_bad_rows` of the rows are bad; fewer are listed in bad_rows.jsonl.
    `progress` is told (rows done, all).
    """
    if workers < 1:
        raise ValueError(f"{workers=}: expected at least 1 process")
    tokenizer = load_tokenizer(config.tokenizer)
    if not overwrite and (Path(out) / "header.json").is_file():
        if read_header(Path(out)).data != _data(config):
            raise ValueError(f"{out} is a cache of other data or options: add --overwrite, or give another directory")
        return open_cache(out, tokenizer=tokenizer, format=config.format_config)
    made = formatter(config.format_config, tokenizer)
    rows = open_rows(config.source, **config.rows)
    if rows.columns is not None:
        made.check_schema(rows.columns, ", ".join(config.source))
        rows = rows.only(tuple(made.names.values()))
    with staged(out, overwrite) as directory, CacheWriter(directory, vocabulary(tokenizer)) as writer:
        sources = tuple(describe_source(file) for file in rows.files)
        counts = _write(writer, _chunks(made, rows, workers), len(rows), config.max_bad_rows, progress)
        if not writer.examples:
            raise ValueError(f"{', '.join(config.source)}: no examples, of {len(rows)} rows {counts}")
        for source in sources:
            if Path(source["path"]).stat().st_mtime_ns != source["modified_ns"]:
                raise ValueError(f"{source['path']} changed while it was read: start again")
        about = {"source": config.tokenizer, "fingerprint": fingerprint(tokenizer), "vocab_size": vocabulary(tokenizer)}
        about |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        writer.finish(tokenizer=about, format=made.config, sources=sources, rows=counts, data=_data(config))
    return open_cache(out, check_sources=False)


def _data(config: PrepareConfig) -> dict[str, Any]:
    """What a cache is compared by beside its tokenizer, format and the content of its sources."""
    sources = [str(Path(source).resolve()) if Path(source).exists() else source for source in config.source]
    return {"source": sources, "max_bad_rows": float(config.max_bad_rows), **config.rows}


def vocabulary(tokenizer: Any) -> int:
    """One more than the largest id."""
    return max(tokenizer.get_vocab().values()) + 1


def _write(
    writer: CacheWriter,
    chunks: Iterator[list[Example | BadRow | None]],
    total: int,
    max_bad: float,
    progress: Progress | None,
) -> dict[str, int]:
    """Writes what comes; returns how many rows there were, and what became of them."""
    counts = {"read": 0, "used": 0, "empty": 0, "bad": 0, "merged": 0}
    first: list[BadRow] = []
    if progress:
        progress(0, total)
    for chunk in chunks:
        good = [row for row in chunk if isinstance(row, Example)]
        bad = [row for row in chunk if isinstance(row, BadRow)]
        writer.add(good)
        for row in bad:
            writer.add_bad(row)
        first += bad[: SHOWN - len(first)]
        counts["read"] += len(chunk)
        counts["used"] += len(good)
        counts["bad"] += len(bad)
        counts["empty"] += len(chunk) - len(good) - len(bad)
        counts["merged"] += sum(row.merged for row in good)
        if counts["bad"] > max_bad * total:
            more = "" if counts["bad"] <= len(first) else f"\n  and {counts['bad'] - len(first)} more"
            raise ValueError(
                f"{counts['bad']} of the first {counts['read']} rows (of {total}) are bad, and at most "
                f"{max_bad:.4%} may be (max_bad_rows, --max-bad-rows SHARE):\n  "
                + "\n  ".join(str(row) for row in first)
                + more
            )
        if progress:
            progress(counts["read"], total)
    return counts


def _chunks(made: Format, rows: Rows, workers: int) -> Iterator[list[Example | BadRow | None]]:
    """The examples of `CHUNK` rows after another, in order, however many processes make them."""
    bounds = [(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]
    if workers == 1:
        for start, stop in bounds:
            yield _chunk(made, rows, start, stop)
        return
    # Spawned: tokenizers and pyarrow have threads, which a fork would leave in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin_work, (made, rows))
    with pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for bound in bounds:
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
                pending.append(pool.submit(_work, *bound))
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _chunk(made: Format, rows: Rows, start: int, stop: int) -> list[Example | BadRow | None]:
    return examples(made, rows.read(start, stop), lambda i: rows.where(start + i))


_worker: tuple[Format, Rows] | None = None  # what this process works on, where it is one of several


def _begin_work(made: Format, rows: Rows) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are enough
    _worker = made, rows


def _work(start: int, stop: int) -> list[Example | BadRow | None]:
    assert _worker is not None
    return _chunk(*_worker, start, stop)
