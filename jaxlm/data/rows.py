"""What every source of rows gives: how many there are, any range of them, and where each one stands."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class BadRow(ValueError):
    """A row that cannot be used, with the file and line (or row) where it stands."""

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)  # both, so that it survives the way back from another process
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Rows:
    """Rows by number. `files` are what they come from, `columns` their names where a schema states them."""

    files: tuple[Path, ...] = ()
    columns: tuple[str, ...] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, start: int, stop: int) -> list[dict[str, Any] | BadRow]:
        """Rows start..stop-1; one that cannot be read is given as a BadRow, not raised."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """The file and line of a row, as file:line."""
        raise NotImplementedError

    def only(self, columns: Sequence[str]) -> "Rows":
        """The same rows, for a caller that needs just these columns; others may still be there."""
        return self

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row; raises its BadRow."""
        (row,) = self.read(range(len(self))[index], range(len(self))[index] + 1)
        if isinstance(row, BadRow):
            raise row
        return row


def near(name: str, allowed: Iterable[str]) -> str:
    """A hint at the allowed name that is meant, or nothing."""
    found = difflib.get_close_matches(str(name), list(allowed), 1)
    return f" (did you mean {found[0]!r}?)" if found else ""
