"""Batches by number: batches[step] follows from (seed, step) alone, on any number of hosts, and needs no replay."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxlm.data import order
from jaxlm.data.cache import TokenCache
from jaxlm.data.fim import EXTRA, Fim
from jaxlm.data.packing import Pieces, by_length, checked_buckets, cut, packed, padded
from jaxlm.data.rows import near

NO_LOSS = -100
MODES = ("pack", "pad", "bucket")
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """The pieces of each row: pieces[offsets[r]:offsets[r + 1]], and the rows in their order."""

    pieces: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray


class Batches:
    """The batches of a cache: dicts of int32 [B, T], `tokens`, `targets`, `segments` and `positions`.

    `targets` are what each position is to predict, -100 for nothing: the next token of the same example, where the mask
    has it. `segments` number the examples of a row from 1, 0 is padding; `positions` restart in each, -1 is padding.

    `mode` "pack" fills rows of `seq_len` with several examples, "pad" gives each a row, "bucket" a row of the smallest
    of the lengths `buckets` that holds it, all rows of a batch alike (so T has as many values). `long` says what
    becomes of examples that do not fit (`packing.cut`). `batch_size` counts rows over all hosts; a host gets its share
    of every batch, from row process_index * batch_size / process_count on: the global batch is always the same.

    With `shuffle`, every epoch has its own order, and a batch takes its rows from two where one ends ("bucket" fills it
    with empty rows instead). Without, the order is that of the cache, there is one epoch, and the last batch is filled
    with empty rows, as for evaluation. Empty rows have segment 0 and no targets. `epochs` bounds the number of batches.
    """

    def __init__(
        self,
        cache: TokenCache,
        batch_size: int,
        seq_len: int,
        *,
        seed: int = 0,
        mode: str = "pack",
        long: str = "split",
        buckets: tuple[int, ...] = (),
        shuffle: bool = True,
        epochs: int | None = None,
        fim: Fim | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}{near(mode, MODES)}")
        if bool(buckets) != (mode == "bucket"):
            raise ValueError(f"{buckets=} with {mode=}: buckets are lengths for mode='bucket', and needed there")
        if seq_len < 1 + EXTRA * (fim is not None) or batch_size < 1 or (epochs is not None and epochs < 1):
            raise ValueError(f"{seq_len=}, {batch_size=}, {epochs=}: expected whole numbers above 0")
        if batch_size % process_count or not 0 <= process_index < process_count:
            raise ValueError(f"host {process_index} of {process_count} cannot take its share of {batch_size} rows")
        if fim is not None and cache.header.loss_tokens != cache.header.tokens:
            raise ValueError("fill-in-the-middle is for text that is learnt whole, and this cache masks some of it")
        if len(cache) == 0:
            raise ValueError(f"{cache.path}: no examples")
        self.cache, self.batch_size, self.seq_len, self.seed = cache, batch_size, seq_len, seed
        self.mode, self.long, self.shuffle, self.epochs = mode, long, shuffle, epochs if shuffle else 1
        self.buckets = checked_buckets(buckets, seq_len) if mode == "bucket" else ()
        self.fim, self._share = (
            fim,
            slice(process_index * batch_size // process_count, (process_index + 1) * batch_size // process_count),
        )
        self._draws: np.ndarray | None = None
        self.pieces, self._lengths = self._cut()
        if len(self.pieces) == 0:
            raise ValueError(f"{cache.path}: no example has at most seq_len={seq_len} tokens, and {long=}")
        sizes = self.buckets or (seq_len,)
        self._layout = packed(self._lengths, seq_len) if mode == "pack" else padded(self._lengths, sizes)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)

    def _cut(self) -> tuple[Pieces, np.ndarray]:
        """The pieces, and the room that each takes."""
        pieces = cut(self.cache.lengths, self.seq_len - EXTRA * (self.fim is not None), self.long)
        lengths = pieces.length
        if self.fim is not None:
            self._draws = self.fim.draws(self.seed, len(pieces))
            lengths = lengths + EXTRA * self.fim.applies(self._draws)
        return pieces, lengths.astype(np.int64)

    @property
    def rows_per_epoch(self) -> int:
        """Rows that hold something."""
        return len(self._layout)

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        """Batches that one epoch needs; one that it shares with the next counts."""
        if self.mode == "bucket":
            return sum(-(-int(count) // self.batch_size) for count in np.unique_counts(self._layout.size).counts)
        return -(-len(self._layout) // self.batch_size)

    @property
    def carries(self) -> bool:
        """Whether a batch goes on with the next epoch's rows where an epoch ends within it."""
        return self.shuffle and self.mode != "bucket"

    def epoch(self, step: int) -> float:
        """Epochs done before a step."""
        return step * self.batch_size / len(self._layout) if self.carries else step / self.steps_per_epoch

    @property
    def efficiency(self) -> float:
        """The share of tokens in an epoch's rows that are not padding; empty rows are not counted."""
        return int(self._lengths.sum()) / int(self._layout.size.sum(dtype=np.int64))

    def __len__(self) -> int:
        """The number of batches; TypeError where `epochs` does not bound it."""
        if self.epochs is None:
            raise TypeError("batches without end: give epochs=, or a number of steps")
        if self.carries:
            return -(-self.epochs * len(self._layout) // self.batch_size)
        return self.epochs * self.steps_per_epoch

    def _plan(self, epoch: int) -> _Epoch:
        """Which piece stands where in an epoch."""
        layout = self._layout
        drawn = np.arange(len(self.pieces))
        if self.shuffle:
            drawn = order.permutation(self.seed, epoch, order.EXAMPLES, len(self.pieces))
        pieces = by_length(self._lengths, drawn)[layout.slots]
        if self.shuffle:
            rows = order.permutation(self.seed, epoch, order.ROWS, len(layout))
        else:
            rows = np.argsort(np.minimum.reduceat(pieces, layout.offsets[:-1]), kind="stable")
        if self.mode == "bucket":
            rows = self._bucketed(rows, epoch)
        return _Epoch(pieces, layout.offsets, rows)

    def _bucketed(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Rows in batches of one length each, the last of a length filled up with -1 (empty)."""
        batches = []
        for size in self.buckets:
            of_size = rows[self._layout.size[rows] == size]
            filled = np.full(-(-len(of_size) // self.batch_size) * self.batch_size, -1)
            filled[: len(of_size)] = of_size
            batches.append(filled.reshape(-1, self.batch_size))
        made = np.concatenate(batches)
        if self.shuffle:
            made = made[order.permutation(self.seed, epoch, order.BATCHES, len(made))]
        return made.reshape(-1)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, on this host; IndexError past the end."""
        if step < 0 or (self.epochs is not None and step >= len(self)):
            raise IndexError(f"step {step} of {len(self) if self.epochs is not None else 'batches without end'}")
        numbers = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        rows, size = len(self._layout), self.seq_len
        if self.mode == "bucket":
            rows = self.steps_per_epoch * self.batch_size
            plan = self._epoch(step // self.steps_per_epoch)
            first = plan.rows[numbers[0] % rows]  # never empty: a batch begins with what it holds
            size = int(self._layout.size[first])
        taken = []
        for number in numbers[self._share].tolist():
            if not self.carries and self.mode != "bucket" and number >= rows * (self.epochs or number + 1):
                taken.append(np.zeros(0, np.int64))
                continue
            plan = self._epoch(number // rows)
            row = int(plan.rows[number % rows])
            taken.append(plan.pieces[plan.offsets[row] : plan.offsets[row + 1]] if row >= 0 else np.zeros(0, np.int64))
        return self._batch(taken, size)

    def _batch(self, rows: list[np.ndarray], size: int) -> Batch:
        """The arrays of rows of pieces, all pieces at once."""
        pieces = np.concatenate(rows)
        counts = np.array([len(row) for row in rows])
        lengths = self._lengths[pieces]
        first = np.cumsum(lengths) - lengths  # where each piece begins among all tokens of the batch
        row = np.repeat(np.arange(len(rows)), counts)
        row_first = np.concatenate([[0], np.cumsum(np.bincount(row, lengths, len(rows)))]).astype(np.int64)[row]
        position = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
        at = np.repeat(row * size + first - row_first, lengths) + position
        segment = np.arange(len(pieces)) - (np.cumsum(counts) - counts)[row] + 1
        tokens, targets = self._tokens(pieces, lengths, position)
        made = {"tokens": (tokens, 0), "targets": (targets, NO_LOSS), "positions": (position, -1)}
        made["segments"] = (np.repeat(segment, lengths), 0)
        batch = {}
        for name, (values, padding) in made.items():
            flat = np.full(len(rows) * size, padding, np.int32)
            flat[at] = values
            batch[name] = flat.reshape(len(rows), size)
        return batch

    def _tokens(self, pieces: np.ndarray, lengths: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of pieces, one after another, and what each is to predict."""
        cache, example = self.cache, self.pieces.example[pieces]
        begin = cache.offsets[example] + self.pieces.start[pieces]
        if self.fim is not None:
            return self._filled(pieces, begin)
        source = np.repeat(begin, lengths) + position
        following = source + 1
        known = following < np.repeat(cache.offsets[example + 1], lengths)
        if self.long != "split":  # what was cut off is not predicted either
            known &= position + 1 < np.repeat(lengths, lengths)
        following = np.where(known, following, 0)
        known &= cache.mask(following)
        return cache.tokens[source], np.where(known, cache.tokens[following].astype(np.int32), NO_LOSS)

    def _filled(self, pieces: np.ndarray, begin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same with fill-in-the-middle. A piece that was changed has no next one to predict."""
        assert self.fim is not None and self._draws is not None
        drawn = self._draws[pieces]
        tokens, targets = [], []
        for start, piece, draw, changed in zip(
            begin.tolist(), pieces.tolist(), drawn, self.fim.applies(drawn).tolist(), strict=True
        ):
            ids = self.cache.tokens[start : start + int(self.pieces.length[piece])].astype(np.int32)
            ids = self.fim(ids, draw) if changed else ids
            tokens.append(ids)
            targets.append(np.append(ids[1:], NO_LOSS))
        return np.concatenate(tokens or [np.zeros(0, np.int32)]), np.concatenate(targets or [np.zeros(0, np.int32)])

    @property
    def identity(self) -> dict[str, Any]:
        """What the order and content of the batches follow from, beside the step; the number of hosts is no part."""
        names = ("batch_size", "seq_len", "seed", "mode", "long", "buckets", "shuffle")
        made = {name: getattr(self, name) for name in names} | {"data": self.cache.header.sha256}
        made["buckets"] = list(self.buckets)  # as it comes back from JSON
        return made | {"fim": None if self.fim is None else dataclasses.asdict(self.fim)}

    def iterate(self, start: int = 0, *, stop: int | None = None, prefetch: int = 2) -> "BatchIterator":
        """The batches from step `start` on, up to step `stop`; `prefetch` of them are made ahead, in threads."""
        return BatchIterator(self, start, stop, prefetch)


class BatchIterator(Iterator[Batch]):
    """Goes through batches, with a state that is nothing but the step and what it belongs to."""

    def __init__(self, batches: Batches, start: int, stop: int | None, prefetch: int):
        self.batches, self.stop, self.prefetch = batches, stop, prefetch
        self._begin(start)

    def _begin(self, step: int) -> None:
        import grain

        self.step = step
        source = grain.MapDataset.source(_Steps(self.batches, step, self.stop))
        options = grain.ReadOptions(num_threads=min(self.prefetch, 4), prefetch_buffer_size=self.prefetch)
        self._iterator = iter(source.to_iter_dataset(options))

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.step += 1
        return batch

    def state(self) -> dict[str, Any]:
        """What `restore` needs, for JSON."""
        return {"step": self.step, **self.batches.identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken; ValueError where it is of other batches."""
        mine = self.batches.identity
        if different := [name for name in mine if state.get(name) != mine[name]]:
            said = ", ".join(f"{name}={mine[name]!r} (was {state.get(name)!r})" for name in different)
            raise ValueError(f"this state is of other batches, which would not go on where it was taken: {said}")
        self._begin(state["step"])


class _Steps:
    """Steps start..stop-1 as a sequence, for grain."""

    def __init__(self, batches: Batches, start: int, stop: int | None):
        if stop is None:
            stop = 2**62 if batches.epochs is None else len(batches)
        self.batches, self.start, self.count = batches, start, max(stop - start, 0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        return self.batches[self.start + index]
