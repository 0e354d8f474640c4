"""BigBird's block tables (Zaheer et al. 2020, arXiv 2007.14062), as transformers builds them (`modeling_big_bird.py`).

The first and the last block of queries see everything; every other block sees the first and the last block, itself, its
two neighbours, and `random` blocks of its own for each head and layer. Random blocks may repeat each other's and the
rest: each listing counts in the softmax. In evaluation transformers draws nothing and takes block 0 for every random
one, so that block 0 counts 1 + random times.

transformers uses this pattern for more than 5 + 2 * random blocks, and full attention up to there; the third plan in
its code, for fewer blocks, is never used (and cannot draw enough of them).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from jaxlm.kernels.block_table import BlockTable

# The lengths of the paper, for which transformers draws by an older plan: in a table of the longest length that the
# model takes, from the blocks of the first 1024 tokens only.
PAPER_LENGTHS = (1024, 3072, 4096)
PAPER_TOKENS = 1024


def bigbird(
    t: int, indices: Int[Array | np.ndarray, "N rows R"] | None = None, *, block: int = 64, random: int = 3
) -> BlockTable:
    """The table of t tokens with the given random blocks [heads or 1, t / block - 2, random]; None is evaluation mode.

    indices may be traced, as one layer of a scan is. `random_blocks` draws them.
    """
    n = _blocks(t, block)
    indices = np.zeros((1, n - 2, random), np.int32) if indices is None else indices
    if indices.shape[1:] != (n - 2, random):
        raise ValueError(f"{t=} and {block=} need random blocks [heads, {n - 2}, {random}], got {indices.shape}")
    row = np.arange(n)
    fixed = np.stack([0 * row, row - 1, row, row + 1, 0 * row + n - 1], 1)
    fixed[1, 1] = fixed[n - 2, 3] = -1  # the neighbour is the first or the last block, which is listed already
    fixed = jnp.asarray(np.broadcast_to(fixed, (indices.shape[0], n, 5)), jnp.int32)
    drawn = jnp.pad(jnp.asarray(indices, jnp.int32), ((0, 0), (1, 1), (0, 0)), constant_values=-1)
    blocks = jnp.concatenate([fixed, drawn], 2)
    return BlockTable(blocks.at[:, np.array([0, n - 1])].set(-1), block, full_rows=(0, -1))


def random_blocks(
    t: int, *, heads: int, seed: int, block: int = 64, random: int = 3, max_length: int = 4096
) -> Int[np.ndarray, "N rows R"]:
    """The random blocks that transformers draws in training, int32 [heads, t / block - 2, random].

    seed is the number of the layer there; max_length is its `max_position_embeddings`. Where transformers uses full
    attention this raises ValueError: it could not draw there.
    """
    n, generator = _blocks(t, block), np.random.RandomState(seed)
    if n <= 5 + 2 * random:
        raise ValueError(f"{t=} is {n} blocks: BigBird with {random} random blocks needs more than {5 + 2 * random}")
    if t in PAPER_LENGTHS:
        if max_length < t:
            raise ValueError(f"{t=} is longer than {max_length=}")
        plan = [_paper_plan(generator, max_length // block, block, random)[: n - 2] for _ in range(heads)]
        return np.stack(plan).astype(np.int32)
    indices = np.stack([_near_row(generator, i, random) for i in range(1, n) for _ in range(heads)])
    return indices.reshape(n - 1, heads, random).swapaxes(0, 1)[:, :-1].astype(np.int32)


def _paper_plan(generator: np.random.RandomState, n: int, block: int, random: int) -> np.ndarray:
    """One head's random blocks for n blocks, int [n - 2, random]; a window or a global block is not always excluded."""
    middle = np.arange(1, n - 1)
    last = PAPER_TOKENS // block - 1 if 2 * block < PAPER_TOKENS else n - 1
    rows = []
    for i in range(1, n - 1):
        before = i - 2
        if i <= 2:
            allowed = middle[i + 1 : last]
        elif i >= n - 3:
            allowed = middle[:last]
        elif before > last or i + 1 == last:
            allowed = middle[: min(before, last)]
        else:
            allowed = np.concatenate([middle[:before], middle[i + 1 : last]])
        rows.append(_take(generator.permutation(allowed), random, i))
    return np.stack(rows)


def _near_row(generator: np.random.RandomState, i: int, random: int) -> np.ndarray:
    """The random blocks of row i for lengths that are not the paper's: all among the first 5 + 2 * random blocks."""
    near = 5 + 2 * random
    illegal = {i - 1, i, i + 1, 0, near - 1}
    if i == 1:
        illegal.add(near - 2)
    if i == near - 2:
        illegal.add(1)
    order = generator.permutation(near)
    return _take(order[~np.isin(order, list(illegal))], random, i)


def _take(candidates: np.ndarray, count: int, i: int) -> np.ndarray:
    if len(candidates) < count:
        raise ValueError(f"query block {i} needs {count} random blocks and has {len(candidates)} to choose from")
    return candidates[:count]


def _blocks(t: int, block: int) -> int:
    if block < 1 or t % block:
        raise ValueError(f"BigBird needs whole blocks, got {t=} and {block=}")
    if t // block < 5:
        raise ValueError(f"BigBird needs at least 5 blocks, got {t // block} ({t=}, {block=})")
    return t // block
