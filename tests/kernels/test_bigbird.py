"""BigBird's tables against transformers' own block-sparse attention, and how much of dense work they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

from jaxlm.kernels.bigbird import bigbird, random_blocks
from jaxlm.kernels.block_table import block_counts, multiplicity, visited_share

HEADS, H = 2, 8


def theirs(*, train, seed=3, heads=HEADS, block=64, random=3, max_length=4096):
    config = BigBirdConfig(
        hidden_size=heads * H, num_attention_heads=heads, block_size=block, num_random_blocks=random,
        max_position_embeddings=max_length,
    )  # fmt: skip
    torch.manual_seed(0)
    module = BigBirdBlockSparseAttention(config, seed=seed).train(train).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # logits far from 0, so that a wrong key shows
    return module


def their_random_blocks(module, t):
    """What `bigbird_block_sparse_attention` draws: the branch of its first lines."""
    np.random.seed(module.seed)
    block, random, heads = module.block_size, module.num_random_blocks, module.num_attention_heads
    if t in (1024, 3072, 4096):
        longest = module.max_seqlen
        draw = lambda: module._bigbird_block_rand_mask(longest, longest, block, block, random, last_idx=1024)
        return np.stack([draw()[: t // block - 2] for _ in range(heads)])
    lengths, counts = module._get_rand_attn_plan(t, block, random)
    return np.stack(module._bigbird_block_rand_mask_with_head(t, t, block, block, heads, lengths, counts))


@pytest.mark.parametrize(
    ("t", "block", "random", "max_length"),
    [
        (1024, 64, 3, 4096),
        (1024, 16, 5, 1024),
        (3072, 64, 3, 4096),
        (4096, 64, 3, 4096),
        (4096, 128, 2, 4096),
        (2048, 64, 3, 4096),  # the second plan: all random blocks among the first 11
        (8192, 64, 3, 8192),
        (768, 64, 3, 4096),  # the shortest that is not full attention
        (160, 16, 2, 512),
        (320, 8, 5, 512),
    ],
)
@pytest.mark.parametrize("seed", [0, 11])
def test_random_blocks_are_transformers_own(t, block, random, max_length, seed):
    want = their_random_blocks(
        theirs(train=True, seed=seed, block=block, random=random, max_length=max_length), t
    )  # fmt: skip
    got = random_blocks(t, heads=HEADS, seed=seed, block=block, random=random, max_length=max_length)
    assert got.dtype == np.int32 and (got == want).all()
    assert (got[0] != got[1]).any()


@pytest.mark.parametrize("random", [1, 2, 3, 4])
def test_transformers_third_plan_cannot_draw(random):
    """Why `random_blocks` refuses what transformers' model computes by full attention."""
    for n in range(random + 6, 2 * random + 6):
        module = theirs(train=True, block=8, random=random)
        with pytest.raises(ValueError, match="could not broadcast"):
            their_random_blocks(module, 8 * n)
        with pytest.raises(ValueError, match=f"t={8 * n} is {n} blocks: .* needs more than {5 + 2 * random}"):
            random_blocks(8 * n, heads=HEADS, seed=0, block=8, random=random)


def by_multiplicity(q, k, v, counts):
    """Attention [B, N, T, H] in float64 by the definition, each key counted as often as `counts` [N, T, S] says."""
    weights = counts * np.exp(np.einsum("bnth,bnsh->bnts", q, k) * H**-0.5)
    return np.einsum("bnts,bnsh->bnth", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("t", "block", "random"), [(1024, 64, 3), (1024, 32, 2), (832, 64, 3), (192, 16, 3), (160, 16, 2)]
)
def test_attention_by_the_table_is_transformers_own(t, block, random, train):
    module = theirs(train=train, block=block, random=random)
    x = torch.randn(1, t, HEADS * H, dtype=torch.float64)
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, t, dtype=torch.float64), block)
    blocked, band, from_mask, to_mask = masks
    with torch.no_grad():
        want, _ = module(x, band, from_mask, to_mask, blocked, blocked)
        q, k, v = (
            layer(x).view(1, t, HEADS, H).transpose(1, 2).numpy() for layer in (module.query, module.key, module.value)
        )
    indices = random_blocks(t, heads=HEADS, seed=3, block=block, random=random) if train else None
    counts = np.asarray(multiplicity(bigbird(t, indices, block=block, random=random), t, t), np.float64)
    got = by_multiplicity(q, k, v, counts)
    np.testing.assert_allclose(got.transpose(0, 2, 1, 3).reshape(1, t, -1), want.numpy(), rtol=1e-10, atol=1e-12)
    if counts.max() > 1:  # in training with the second plan no random block repeats
        once = by_multiplicity(q, k, v, np.minimum(counts, 1)).transpose(0, 2, 1, 3).reshape(1, t, -1)
        assert np.abs(once - want.numpy()).max() > 1e-3
    assert counts.max() > 1 or (train and t != 1024)


def test_evaluation_counts_the_first_block_again():
    counts = np.asarray(block_counts(bigbird(1024), 16))[0]
    assert (counts[0] == 1).all() and (counts[-1] == 1).all()
    assert (counts[1:-1, 0] == 4).all()
    assert counts[1].tolist() == [4, 1, 1] + [0] * 12 + [1]
    assert counts[-2].tolist() == [4] + [0] * 12 + [1, 1, 1]
    assert counts[7].tolist() == [4, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1]


def test_indices_may_be_traced():
    indices = random_blocks(1024, heads=2, seed=0)
    traced = jax.jit(lambda indices: bigbird(1024, indices))(jnp.asarray(indices))
    assert (traced.blocks == bigbird(1024, indices).blocks).all() and traced.full_rows == (0, -1)
    traced.validate(1024, 1024, 2)


@pytest.mark.parametrize(("t", "bar"), [(4096, 0.24), (16384, 0.065)])
def test_tiles_of_128_by_64_visit_little(t, bar):
    n = t // 64
    anywhere = np.random.default_rng(0).integers(1, n - 1, (2, n - 2, 3)).astype(np.int32)
    plans = {
        "transformers": random_blocks(t, heads=2, seed=0, max_length=max(t, 4096)),
        "evaluation": None,
        "anywhere": anywhere,
    }
    for name, indices in plans.items():
        share = visited_share(bigbird(t, indices), n, group=2)
        assert share <= bar, name
        assert share > visited_share(bigbird(t, indices), n)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bigbird(1000), "t=1000 and block=64"),
        (lambda: bigbird(256), r"at least 5 blocks, got 4 \(t=256"),
        (lambda: bigbird(1024, np.zeros((2, 14, 2), np.int32)), r"\[heads, 14, 3\], got \(2, 14, 2\)"),
        (lambda: random_blocks(4096, heads=1, seed=0, max_length=1024), "t=4096 is longer than max_length=1024"),
        (lambda: random_blocks(704, heads=1, seed=0), "t=704 is 11 blocks: BigBird with 3 random .* more than 11"),
        (lambda: random_blocks(4096, heads=1, seed=0, block=128, random=5), "block 2 needs 5 random blocks and has 4"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
