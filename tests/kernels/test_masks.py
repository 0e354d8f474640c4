import itertools

import numpy as np
import pytest

from jaxlm.kernels.masks import (
    CAUSAL,
    EVERYTHING,
    FULL,
    SKIP,
    Band,
    KeysBefore,
    QueriesBefore,
    dense,
    prefix_lm,
    window,
)

MASKS = [
    EVERYTHING,
    CAUSAL,
    window(1),
    window(5),
    Band(-3, 4),
    KeysBefore(7),
    QueriesBefore(6),
    prefix_lm(9),
    ~window(4),
    window(6) | KeysBefore(2) | QueriesBefore(3),
    CAUSAL & ~window(3),
    prefix_lm(5) & ~KeysBefore(2),
]


def brute(text, t=23, s=29):
    return np.array([[bool(eval(text, {"q": q, "k": k})) for k in range(s)] for q in range(t)])


@pytest.mark.parametrize(
    ("mask", "meaning"),
    [
        (EVERYTHING, "True"),
        (CAUSAL, "k <= q"),
        (window(1), "k == q"),
        (window(5), "q - 5 < k <= q"),
        (Band(-3, 4), "-3 <= q - k <= 4"),
        (prefix_lm(9), "k <= q or k < 9"),
        (~window(4), "not (q - 4 < k <= q)"),
        (CAUSAL & QueriesBefore(6), "k <= q < 6"),
    ],
    ids=str,
)
def test_elements(mask, meaning):
    assert (dense(mask, 23, 29) == brute(meaning)).all()


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 3), (8, 16), (23, 29)], ids=str)
def test_tile_is_sound(mask, block):
    """SKIP and FULL are never wrong, and a tile of one element is never PARTIAL."""
    elements, (t, s) = dense(mask, 23, 29), (23, 29)
    for q, k in itertools.product(range(0, t, block[0]), range(0, s, block[1])):
        q1, k1 = min(q + block[0], t), min(k + block[1], s)
        part, answer = elements[q:q1, k:k1], mask.tile(q, q1, k, k1)
        if answer == FULL or part.size == 1:
            assert part.all() == (answer == FULL)
        if answer == SKIP:
            assert not part.any()


def test_masks_are_static_arguments():
    assert hash(window(5) | KeysBefore(2)) == hash(window(5) | KeysBefore(2))
    assert window(5) != window(6)


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        window(0)
