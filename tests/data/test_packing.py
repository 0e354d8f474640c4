"""Rows of one length filled with examples: nothing lost, nothing twice, and little left empty."""

import time

import numpy as np
import pytest

from jaxlm.data.packing import by_length, checked_buckets, cut, efficiency, fill, packed, padded
from tests.data.tiny import long_tailed


def first_fit_decreasing(lengths, size):
    """The textbook's, piece by piece: how many rows it needs."""
    room = []
    for length in sorted(lengths, reverse=True):
        for row, left in enumerate(room):
            if left >= length:
                room[row] -= length
                break
        else:
            room.append(size - length)
    return len(room)


def best_fit_decreasing(lengths, size):
    """The room left in each row, piece by piece."""
    room = []
    for length in sorted(lengths, reverse=True):
        fits = [(left, row) for row, left in enumerate(room) if left >= length]
        if fits:
            room[min(fits)[1]] -= length
        else:
            room.append(size - length)
    return sorted(room)


@pytest.mark.parametrize("seed", range(30))
def test_fill_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 60))
    lengths = rng.integers(1, size + 1, rng.integers(1, 200))
    rows = fill(np.bincount(lengths), size)
    used = np.bincount(rows, np.sort(lengths)[::-1])
    assert sorted(size - used) == best_fit_decreasing(lengths, size)


@pytest.mark.parametrize("seed", range(10))
def test_packing_places_every_piece_once(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 33, 300)
    layout = packed(lengths, 32)
    pieces = by_length(lengths, rng.permutation(300))[layout.slots]
    assert sorted(pieces) == list(range(300))
    used = np.add.reduceat(lengths[pieces], layout.offsets[:-1])
    assert (used <= 32).all() and used.sum() == lengths.sum() and len(used) == len(layout)


def test_as_good_as_first_fit_decreasing():
    lengths = long_tailed(2000)
    assert len(packed(lengths, 2048)) <= first_fit_decreasing(lengths.tolist(), 2048)


def test_buckets():
    lengths = np.array([3, 9, 1, 4, 5])
    layout = padded(lengths, (4, 8, 9))
    assert layout.size.tolist() == [9, 8, 4, 4, 4]
    assert by_length(lengths, np.arange(5))[layout.slots].tolist() == [1, 4, 3, 0, 2]
    assert checked_buckets((8, 4), 9) == (4, 8, 9)
    with pytest.raises(ValueError, match="from 1 to seq_len=9"):
        checked_buckets((10,), 9)


@pytest.mark.parametrize("long", ["split", "truncate", "drop"])
def test_long_examples(long):
    pieces = cut(np.array([3, 10, 4, 8]), 4, long)
    made = list(zip(pieces.example.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True))
    assert (
        made
        == {
            "split": [(0, 0, 3), (1, 0, 4), (1, 4, 4), (1, 8, 2), (2, 0, 4), (3, 0, 4), (3, 4, 4)],
            "truncate": [(0, 0, 3), (1, 0, 4), (2, 0, 4), (3, 0, 4)],
            "drop": [(0, 0, 3), (2, 0, 4)],
        }[long]
    )


def test_long_examples_as_an_error():
    with pytest.raises(ValueError, match="2 of 4 examples are longer than 4 tokens, first example 1 with 10"):
        cut(np.array([3, 10, 4, 8]), 4, "error")
    assert len(cut(np.array([3, 4]), 4, "error")) == 2
    with pytest.raises(ValueError, match="long='cut'"):
        cut(np.array([3, 4]), 4, "cut")


def test_efficiency_on_a_long_tail():
    """What the benchmark of packed against padded training stands on: at least 1.8 times the useful tokens."""
    shares = efficiency(long_tailed(20_000), 2048, buckets=(128, 256, 512, 1024), batch_size=8)
    print({name: round(share, 4) for name, share in shares.items()})
    assert shares["pack"] > 0.995 and shares["pad"] < 0.15 and 0.6 < shares["bucket"] < 0.8
    assert shares["pack"] > 1.8 * shares["longest"] > 1.8 * shares["pad"]
    assert efficiency(np.array([2, 2, 3]), 4, batch_size=2) == {"pack": 7 / 8, "pad": 7 / 12, "longest": 1}
    assert efficiency(np.array([1, 2, 3]), 4, batch_size=2) == {"pack": 6 / 8, "pad": 6 / 12, "longest": 6 / 7}


def test_a_million_examples_in_seconds():
    lengths = long_tailed(1_000_000, longest=4096)
    start = time.perf_counter()
    layout = packed(cut(lengths, 2048).length, 2048)
    assert time.perf_counter() - start < 10  # 0.4 s on a free core
    assert lengths.sum() / (len(layout) * 2048) > 0.999
