"""`jaxlm families`: the architectures there are, and how near each came to the original in the last recorded tests."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from jaxlm.cli.console import Option, out, table

RESULTS = Path(__file__).parents[2] / "tests" / "results" / "parity.json"  # in a checkout; an installed jaxlm has none
HEADER = ("model_type", "what it is", "lines", "logits", "export", "GGUF")


@dataclasses.dataclass(frozen=True)
class Row:
    """One family. logits: the largest relative error of its cases; export: all came back bit for bit."""

    name: str
    summary: str
    lines: int
    logits: float | None  # None where nothing was recorded
    export: bool | None
    gguf: bool

    def cells(self) -> tuple[str, ...]:
        word = {True: "yes", False: "no", None: "-"}
        logits = "-" if self.logits is None else f"{self.logits:.1e}"
        return self.name, self.summary, str(self.lines), logits, word[self.export], word[self.gguf]


def families(
    *,
    markdown: Annotated[bool, Option(help="print the table of README.md")] = False,
    results: Annotated[
        str | None, Option(metavar="FILE", help="what the parity tests wrote; those of this checkout")
    ] = None,
) -> int:
    """Lists the architectures: what each is, the length of its file, its error against the original, export and GGUF.

    logits: the largest relative error of the float32 logits over the family's test checkpoints; export: saving gives
    their files back bit for bit. Both are what JAXLM_WRITE_RESULTS=1 pytest tests/models last recorded.

    Example: jaxlm families --markdown
    """
    made = rows(RESULTS if results is None else Path(results), must_exist=results is not None)
    if markdown:
        out.file.write(as_markdown(made) + "\n")
        return 0
    shown = table(*(">" * (name in ("lines", "logits")) + name for name in HEADER))
    for row in made:
        shown.add_row(*row.cells())
    out.print(shown, highlight=False)
    return 0


def rows(results: Path, must_exist: bool = False) -> list[Row]:
    """The families that are files of this package, by name."""
    from jaxlm.models import families as package
    from jaxlm.models.registry import family

    found = read(results) if must_exist or results.is_file() else {}
    made = []
    for path in sorted(Path(package.__path__[0]).glob("[!_]*.py")):
        fam = family(path.stem)
        errors = [case["logits"] for case in found.get(fam.name, ()) if "logits" in case]
        exports = [case["export"] for case in found.get(fam.name, ()) if "export" in case]
        made.append(
            Row(
                name=fam.name,
                summary=fam.summary.rstrip("."),
                lines=len(path.read_text(encoding="utf-8").splitlines()),
                logits=max(errors, default=None),
                export=all(exports) if exports else None,
                gguf=bool(fam.gguf),
            )
        )
    return made


def read(path: Path) -> dict[str, list[dict]]:
    """The recorded cases of each family."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of results")
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, list[dict]] = {}
        for case in cases.values():
            found.setdefault(case["family"], []).append(case)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is not what the parity tests write: {problem!r}") from problem
    return found


def as_markdown(made: list[Row]) -> str:
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in made)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
