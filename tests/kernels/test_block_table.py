import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.block_table import BlockTable, block_counts, merge_rows, multiplicity, table_of, visited_share
from jaxlm.kernels.masks import CAUSAL, EVERYTHING, BlockLayout, KeysBefore, Mask, QueriesBefore, dense, window

E = -1  # an empty slot


def table(blocks, block=4, full_rows=()):
    return BlockTable(jnp.asarray(blocks, jnp.int32), block, full_rows)


SMALL = [[[0, 0, 1, E], [E, 2, E, 1], [E, E, E, E]], [[2, 2, 2, 2], [0, 1, 2, 0], [1, E, E, E]]]  # [2 heads, 3 rows, 4]


def drawn(seed, heads=2, rows=7, slots=5, key_blocks=6):
    return table(np.random.default_rng(seed).integers(-1, key_blocks, (heads, rows, slots)))


def test_multiplicity_counts_every_listing():
    got = np.asarray(multiplicity(table(SMALL, full_rows=(-1,)), 12, 12))
    want = [[[2, 1, 0], [0, 1, 1], [1, 1, 1]], [[0, 0, 4], [2, 1, 1], [1, 1, 1]]]
    assert got.shape == (2, 12, 12) and got.dtype == np.float32
    assert (got == np.repeat(np.repeat(want, 4, 1), 4, 2)).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [1, 2, 3])
def test_merged_rows_list_the_same_blocks(seed, group):
    it = drawn(seed)
    blocks, counts = (np.asarray(x) for x in jax.jit(lambda it: merge_rows(it, group, 6))(it))
    entries = np.asarray(it.blocks)
    for head, i in np.ndindex(blocks.shape[:2]):
        rows = [collections.Counter(row[row >= 0].tolist()) for row in entries[head, i * group : (i + 1) * group]]
        distinct = sorted(set().union(*rows))
        assert blocks[head, i].tolist() == distinct + [E] * (blocks.shape[2] - len(distinct))
        for slot, block in enumerate(distinct):
            want = [row[block] for row in rows] + [0] * (group - len(rows))
            assert counts[head, i, slot].tolist() == want
        assert not counts[head, i, len(distinct) :].any()


def test_share_is_of_tiles():
    it = table(SMALL, full_rows=(-1,))
    assert visited_share(it, 3) == (2 + 2 + 3 + 1 + 3 + 3) / 18
    assert visited_share(it, 3, group=2) == (3 + 3 + 3 + 3) / 12
    assert visited_share(table(SMALL), 3, group=3) == 1


def test_a_table_is_an_argument_and_scans_over_layers():
    layers = jax.tree.map(lambda *xs: jnp.stack(xs), *[drawn(seed) for seed in range(3)])
    assert layers.block == 4
    _, counts = jax.lax.scan(lambda carry, it: (carry, block_counts(it, 6)), None, layers)
    for seed in range(3):
        assert (counts[seed] == block_counts(drawn(seed), 6)).all()


@pytest.mark.parametrize(
    ("it", "sizes", "message"),
    [
        (table(SMALL), (13, 12, 2), "block=4 needs multiples of it, got t=13 queries and s=12 keys"),
        (table(SMALL), (12, 10, 2), "t=12 queries and s=10 keys"),
        (table(SMALL), (16, 16, 2), r"2 heads and 4 query blocks needs .* got \(2, 3, 4\)"),
        (table(SMALL), (12, 12, 4), r"4 heads and 3 query blocks needs \[4 or 1, 3, slots\], got \(2, 3, 4\)"),
        (table(SMALL[0]), (12, 12, 2), r"got \(3, 4\)"),
        (table(np.zeros((2, 3, 0))), (12, 12, 2), r"got \(2, 3, 0\)"),
        (BlockTable(jnp.zeros((1, 3, 2)), 4), (12, 12, 2), "needs int32 blocks, got float32"),
        (table(SMALL, full_rows=(0, 3)), (12, 12, 2), r"full_rows \[3\] are not among 3 query blocks"),
        (table(SMALL, full_rows=(-4,)), (12, 12, 2), r"full_rows \[-4\]"),
        (table(SMALL), (12, 8, 2), "for 2 key blocks holds 2"),
        (table([[[-2, 0]] * 3]), (12, 12, 2), "for 3 key blocks holds -2"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_tables_that_do_not_fit_are_refused(it, sizes, message):
    with pytest.raises(ValueError, match=message):
        it.validate(*sizes)


def test_a_traced_table_is_checked_by_shape():
    jax.jit(lambda it: it.validate(12, 8, 2))(table(SMALL))  # its values cannot be known
    with pytest.raises(ValueError, match="got t=13"):
        jax.jit(lambda it: it.validate(13, 12, 2))(table(SMALL))
    table(SMALL).validate(12, 12, 2)
    table(SMALL[:1]).validate(12, 12, 8)


LAYOUT = BlockLayout(4, ((0,), (2, 5), (), (1, 3)))


@pytest.mark.parametrize(
    "mask",
    [
        LAYOUT,
        ~LAYOUT,
        LAYOUT | KeysBefore(4) | QueriesBefore(8),
        LAYOUT | BlockLayout(8, ((1,), (0, 1))),
        LAYOUT | EVERYTHING,
        BlockLayout(4, ()),
    ],
    ids=str,
)
def test_a_mask_of_whole_blocks_is_a_table(mask):
    made = table_of(mask, 20, 24)
    assert made is not None
    made.validate(20, 24, 1)
    np.testing.assert_array_equal(multiplicity(made, 20, 24)[0], dense(mask, 20, 24))


def test_rows_that_see_everything_take_no_slots():
    made = table_of(LAYOUT | QueriesBefore(8), 20, 24)
    assert made is not None and made.full_rows == (0, 1) and made.blocks.shape == (1, 5, 2)


@pytest.mark.parametrize(
    ("mask", "t"), [(LAYOUT & CAUSAL, 20), (LAYOUT | KeysBefore(3), 20), (LAYOUT, 18), (window(4), 20)], ids=str
)
def test_other_masks_are_not(mask: Mask, t: int):
    assert table_of(mask, t, 24) is None
