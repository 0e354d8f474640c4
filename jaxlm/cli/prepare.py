"""`jaxlm prepare`: a data set tokenized once, into a cache that training maps into memory."""

import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxlm.cli.console import Option, count, err, facts, out, progress

Columns = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="column", metavar="NAME=COLUMN", help="read COLUMN where the format says NAME; repeatable"),
]
IgnoreColumns = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="ignore-column", metavar="NAME", help="a column to do without; '*' for all that are not read"),
]


def prepare(
    source: Annotated[
        str,
        tyro.conf.arg(
            metavar="SOURCE",
            help="a .jsonl, .parquet or text file, a directory or 'pattern*' of such, a data set of Hugging Face "
            "datasets (saved to disk, or org/name), or a .yaml file with these options",
        ),
    ],
    target: Annotated[str, Option(metavar="OUT", help="the directory to write")],
    /,
    *,
    tokenizer: Annotated[str | None, Option(metavar="SOURCE", help="a checkpoint, .gguf file, or org/name")] = None,
    format: Annotated[
        str | None, Option(metavar="NAME", help="text (which is the default), prompt, alpaca, messages or sharegpt")
    ] = None,
    kind: Annotated[str | None, Option(metavar="KIND", help="jsonl, parquet or text, where no ending says it")] = None,
    split: Annotated[str | None, Option(metavar="NAME", help="of a Hugging Face data set")] = None,
    subset: Annotated[str | None, Option(metavar="NAME", help="of a Hugging Face data set")] = None,
    documents: Annotated[
        str | None,
        Option(metavar="RULE", help="a document of a text file: the file (the default), blank, line, separator=LINE"),
    ] = None,
    columns: Columns = (),
    ignore_columns: IgnoreColumns = (),
    no_eos: Annotated[bool, Option(help="do not end examples with the EOS token")] = False,
    train_on_prompt: Annotated[bool, Option(help="put loss on prompts too, and on every turn of a chat")] = False,
    turns: Annotated[str | None, Option(metavar="WHICH", help="the assistant's turns with loss: all, or last")] = None,
    chat_template: Annotated[str | None, Option(metavar="FILE", help="in place of the tokenizer's")] = None,
    max_bad_rows: Annotated[
        float | None, Option(metavar="SHARE", help="of the rows, 0 to 1, that may be bad before it is an error; 0")
    ] = None,
    workers: Annotated[int, Option(metavar="N", help="processes that tokenize")] = 1,
    overwrite: Annotated[bool, Option(help="replace what OUT holds")] = False,
) -> int:
    """Tokenizes a data set once, into a cache that training maps into memory.

    Rows that cannot be used are named with file and line. Options win over those of a .yaml file.

    Example: jaxlm prepare chats.jsonl chats.tokens --tokenizer SmolLM2.gguf --format messages
    """
    from jaxlm.data import prepare as work

    given: dict[str, Any] = {
        "tokenizer": tokenizer,
        "format": format,
        "kind": kind,
        "split": split,
        "subset": subset,
        "documents": documents,
        "columns": _pairs(columns) or None,
        "ignore_columns": ignore_columns or None,
        "eos": False if no_eos else None,
        "train_on_prompt": train_on_prompt or None,
        "turns": turns,
        "chat_template": chat_template,
        "max_bad_rows": max_bad_rows,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if Path(source).suffix in (".yaml", ".yml"):
        config = work.read_config(source, **given)
    else:
        if tokenizer is None:
            raise ValueError(f"no tokenizer for {source}: pass --tokenizer SOURCE, that of the model to be trained")
        config = work.make_config({"source": source, **given}, source)
    times: list[float] = []
    with progress(f"tokenizing {', '.join(config.source)}", in_bytes=False) as step:

        def told(done: int, total: int) -> None:
            times.append(time.perf_counter())
            step(done, total)

        cache = work.prepare(config, target, workers=workers, overwrite=overwrite, progress=told)
    _report(cache.header, target, times[-1] - times[0] if times else None)
    return 0


def _report(header: Any, target: str, seconds: float | None) -> None:
    """What the cache holds, and how fast it was made, unless it was there."""
    rows, said = header.rows, "is up to date"
    out.print(
        facts(
            [
                ("examples", f"{header.examples:,} of {rows['read']:,} rows"),
                ("tokens", f"{header.tokens:,} ({header.dtype}); {header.loss_tokens:,} to be predicted"),
                ("longest", f"{header.longest:,} tokens; mean {header.tokens / header.examples:,.1f}"),
                *left_out(rows, target),
            ]
        ),
        highlight=False,
    )
    if seconds is not None:
        rows_a_second, tokens_a_second = (count(int(n / seconds)) for n in (rows["read"], header.tokens))
        said = f"{seconds:.1f} s, {rows_a_second} rows/s, {tokens_a_second} tokens/s"
    err.print(f"{target}: {said}", highlight=False, soft_wrap=True)


def left_out(rows: dict[str, int], target: str) -> list[tuple[str, str]]:
    """What did not become an example as it stands, where there is any."""
    said = {
        "empty": "rows without text, left out",
        "bad": f"rows, named in {Path(target, 'bad_rows.jsonl')}",
        "merged": "prompts whose last token took in the start of the completion, and has loss",
    }
    return [(name, f"{rows[name]:,} {text}") for name, text in said.items() if rows[name]]


def _pairs(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    for column in columns:
        if not all(column.partition("=")):
            raise ValueError(f"--column {column!r}: expected NAME=COLUMN, as in text=content")
    return tuple((name, column) for name, _, column in (column.partition("=") for column in columns))
