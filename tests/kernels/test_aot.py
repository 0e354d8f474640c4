"""Kernels compiled for TPUs that are not there: they lower, fit and cost what they say; and reading schedules."""

import functools
import json
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.kernels import masks
from jaxlm.kernels.attention import attention
from jaxlm.kernels.bigbird import bigbird, random_blocks
from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.flash_tpu_fwd import choose_blocks, flat_plan
from jaxlm.kernels.recurrence import recurrence
from tests import aot
from tests.conftest import NO_LIBTPU, ROOT
from tests.kernels.looped import looped
from tests.kernels.test_sparse_tpu import visited

needs_libtpu = pytest.mark.skipif(not aot.HAS_LIBTPU, reason=NO_LIBTPU)
CHIPS_OF_KERNELS = {
    "forward": "v5e",
    "gradient": "v6e",
    "sharded": "v5p",
    "sparse": "tpu7x",
    "decode": "v4",
    "recurrence": "v6e",
}  # scripts/aot_all compiles for all


# Parts of what libtpu 0.0.42 wrote for a kernel with a loop of 16 trips within a grid of 4 steps.
BUNDLES = """= control target key end

     0   :  { %6 = vsyncpa [#allocation3], 0  } /* entry bundle: %loopy.1 = custom-call(%x.1) */
   0x1   :  { %s405_s9 = smov 0 /* copy for cssa */ } /* Start region 75 :: End region 75 */
   0x2 LB: > { %s419_s11 = sadd.s32 1, %s378_s9  ;;  %s378_s9 = sphi %s405_s9, %s522_s9 /* phi copy :: iteration index, stage = 0 */ } /* Start region 80 */
   0x3   : > { %103 = sbr.rel (%p100_p0) target = $region24  ;;  %s210_s17 = sshll.u32 (!%p100_p0), %s105_s16, 7 }
   0x4   : > { %s380_s20 = smov 0 /* copy for cssa */ } /* Start region 64 :: End region 64 */
   0x5 LB: >> { %s130_s20 = sadd.s32 1, %s382_s20 /* copy for cssa */  ;;  %s382_s20 = sphi %s380_s20, %s130_s20 /* phi copy */ } /* Start region 69 */
   0x6   : >> { %v134_v1 = vld [vmem:[%s133_s22] sm:$0xff]  ;;  %p127_p8 = scmp.ge.s32.totalorder %s130_s20, 16 /* loop exit test */ }
   0x7   : >> { %129 = sbr.rel (!%p127_p8) target = $region69 }
   0x8   : >> { %138 = vst [vmem:[#allocation5] sm:$0xff] /*vst_source=*/%v137_v5 } /* End region 69 */
   0x9   : > { %323 = shalt.err (!%p318_p10) /* BoundsCheck 5
base_bounds: (1, 1)
hlo: loopy.1
 */ }
   0xa PF: > { %p12_p12 = scmp.ge.s32.totalorder %s419_s11, 6 /* loop exit test */ } /* Start/End empty region 24 */
   0xb   : > { %14 = sbr.rel (!%p12_p12) target = $region80 }
   0xc   :  {} /* End region 80 */
   0xd   :  { %159 = vsyncpa [#allocation3], 1 } /* exit bundle: %loopy.1 = custom-call(%x.1) */
"""  # noqa: E501


def test_loops_and_branches_are_read():
    loops, branches = aot.parse_branches(BUNDLES)
    inner, grid = sorted(loops, key=lambda loop: loop.stop - loop.start)
    assert inner == aot.Loop(start=5, stop=9, trips=16, is_grid=False)
    assert (grid.start, grid.stop, grid.is_grid) == (2, 13, True)
    assert branches == ((3 + 1 + aot.DELAY, 10),)
    utilization = "== CAPACTIY:\nMXU, VSTORE\n 2 2\n== UTILIZATION:\n" + "1 0\n" * 14
    schedule = aot.parse_schedule("loopy", utilization, BUNDLES)
    assert schedule.bundles() == 14 + 4 * 15 and schedule.slots("MXU") == schedule.bundles()
    assert schedule.bundles(skip=((5, 9),)) == 10
    assert schedule.share("MXU") == 0.5


def test_a_loop_without_static_trip_count_is_said():
    _, limit, rest = BUNDLES.partition("%s130_s20, 16")
    text = BUNDLES.replace(limit, "%s130_s20, %s7_s3")
    schedule = aot.parse_schedule("loopy", "==\nMXU\n 2\n==\n" + "1\n" * 14, text)
    with pytest.raises(ValueError, match=r"loopy: the loop over bundles 5..9 has no static trip count"):
        schedule.bundles()
    assert rest and schedule.bundles(dynamic=(3,)) == 14 + 4 * 2


@needs_libtpu
def test_bundles_grow_with_the_trips_of_a_loop():
    def bundles(trips, steps):
        shape = jax.ShapeDtypeStruct((128 * steps, 128), jnp.float32)
        (found,) = aot.schedule(functools.partial(looped, trips=trips, steps=steps), shape, kernel="looped").values()
        (loop,) = [loop for loop in found.loops if not loop.is_grid]
        assert loop.trips == trips
        return found.bundles(), loop.stop - loop.start

    (few, body), (many, same) = bundles(2, 4), bundles(16, 4)
    assert body == same and many - few == 14 * body


def flash(q, k, v):
    return attention(q, k, v, masks.window(600), impl="flash_tpu")


def gradient(q, k, v):
    return jax.grad(lambda *x: flash(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)


def shapes(batch, heads, kv, width=128, tokens=1024):
    return [jax.ShapeDtypeStruct((batch, tokens, n, width), jnp.bfloat16) for n in (heads, kv, kv)]


@needs_libtpu
def test_forward_compiles_and_its_flops_are_those_of_the_visited_tiles():
    program = aot.compile_tpu(flash, *shapes(1, 2, 1), chip=CHIPS_OF_KERNELS["forward"])
    mask = masks.window(600)
    blocks = choose_blocks(mask, 1024, 1024, 2, 2, 2)
    visited = len(flat_plan(mask, 1024, 1024, blocks.q, blocks.k).row) * blocks.q * blocks.k
    np.testing.assert_allclose(program.cost_analysis()["flops"], 4 * 128 * 2 * visited, rtol=0.01)


@needs_libtpu
def test_gradient_compiles():
    program = aot.compile_tpu(gradient, *shapes(1, 2, 1), chip=CHIPS_OF_KERNELS["gradient"])
    assert "tpu_custom_call" in program.as_text()


@needs_libtpu
def test_gradient_compiles_over_a_mesh():
    program = aot.compile_tpu(
        gradient,
        *shapes(2, 4, 2),
        chip=CHIPS_OF_KERNELS["sharded"],
        mesh_shape={"fsdp": 2, "tensor": 2},
        specs=[P("fsdp", None, "tensor")] * 3,
    )
    assert "all-gather" not in program.as_text()  # every device has what it needs


@needs_libtpu
def test_sparse_gradient_compiles_and_its_flops_are_those_of_the_visited_blocks():
    """BigBird: 0.24 of dense work at 4096 tokens, and what the kernels say they cost is what they visit."""

    def sparse(q, k, v, blocks):
        table = BlockTable(blocks, 64, full_rows=(0, -1))
        return attention(q, k, v, table, impl="sparse_tpu").astype(jnp.float32).sum()

    tokens, heads = 4096, 2
    table = jax.ShapeDtypeStruct((heads, tokens // 64, 8), jnp.int32)
    arrays = shapes(1, heads, 1, width=64, tokens=tokens)
    program = aot.compile_tpu(jax.grad(sparse, argnums=(0, 1, 2)), *arrays, table, chip=CHIPS_OF_KERNELS["sparse"])
    dense = heads * tokens**2 * 64 * (2 * 2 + 2 * 5)  # two products forward, five backward
    share = visited(bigbird(tokens, random_blocks(tokens, heads=heads, seed=0)), tokens)
    assert share <= 0.24
    np.testing.assert_allclose(program.cost_analysis()["flops"] / dense, share, rtol=0.01)


@needs_libtpu
def test_decode_compiles_and_reads_the_cache_once():
    q, k = (jax.ShapeDtypeStruct((8, t, n, 128), jnp.bfloat16) for t, n in ((1, 32), (16384, 8)))
    position = jax.ShapeDtypeStruct((8, 1), jnp.int32)
    decode = lambda q, k, v, q_pos: attention(q, k, v, masks.CAUSAL, q_pos=q_pos, impl="decode_tpu")
    program = aot.compile_tpu(decode, q, k, k, position, chip=CHIPS_OF_KERNELS["decode"])
    cache = 2 * 2 * 8 * 16384 * 8 * 128
    assert cache < program.cost_analysis()["bytes accessed"] < 1.1 * cache
    assert program.memory_analysis().temp_size_in_bytes < cache / 20  # no copy of it


@needs_libtpu
def test_recurrence_gradient_compiles_and_moves_little_but_what_it_must():
    """RWKV-7's layers of a 1.5B model: forward and backward read and write each array once, and keep few states."""
    batch, tokens, heads, width = 8, 4096, 32, 64

    def run(r, k, v, a, b, log_w):
        apart = lambda x: x.reshape(*x.shape[:2], heads, width)
        out, _ = recurrence(*map(apart, (r, k, v, log_w)), a=apart(a), b=apart(b), impl="tpu")
        return out.reshape(r.shape)

    def both(d_out, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(d_out)

    half, full = (jax.ShapeDtypeStruct((batch, tokens, heads * width), x) for x in (jnp.bfloat16, jnp.float32))
    program = aot.compile_tpu(both, *[half] * 6, full, chip=CHIPS_OF_KERNELS["recurrence"])
    inputs, outputs = 5 * 2 + 4, 2  # bytes of a number of each token; log_w is in float32
    compulsory = half.size * (inputs + outputs + inputs + outputs + inputs)
    assert 1 < program.cost_analysis()["bytes accessed"] / compulsory < 1.3
    states = batch * heads * width**2 * 4 * tokens // 64
    assert program.memory_analysis().temp_size_in_bytes < 1.1 * states + half.size * 2


def test_stored_results_are_of_these_sources():
    """Run scripts/aot_all after a change of the kernels, and commit what it stores."""
    stored = json.loads((ROOT / "docs" / "measurements" / "aot_tpu.json").read_text())
    script = runpy.run_path(str(ROOT / "scripts" / "aot_all"), run_name="aot_all")
    wanted = {
        f"{chip} {width} {what} {where}": aot.source_hash(*script["SOURCES"][what])
        for chip in aot.CHIPS
        for width in script["WIDTHS"]
        for what, where in script["WAYS"]
    }
    assert {name: result["hash"] for name, result in stored.items()} == wanted
