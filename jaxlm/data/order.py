"""Order drawn from a seed alone: permutations and draws that need no state, and do not change with numpy's version."""

import numpy as np

EXAMPLES, ROWS, BATCHES, MIDDLE = range(4)  # what is drawn; each has a stream of its own


def permutation(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """int64 [count]: 0..count-1, in an order that follows from (seed, epoch, stream).

    Sorts Philox's raw output, which numpy promises to keep; it does not promise that of Generator.permutation.
    """
    return np.argsort(_philox(seed, stream, epoch).random_raw(count), kind="stable")


def draws(seed: int, stream: int, count: int) -> np.ndarray:
    """float64 [count, 4] in [0, 1): four numbers for each of 0..count-1, the same for any larger count."""
    raw = _philox(seed, stream, 0).random_raw(4 * count).reshape(count, 4)
    return (raw >> np.uint64(11)) * 2.0**-53


def _philox(seed: int, stream: int, epoch: int) -> np.random.Philox:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: expected 0 <= seed < 2**64")
    # The counter's low word runs with what is drawn; epoch and stream stand in others, so streams never meet.
    return np.random.Philox(key=np.array([seed, 0], np.uint64), counter=np.array([0, 0, epoch, stream], np.uint64))
