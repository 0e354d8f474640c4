"""Batches: what stands in them, and that their order follows from seed and step alone."""

import collections
import json

import numpy as np
import pytest

from jaxlm.data import order
from jaxlm.data.fim import Fim
from jaxlm.data.pipeline import Batches
from tests.data.tiny import cache, numbered

MODES = {"pack": {}, "pad": {}, "bucket": {"buckets": (4, 8)}}
modes = pytest.mark.parametrize("mode", MODES)


FIXED = [7, 5, 4, 0, 3, 6, 1, 2]  # of seed 1, epoch 2


@pytest.fixture(scope="module")
def lengths():
    return np.random.default_rng(0).integers(1, 40, 101)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, lengths):
    """101 examples of 1 to 39 tokens, all different."""
    return cache(tmp_path_factory.mktemp("data") / "cache", numbered(lengths))


def make(tokens, mode="pack", **options):
    return Batches(tokens, **{"batch_size": 4, "seq_len": 16, "mode": mode, "seed": 1, **MODES[mode], **options})


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def equal(left, right):
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


def check(batch):
    """What every batch keeps to. Tokens of this cache count upwards, so that what follows a token is known."""
    tokens, targets, segments, positions = (batch[n] for n in ("tokens", "targets", "segments", "positions"))
    assert all(value.dtype == np.int32 and value.shape == tokens.shape for value in batch.values())
    empty = segments == 0
    assert (tokens[empty] == 0).all() and (targets[empty] == -100).all() and (positions[empty] == -1).all()
    for row in range(len(tokens)):
        last = segments[row].max()
        for segment in range(1, last + 1):
            (at,) = np.nonzero(segments[row] == segment)
            assert np.array_equal(at, np.arange(at[0], at[0] + len(at)))  # in one stretch
            assert np.array_equal(positions[row, at], np.arange(len(at)))
            assert (np.diff(tokens[row, at]) == 1).all()
            assert np.array_equal(targets[row, at[:-1]], tokens[row, at[1:]])
        used = int((segments[row] > 0).sum())
        assert (segments[row, :used] > 0).all() and (np.diff(segments[row, :used]) >= 0).all()


@modes
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_once_an_epoch(tokens, lengths, mode, shuffle):
    batches = make(tokens, mode, shuffle=shuffle, epochs=1)
    seen, predicted = [], []
    for step in range(len(batches)):
        batch = batches[step]
        check(batch)
        assert batch["tokens"].shape == (4, batch["tokens"].shape[1])
        assert batch["tokens"].shape[1] in ((4, 8, 16) if mode == "bucket" else (16,))
        # An epoch of shuffled rows ends within a batch, and the next one begins there.
        rows = slice(0, min(4, batches.rows_per_epoch - 4 * step)) if batches.carries else slice(None)
        seen += batch["tokens"][rows][batch["segments"][rows] > 0].tolist()
        predicted += batch["targets"][rows][batch["targets"][rows] != -100].tolist()
    ends = np.cumsum(lengths)
    assert sorted(seen) == list(range(1, ends[-1] + 1))
    # "split" predicts over its cuts, so everything but the first token of an example is predicted, once.
    assert sorted(predicted) == sorted(set(range(1, ends[-1] + 1)) - set((ends - lengths + 1).tolist()))


def test_epochs_follow_each_other_without_a_gap(tokens):
    batches = make(tokens)
    rows = batches.rows_per_epoch
    assert rows % 4  # or the test says nothing
    stream = np.concatenate([batches[step]["tokens"] for step in range(-(-3 * rows // 4))])[: 3 * rows]
    for epoch in range(3):
        part = stream[epoch * rows : (epoch + 1) * rows]
        assert sorted(part[part > 0]) == list(range(1, tokens.header.tokens + 1))
    assert batches.epoch(0) == 0 and batches.epoch(rows) == 4


@modes
def test_every_epoch_has_its_own_order(tokens, mode):
    batches = make(tokens, mode, batch_size=1)
    rows = batches.steps_per_epoch
    first, second = ([batches[step] for step in range(e * rows, (e + 1) * rows)] for e in range(2))
    # Which places of the layout come when, and, where there is a choice, which examples stand together.
    places = [[(row["tokens"].shape[1], (row["segments"] > 0).sum()) for row in part] for part in (first, second)]
    together = [{tuple(row["tokens"][0]) for row in part} for part in (first, second)]
    assert sorted(places[0]) == sorted(places[1]) and places[0] != places[1]
    assert (together[0] != together[1]) == (mode == "pack")
    if mode == "bucket":
        assert [size for size, _ in places[0]] != [size for size, _ in places[1]]


@modes
@pytest.mark.parametrize("long", ["truncate", "drop"])
def test_long_examples_are_cut_or_left_out(tokens, lengths, mode, long):
    batches = make(tokens, mode, long=long, epochs=1, shuffle=False)
    made = [batches[step] for step in range(len(batches))]
    for batch in made:
        check(batch)
    useful = sum(int((batch["segments"] > 0).sum()) for batch in made)
    targets = sum(int((batch["targets"] != -100).sum()) for batch in made)
    kept = np.minimum(lengths, 16) if long == "truncate" else lengths[lengths <= 16]
    assert useful == kept.sum() and targets == (kept - 1).sum()


def test_loss_mask(tmp_path):
    made = cache(tmp_path / "c", [[1, 2, 3, 4, 5], [6, 7, 8]], [[0, 0, 1, 0, 1], [1, 1, 0]])
    (batch,) = [Batches(made, 1, 8, shuffle=False)[0]]
    assert batch["tokens"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["targets"].tolist() == [[-100, 3, -100, 5, -100, 7, -100, -100]]
    assert batch["segments"].tolist() == [[1] * 5 + [2] * 3]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]


@modes
def test_resuming_gives_what_an_uninterrupted_run_gives(tokens, mode):
    batches = make(tokens, mode)
    whole = [batches[step] for step in range(100)]
    assert batches.epoch(100) > 2
    for k in (0, 1, 17, batches.steps_per_epoch, batches.steps_per_epoch + 1):
        assert equal([make(tokens, mode)[step] for step in range(k, k + 3)], whole[k : k + 3])
        run = make(tokens, mode).iterate()
        assert equal([next(run) for _ in range(k)], whole[:k])
        state = json.loads(json.dumps(run.state()))
        resumed = make(tokens, mode).iterate(prefetch=k % 3)
        resumed.restore(state)
        assert equal([next(resumed) for _ in range(100 - k)], whole[k:])
        assert resumed.state()["step"] == 100


def test_a_state_of_other_batches_is_refused(tokens, tmp_path, lengths):
    state = make(tokens).iterate().state()
    with pytest.raises(ValueError, match=r"seed=2 \(was 1\)"):
        make(tokens, seed=2).iterate().restore(state)
    other = cache(tmp_path / "other", numbered(lengths[::-1]))
    with pytest.raises(ValueError, match="data="):
        make(other).iterate().restore(state)
    make(tokens, process_count=2).iterate().restore(state)  # on another number of hosts it goes on


@modes
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_global_batch_does_not_depend_on_the_hosts(tokens, mode, shuffle):
    whole = make(tokens, mode, shuffle=shuffle)
    hosts = [make(tokens, mode, shuffle=shuffle, process_index=i, process_count=4) for i in range(4)]
    for step in range(2 * whole.steps_per_epoch if shuffle else whole.steps_per_epoch):
        parts = [host[step] for host in hosts]
        assert same(whole[step], {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


@modes
def test_seeds(tokens, mode):
    assert same(make(tokens, mode)[3], make(tokens, mode)[3])
    assert not same(make(tokens, mode)[3], make(tokens, mode, seed=2)[3])
    assert same(make(tokens, mode, shuffle=False)[3], make(tokens, mode, shuffle=False, seed=2)[3])


def test_evaluation_is_in_order_and_ends_with_empty_rows(tokens, lengths):
    batches = make(tokens, "pad", shuffle=False)
    made = [batches[step] for step in range(len(batches))]
    stream = np.concatenate([batch["tokens"] for batch in made])
    assert stream[stream > 0].tolist() == list(range(1, lengths.sum() + 1))
    empty = len(stream) - batches.rows_per_epoch
    assert 0 < empty < 4 and (made[-1]["segments"][-empty:] == 0).all() and (made[-1]["targets"][-empty:] == -100).all()
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_more_rows_in_a_batch_than_in_an_epoch(tmp_path):
    made = cache(tmp_path / "c", [[1, 2], [3, 4], [5, 6]])
    batches = Batches(made, 8, 2, seed=3)
    stream = np.concatenate([batches[step]["tokens"] for step in range(3)])
    assert all(sorted(stream[i : i + 3, 0]) == [1, 3, 5] for i in range(0, 24, 3))
    last = Batches(made, 8, 2, shuffle=False)
    assert len(last) == 1 and last[0]["tokens"][:, 0].tolist() == [1, 3, 5, 0, 0, 0, 0, 0]
    assert (Batches(made, 8, 2, shuffle=False, process_index=1, process_count=2)[0]["segments"] == 0).all()


def test_iterating_to_the_end(tokens):
    batches = make(tokens, epochs=2)
    made = list(batches.iterate())
    assert len(made) == len(batches) == -(-2 * batches.rows_per_epoch // 4)
    assert len(list(batches.iterate(5, stop=9))) == 4
    with pytest.raises(TypeError, match="without end"):
        len(make(tokens))


def test_efficiency_is_what_the_batches_hold(tokens):
    for mode in MODES:
        batches = make(tokens, mode, shuffle=False)
        made = [batches[step] for step in range(len(batches))]
        rows = [row for batch in made for row in batch["segments"] if row.any()]
        assert batches.efficiency == sum((row > 0).sum() for row in rows) / sum(len(row) for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "packed"}, "did you mean 'pack'"),
        ({"mode": "bucket"}, "buckets"),
        ({"buckets": (4,)}, "buckets"),
        ({"process_count": 3}, "cannot take its share of 4 rows"),
        ({"process_count": 2, "process_index": 2}, "host 2 of 2"),
        ({"long": "error"}, "examples are longer"),
        ({"epochs": 0}, "epochs=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_mistakes(tokens, options, said):
    with pytest.raises(ValueError, match=said):
        Batches(tokens, 4, 16, **options)[0]


def test_permutations_are_even():
    """Every element is as likely anywhere; the first values are fixed, so that old runs can be resumed."""
    counts = collections.Counter(tuple(order.permutation(seed, 0, 0, 3).tolist()) for seed in range(6000))
    assert len(counts) == 6 and min(counts.values()) > 900 and max(counts.values()) < 1100
    assert order.permutation(1, 2, 0, 8).tolist() == FIXED
    assert order.permutation(1, 2, 1, 8).tolist() != FIXED and order.permutation(1, 3, 0, 8).tolist() != FIXED


def test_draws_do_not_depend_on_how_many():
    many = order.draws(5, order.MIDDLE, 1000)
    assert np.array_equal(order.draws(5, order.MIDDLE, 10), many[:10])
    assert many.shape == (1000, 4) and many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.02


def test_fill_in_the_middle_in_batches(tmp_path):
    lengths = np.random.default_rng(1).integers(2, 30, 200)
    made = cache(tmp_path / "c", numbered(lengths))
    first = int(made.header.tokens) + 1
    fim = Fim(prefix=first, suffix=first + 1, middle=first + 2, rate=0.5)
    batches = Batches(made, 4, 16, seed=1, fim=fim, epochs=1, shuffle=False)
    stream = [batches[step] for step in range(len(batches))]
    assert equal(stream, [Batches(made, 4, 16, seed=1, fim=fim, shuffle=False)[step] for step in range(len(batches))])
    tokens, targets = (np.concatenate([batch[name] for batch in stream]) for name in ("tokens", "targets"))
    segments = np.concatenate([batch["segments"] for batch in stream])
    plain = tokens[(segments > 0) & (tokens < first)]
    assert sorted(plain) == list(range(1, first))
    marks = [int((tokens == first + i).sum()) for i in range(3)]
    assert marks[0] == marks[1] == marks[2] and 0.4 < marks[0] / len(batches.pieces) < 0.6
    inside = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] > 0)
    assert (targets[:, :-1][inside] == tokens[:, 1:][inside]).all() and (targets[:, :-1][~inside] == -100).all()
    shuffled = Batches(made, 4, 16, seed=1, fim=fim)  # the same examples are changed in every epoch
    rows = shuffled.rows_per_epoch
    again = np.concatenate([shuffled[step]["tokens"] for step in range(-(-2 * rows // 4))])
    assert sorted(again[:rows].ravel()) == sorted(again[rows : 2 * rows].ravel()) == sorted(tokens[:rows].ravel())


def test_fill_in_the_middle_needs_whole_texts(tmp_path):
    made = cache(tmp_path / "c", [[1, 2]], [[False, True]])
    with pytest.raises(ValueError, match="learnt whole"):
        Batches(made, 1, 8, fim=Fim(prefix=3, suffix=4, middle=5))
