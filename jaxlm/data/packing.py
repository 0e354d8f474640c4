"""Which tokens stand in which row: examples cut to size, and rows of one static length filled with them.

Everything here follows from the lengths alone. `fill` packs best-fit decreasing: the longest piece first, into the
fullest row that still has room. Pieces of equal length are placed together, so a million take as long as their
different lengths do, and how the rows are shared out is the same in every epoch: only which example of a length goes
where is drawn anew. The number of rows of an epoch is therefore constant.
"""

import bisect
import dataclasses

import numpy as np

LONG = ("split", "truncate", "drop", "error")


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Stretches of examples that fit a row: example [n], start [n], length [n] (int64, int32, int32)."""

    example: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.example)


def cut(lengths: np.ndarray, size: int, long: str = "split") -> Pieces:
    """Pieces of at most `size` tokens, in the order of the examples.

    What happens to an example that is longer: "split" into several pieces, each predicting the next one's first token;
    "truncate" to its first `size` tokens; "drop"; or "error".
    """
    if long not in LONG:
        raise ValueError(f"long={long!r}: expected one of {', '.join(LONG)}")
    lengths = np.asarray(lengths, np.int64)
    over = lengths > size
    if long == "error" and over.any():
        first = int(np.flatnonzero(over)[0])
        raise ValueError(
            f"{int(over.sum())} of {len(lengths)} examples are longer than {size} tokens, first example {first} with "
            f"{lengths[first]}: expected none (long='error'); pass long='split', 'truncate' or 'drop'"
        )
    if long != "split":
        kept = np.flatnonzero(~over) if long == "drop" else np.arange(len(lengths))
        return Pieces(kept, np.zeros(len(kept), np.int32), np.minimum(lengths[kept], size).astype(np.int32))
    counts = -(-lengths // size)
    example = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(example)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    return Pieces(example, start.astype(np.int32), np.minimum(lengths[example] - start, size).astype(np.int32))


def fill(counts: np.ndarray, size: int) -> np.ndarray:
    """The row (int32) of each piece, longest piece first, for counts[l] pieces of length l; best-fit decreasing."""
    rows = np.empty(int(counts.sum()), np.int32)
    room: list[int] = []  # the different amounts of room that open rows have, ascending
    opened: dict[int, list[np.ndarray]] = {}  # room -> the rows that have it
    done = made = 0

    def put(where: np.ndarray, left: int, length: int, each: int) -> None:
        """Gives `each` of the next pieces to every one of the rows, which had room `left`."""
        nonlocal done
        rows[done : done + len(where) * each] = np.repeat(where, each)
        done += len(where) * each
        if (left := left - each * length) == 0:
            return
        if left not in opened:
            bisect.insort(room, left)
            opened[left] = []
        opened[left].append(where)

    for length in np.flatnonzero(counts)[::-1].tolist():
        todo = int(counts[length])
        while todo:
            at = bisect.bisect_left(room, length)
            left = room[at] if at < len(room) else size
            each = min(left // length, todo)
            if at == len(room):
                where = np.arange(made, made + todo // each, dtype=np.int32)
                made += len(where)
            else:
                where = opened[left].pop()
                where, rest = where[: todo // each], where[todo // each :]
                if len(rest):
                    opened[left].append(rest)
                elif not opened[left]:
                    del opened[left], room[at]
            todo -= len(where) * each
            put(where, left, length, each)
    return rows


@dataclasses.dataclass(frozen=True)
class Layout:
    """The rows of an epoch, before anything is drawn.

    `order` [n] are the pieces sorted by length, longest first, ties as they come; piece order[slots[k]] stands in row r
    for k in offsets[r]..offsets[r + 1] - 1. `size` [rows] is the length of each row, padding included.
    """

    slots: np.ndarray
    offsets: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.size)


def packed(lengths: np.ndarray, size: int) -> Layout:
    """Pieces of these lengths in as few rows of `size` as best-fit decreasing finds."""
    row = fill(np.bincount(lengths, minlength=1), size)
    made = int(row.max()) + 1 if len(row) else 0
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=made))])
    return Layout(np.argsort(row, kind="stable"), offsets, np.full(made, size, np.int32))


def padded(lengths: np.ndarray, sizes: tuple[int, ...]) -> Layout:
    """Every piece in a row of its own, of the smallest of `sizes` (ascending) that holds it."""
    descending = np.sort(lengths)[::-1]
    size = np.asarray(sizes, np.int32)[np.searchsorted(sizes, descending)]
    return Layout(np.arange(len(lengths)), np.arange(len(lengths) + 1), size)


def by_length(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`order` sorted by length, longest first; equal lengths stay in their order."""
    sorted_ = lengths[order]
    # The sort of 16-bit numbers counts digits, and is ten times faster.
    narrow = np.uint16 if len(sorted_) == 0 or sorted_.max() < 2**16 else np.int64
    return order[np.argsort((sorted_.max(initial=0) - sorted_).astype(narrow), kind="stable")]


def efficiency(
    lengths: np.ndarray, size: int, *, buckets: tuple[int, ...] = (), batch_size: int = 0, long: str = "split"
) -> dict[str, float]:
    """The share of useful tokens (not padding) in rows of `size`: "pack", "pad", and "bucket" if `buckets` are given.

    With `batch_size` also "longest": batches in the order given, padded to their longest example, as other programs do
    (here every such length would be compiled). One share over another says how many more useful tokens a step of equal
    cost holds.
    """
    pieces = cut(lengths, size, long)
    made = {"pack": packed(pieces.length, size).size, "pad": padded(pieces.length, (size,)).size}
    if buckets:
        made["bucket"] = padded(pieces.length, checked_buckets(buckets, size)).size
    if batch_size:
        starts = np.arange(0, len(pieces), batch_size)
        counts = np.diff(np.append(starts, len(pieces)))
        made["longest"] = np.maximum.reduceat(pieces.length, starts) * counts
    useful = int(pieces.length.sum())
    return {name: useful / int(sizes.sum(dtype=np.int64)) for name, sizes in made.items()}


def checked_buckets(buckets: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Ascending lengths, the last of them `size`."""
    made = tuple(sorted({*buckets, size}))
    if made[0] < 1 or made[-1] > size:
        raise ValueError(f"{buckets=}: expected lengths from 1 to seq_len={size}")
    return made
