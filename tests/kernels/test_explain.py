import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.kernels.attention as module
from jaxlm.kernels.attention import IMPLS, attention
from jaxlm.kernels.bigbird import bigbird, random_blocks
from jaxlm.kernels.block_table import visited_share
from jaxlm.kernels.explain import FEATURES, explain_attention
from jaxlm.kernels.masks import CAUSAL, EVERYTHING, KeysBefore, window
from jaxlm.kernels.plan import tile_plan

Q, K = (2, 256, 4, 8), (2, 256, 2, 8)


@pytest.mark.parametrize("mask", [CAUSAL, window(40) | KeysBefore(3), bigbird(256, block=16)], ids=["a", "b", "c"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_it_names_what_attention_runs(mask, softcap, monkeypatch):
    """The first implementation that attention tries to run, by a run that says its name."""
    ran = []
    monkeypatch.setattr(module.Implementation, "run", lambda self, *a, **k: ran.append(self.name) or a[0])
    attention(jnp.zeros(Q), jnp.zeros(K), jnp.zeros(K), mask, softcap=softcap)
    features = [] if softcap is None else ["softcap"]
    told = explain_attention(Q, K, mask, dtype=jnp.float32, features=features)
    assert ran == [told.chosen]
    assert list(told.reasons) == list(IMPLS) and told.reasons[told.chosen] is None
    assert told.platform == jax.default_backend()


def test_reasons_are_those_of_the_implementations():
    told = explain_attention(Q, K, CAUSAL, dtype=jnp.float32, platform="gpu", features=["sinks"])
    assert told.reasons["cudnn"] == "computes in float16 or bfloat16, got float32"
    told = explain_attention(Q, K, CAUSAL, dtype=jnp.bfloat16, platform="gpu", features=["sinks"])
    assert told.reasons["cudnn"] == "has no sinks"
    assert explain_attention(Q, K, CAUSAL, dtype=jnp.bfloat16, platform="gpu").chosen == "cudnn"
    assert "log-sum-exp" in str(explain_attention(Q, K, CAUSAL, dtype=jnp.bfloat16, platform="gpu", return_lse=True))
    assert "got 8 and 16" in str(explain_attention(Q, K, CAUSAL, dtype=jnp.bfloat16, platform="gpu", v_dim=16))


def test_a_named_implementation_runs_or_nothing_does():
    told = explain_attention(Q, K, CAUSAL, dtype=jnp.bfloat16, platform="gpu", impl="reference")
    assert told.chosen == "reference" and "not    cudnn: could, but another was named" in str(told)
    told = explain_attention(Q, K, CAUSAL, dtype=jnp.bfloat16, platform="cpu", impl="cudnn")
    assert told.chosen is None and "runs   nothing" in str(told)


def test_tiles_are_the_plans():
    told = explain_attention(Q, K, window(40), dtype=jnp.float32, block_q=32, block_k=16)
    plan = tile_plan(window(40), 256, 256, 32, 16)
    assert told.tiles.share == plan.share and told.tiles.skip == 128 - plan.visited
    assert str(explain_attention(Q, K, CAUSAL, dtype=jnp.float32, block_q=64, block_k=64).tiles) == (
        "64 x 64: 6 SKIP, 4 PARTIAL, 6 FULL; 62.5% of dense work"
    )
    assert explain_attention(Q, K, EVERYTHING, dtype=jnp.float32).tiles.full == 4


def test_positions_that_are_data_leave_no_tile_out():
    tiles = explain_attention(Q, K, window(40), dtype=jnp.float32, features=["k_pos"], block_q=32, block_k=32).tiles
    assert (tiles.skip, tiles.partial, tiles.full, tiles.share) == (0, 64, 0, 1.0)
    assert "k_pos may be anything" in str(tiles)


def test_tables_are_counted_by_their_blocks():
    table = bigbird(4096, random_blocks(4096, heads=4, seed=1))
    tiles = explain_attention((1, 4096, 4, 64), (1, 4096, 4, 64), table, dtype=jnp.bfloat16).tiles
    assert (tiles.block_q, tiles.block_k) == (128, 64)
    assert tiles.share == visited_share(table, 64, group=2) < 0.24
    assert tiles.skip + tiles.partial + tiles.full == 4 * 32 * 64
    evaluation = explain_attention((1, 1024, 4, 64), (1, 1024, 4, 64), bigbird(1024), dtype=jnp.bfloat16, block_q=64)
    assert (evaluation.tiles.full, evaluation.tiles.partial) == (2 * 16 + 2 * 3 + 12 * 4, 14)


def test_it_prints_readably():
    told = explain_attention(Q, K, CAUSAL, dtype=jnp.bfloat16, platform="cpu", features=["softcap"], impl="reference")
    lines = str(told).splitlines()
    assert (
        lines[0] == "attention [2, 256, 4, 8] x [2, 256, 2, 8] bfloat16 under Band(lo=0, hi=None) with softcap on cpu"
    )
    assert lines[1] == "  runs   reference"
    assert "  not    cudnn: needs an NVIDIA GPU, the platform is 'cpu'" in lines
    assert lines[-1] == "  tiles  128 x 128: 1 SKIP, 2 PARTIAL, 1 FULL; 75.0% of dense work"
    table = explain_attention(Q, K, bigbird(256, block=16), dtype=np.float32)
    assert "under BlockTable(blocks=[1, 16, 8], block=16, full_rows=(0, -1))" in str(table)


def test_bad_questions_are_refused():
    assert {"q_pos", "k_valid", "sinks", "dropout"} <= set(FEATURES) and "impl" not in FEATURES
    with pytest.raises(ValueError, match="attention has no window; it has q_pos"):
        explain_attention(Q, K, CAUSAL, dtype=jnp.float32, features=["window"])
    with pytest.raises(ValueError, match=r"unknown attention implementation 'flsh'; there are .*flash_tpu, cudnn"):
        explain_attention(Q, K, CAUSAL, dtype=jnp.float32, impl="flsh")
    with pytest.raises(ValueError, match="multiple of key-value heads"):
        explain_attention(Q, (2, 256, 3, 8), CAUSAL, dtype=jnp.float32)
    with pytest.raises(ValueError, match="block=48 needs multiples"):
        explain_attention(Q, K, bigbird(48 * 16, block=48), dtype=jnp.float32)
