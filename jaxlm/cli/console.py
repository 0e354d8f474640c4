"""What the commands share: the two consoles, tables, a progress bar, and numbers and arguments for people."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# An option whose default, None, needs no mention.
Option = functools.partial(tyro.conf.arg, help_behavior_hint="")
Dtype = Literal["float32", "bfloat16", "float16"] | None
Source = Annotated[
    str,
    tyro.conf.arg(
        metavar="SOURCE", help="a checkpoint's directory, a .gguf or .pth file, or org/name on the Hugging Face hub"
    ),
]
Tokenizer = Annotated[
    str | None,
    Option(metavar="SOURCE", help="a checkpoint's, or a file's, in place of the checkpoint's own tokenizer"),
]
IgnoreFields = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="ignore-field", metavar="NAME", help="a field of config.json to do without"),
]
IgnoreGenerationFields = Annotated[
    tuple[str, ...],
    tyro.conf.arg(name="ignore-generation-field", metavar="NAME", help="the same, of generation_config.json"),
]

# A pipe has no width; names of tensors must come through whole.
out = Console(width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True)


def table(*columns: str) -> Table:
    """An empty table; a column whose name starts with > is aligned to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return made


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without a header."""
    made = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, value)
    return made


@contextlib.contextmanager
def progress(label: str, in_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, when that is a terminal: yields a function to call with what is done, and all."""
    counted = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = TextColumn("{task.description}"), BarColumn(), counted, TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def fetch(source: str) -> str:
    """The directory of a repository on the hub, downloaded with a progress bar; any other source as it is."""
    from jaxlm.checkpoints import hub
    from jaxlm.opening import on_hub

    if not on_hub(source):
        return source
    with progress(f"downloading {source}") as step:
        return str(hub.snapshot(source, progress=step))


def load(source: str, dtype: str | None, ignore_fields: tuple[str, ...], tokenizer: str | None = None):
    """`jaxlm.load` with a progress bar."""
    import jaxlm

    directory = fetch(source)
    with progress(f"loading {source}") as step:
        return jaxlm.load(directory, dtype=dtype, tokenizer=tokenizer, ignore_fields=ignore_fields, progress=step)


def count(n: int) -> str:
    """134515008 -> '134.5 M'."""
    return _scaled(n, ("", " K", " M", " B", " T"))


def size(n: int) -> str:
    """98362432 -> '98.4 MB'."""
    return _scaled(n, (" B", " KB", " MB", " GB", " TB"))


def _scaled(n: int, units: tuple[str, ...]) -> str:
    value = float(n)
    for unit in units[:-1]:
        if value < 999.95:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g}{units[-1]}"


def rates(made) -> str:
    """'12 prompt tokens at 340.1/s, 20 new at 41.7/s', of a Generation; compiling counts, where it happened."""
    timing = made.timing
    text = f"{timing.prompt_tokens} prompt tokens at {timing.prefill_rate:.1f}/s"
    # The prefill draws the first token of each row, so only the others say how fast decoding is.
    speed = f" at {timing.decode_rate:.1f}/s" if timing.new_tokens else ""
    return f"{text}, {len(made.tokens)} new{speed}"
