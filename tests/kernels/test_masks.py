import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.kernels.masks import (
    CAUSAL,
    EVERYTHING,
    FULL,
    PARTIAL,
    SKIP,
    Band,
    BlockLayout,
    Every,
    Full,
    KeysBefore,
    QueriesBefore,
    SameChunk,
    chunked_local,
    dense,
    longformer,
    prefix_lm,
    strided,
    window,
)
from jaxlm.kernels.plan import tile_kinds, tile_plan

T, S = 23, 29
LAYOUT = BlockLayout(4, ((0,), (0, 1), (0, 2, 6), (), (1, 3, 4), (5,)))
MASKS = [
    EVERYTHING,
    CAUSAL,
    window(1),
    window(5),
    Band(-3, 4),
    Band(3, -3),
    KeysBefore(7),
    QueriesBefore(6),
    SameChunk(6),
    Every(1),
    Every(5),
    LAYOUT,
    prefix_lm(9),
    chunked_local(8),
    longformer(6, 2),
    strided(7),
    ~window(4),
    ~LAYOUT,
    window(6) | KeysBefore(2) | QueriesBefore(3),
    CAUSAL & ~window(3),
    prefix_lm(5) & ~KeysBefore(2),
]


def brute(text, t=T, s=S):
    return np.array([[bool(eval(text, {"q": q, "k": k})) for k in range(s)] for q in range(t)])


@pytest.mark.parametrize(
    ("mask", "meaning"),
    [
        (EVERYTHING, "True"),
        (CAUSAL, "k <= q"),
        (window(1), "k == q"),
        (window(5), "q - 5 < k <= q"),
        (Band(-3, 4), "-3 <= q - k <= 4"),
        (SameChunk(6), "q // 6 == k // 6"),
        (Every(5), "(q - k) % 5 == 0"),
        (prefix_lm(9), "k <= q or k < 9"),
        (chunked_local(8), "k <= q and q // 8 == k // 8"),
        (longformer(6, 2), "abs(q - k) <= 3 or q < 2 or k < 2"),
        (strided(7), "k <= q and (q - k < 7 or (q - k) % 7 == 0)"),
        (BlockLayout(4, ((0,), (1, 3))), "(q // 4, k // 4) in ((0, 0), (1, 1), (1, 3))"),
        (~window(4), "not (q - 4 < k <= q)"),
        (CAUSAL & QueriesBefore(6), "k <= q < 6"),
    ],
    ids=str,
)
def test_elements(mask, meaning):
    want = brute(meaning)
    assert (dense(mask, T, S) == want).all()
    assert (jax.jit(mask)(jnp.arange(T)[:, None], jnp.arange(S)) == want).all()


def check_tiles(mask, t, s, block_q, block_k):
    """SKIP and FULL are never wrong, and a tile of one element is never PARTIAL."""
    elements, kinds = dense(mask, t, s), tile_kinds(mask, t, s, block_q, block_k)
    for (i, q), (j, k) in itertools.product(enumerate(range(0, t, block_q)), enumerate(range(0, s, block_k))):
        part, kind = elements[q : q + block_q, k : k + block_k], kinds[i, j]
        assert part.all() or kind != FULL
        assert not part.any() or kind != SKIP
        assert part.size > 1 or kind != PARTIAL or block_q * block_k > 1  # a ragged tile is never FULL
        alone = mask.tile(q, min(q + block_q, t), k, min(k + block_k, s))
        assert kind == alone or (kind == PARTIAL and alone == FULL and part.shape != (block_q, block_k))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 3), (8, 16), (23, 29)], ids=str)
def test_tile_is_sound(mask, block):
    check_tiles(mask, T, S, *block)


def random_mask(rng, depth):
    if depth == 0:
        a, b = (int(x) for x in rng.integers(-20, 21, 2))
        n = int(rng.integers(1, 25))
        rows = tuple(tuple(np.flatnonzero(rng.random(7) < 0.4).tolist()) for _ in range(int(rng.integers(0, 8))))
        primitives = [
            Full(), Band(a, None), Band(None, b), Band(min(a, b), max(a, b)), KeysBefore(a), QueriesBefore(b),
            SameChunk(n), Every(n), BlockLayout(int(rng.integers(1, 7)), rows),
        ]  # fmt: skip
        return primitives[rng.integers(len(primitives))]
    left, right = random_mask(rng, depth - 1), random_mask(rng, depth - 1)
    return [left & right, left | right, ~left][rng.integers(3)]


@pytest.mark.parametrize("seed", range(60))
def test_tile_is_sound_for_any_combination(seed):
    rng = np.random.default_rng(seed)
    mask = random_mask(rng, depth=seed % 4)
    for _ in range(3):
        t, s, block_q, block_k = (int(x) for x in rng.integers(1, [26, 31, 14, 14]))
        check_tiles(mask, t, s, block_q, block_k)


@pytest.mark.parametrize("mask", [m for m in MASKS if m not in (Band(3, -3), strided(7))], ids=str)
def test_position_minus_one_is_harmless(mask):
    """The query of an empty slot: any answer will do, but one, and the same in numpy and JAX."""
    alone = mask(np.array([[-1]]), np.arange(S)[None])
    assert alone.shape == (1, S) and alone.dtype == bool
    assert (np.asarray(mask(jnp.array([[-1]]), jnp.arange(S)[None])) == alone).all()


def test_a_layout_sees_nothing_outside_of_its_rows():
    layout = BlockLayout(4, ((0, 1), (1,)))
    seen = dense(layout, 40, 40)
    assert seen.sum() == 3 * 16 and not seen[8:].any() and not seen[:, 8:].any()
    assert layout.tile(0, 40, 8, 40) == SKIP and layout.tile(0, 4, 0, 8) == FULL and layout.tile(0, 8, 0, 8) == PARTIAL
    assert not layout(np.array([-1]), np.array([0])).any()


def test_aligned_tiles_of_a_layout_need_no_predicate():
    kinds = tile_kinds(LAYOUT, 24, 28, 2, 4)
    assert PARTIAL not in kinds and (kinds == FULL).any()


def test_masks_say_whether_they_look_up_a_table():
    block = LAYOUT.block
    assert (LAYOUT | CAUSAL).table_block == (~LAYOUT).table_block == (CAUSAL & LAYOUT).table_block == block
    assert (LAYOUT & BlockLayout(3 * block, ((0,),))).table_block == block
    assert longformer(6, 2).table_block == (~CAUSAL).table_block == 0


def test_masks_are_static_arguments():
    assert hash(window(5) | LAYOUT) == hash(window(5) | BlockLayout(4, LAYOUT.rows))
    assert window(5) != window(6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(0), "size=0 must be at least 1"),
        (lambda: chunked_local(0), "chunk size=0 must be at least 1"),
        (lambda: longformer(5), "window=5 must be even"),
        (lambda: longformer(0), "window=0 must be even and at least 2"),
        (lambda: strided(0), "stride n=0 must be at least 1"),
        (lambda: BlockLayout(0, ()), "block=0 must be at least 1"),
        (lambda: BlockLayout(4, ((0,), (1, 1))), r"row 1 of a BlockLayout needs distinct .* \(1, 1\)"),
        (lambda: BlockLayout(4, ((-1,),)), r"row 0 of a BlockLayout needs .* from 0 up, got \(-1,\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_masks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# How much of the dense work a plan visits.


def test_causal_visits_half_and_the_diagonal():
    for t, block in ((4096, 128), (16384, 512)):
        rows = t // block
        share = tile_plan(CAUSAL, t, t, block, block).share
        assert share == (rows + 1) / (2 * rows) <= 0.5 + 1 / rows
        assert tile_plan(CAUSAL, t, t, block, block, transposed=True).share == share
    # A query tile twice as tall as a key tile has two key tiles on its diagonal.
    assert tile_plan(CAUSAL, 4096, 4096, 128, 64).share <= 0.51 + 64 / 4096


@pytest.mark.parametrize("block", [(128, 64), (128, 128), (256, 128)], ids=str)
def test_a_window_of_1024_at_16k_visits_a_twelfth(block):
    assert tile_plan(window(1024), 16384, 16384, *block).share <= 0.08


def test_other_layouts_visit_few_tiles():
    share = lambda mask: tile_plan(mask, 16384, 16384, 128, 128).share
    assert share(chunked_local(8192)) <= 0.26
    assert share(longformer(512, 64)) <= 0.06
    assert 0.5 < share(prefix_lm(1024)) < 0.54


@pytest.mark.parametrize("mask", [CAUSAL, window(4096) | KeysBefore(512) | ~Every(3)], ids=str)
def test_a_plan_of_131072_tokens_is_quick(mask):
    start = time.perf_counter()
    plan = tile_plan.__wrapped__(mask, 131072, 131072, 512, 512)
    assert time.perf_counter() - start < 1
    assert plan.index.shape[0] == 256
