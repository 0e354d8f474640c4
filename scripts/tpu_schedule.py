"""Bundles of the TPU kernels per 2048 x 2048 of attention, or 2048 tokens of a recurrence, from the compiler's static
schedule; no TPU is needed.

    python scripts/tpu_schedule.py             compares with the stored numbers; more than 3 % slower is exit code 1
    python scripts/tpu_schedule.py --update    stores what it finds, and measures jax's splash attention beside it

A bundle is one cycle (about 1.75 GHz) if nothing waits for memory. The work is that of one head, of attention all of it
visited: the steps of the grid times the bundles of one, loops times their trips, and what runs once for each row of
tiles; filling the pipeline is left out, as are branches that do not run.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests import aot  # noqa: E402 (after the path)

STORED = ROOT / "docs" / "measurements" / "tpu_schedule.json"
POINTS = [
    (what, chip, width) for chip in ("v6e", "v5p") for width in (64, 128, 256) for what in ("forward", "backward")
]
POINTS += [(f"recurrence {what}", chip, 64) for chip in ("v6e", "v5p") for what in ("forward", "backward")]
SIDE = 2048
ALLOWED = 1.03
TOKENS = 32768  # with 8 heads, so much that XLA leaves the operands in HBM


def forward(q, k, v):
    from jaxlm.kernels.flash_tpu import flash_tpu
    from jaxlm.kernels.masks import EVERYTHING

    return flash_tpu(q, k, v, EVERYTHING, scale=0.1, return_lse=True)


def backward(q, k, v):
    import jax.numpy as jnp

    from jaxlm.kernels.flash_tpu_bwd import backward as kernel
    from jaxlm.kernels.masks import EVERYTHING

    lse = jnp.zeros(q.shape[:3], jnp.float32)
    return kernel(q, k, v, q, lse, q, lse, EVERYTHING, scale=0.1)


def splash(q, k, v, gradient=False, compute=512, fused=False):
    """jax's kernel with its best blocks of those tried: 2048 queries and keys, `compute` keys at once.

    Fused, its backward pass is one kernel, which writes a dq for every 2048 keys, to be added up.
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q, k, v = (x[0].swapaxes(0, 1) for x in (q, k, v))
    mask = masks.MultiHeadMask([masks.FullMask((q.shape[1], k.shape[1]))] * q.shape[0])
    sizes: dict = {"block_q": SIDE, "block_kv": SIDE, "block_kv_compute": compute}
    sizes |= {"block_q_dkv": SIDE, "block_kv_dkv": SIDE, "block_kv_dkv_compute": 512}
    sizes |= {"use_fused_bwd_kernel": True} if fused else {"block_q_dq": SIDE, "block_kv_dq": SIDE}
    blocks = kernel.BlockSizes(**sizes)
    attend = kernel.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)
    return (
        jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v) if gradient else attend(q, k, v)
    )


def shapes(width: int, heads: int = 8):
    import jax
    import jax.numpy as jnp

    return [jax.ShapeDtypeStruct((1, TOKENS, heads, width), jnp.bfloat16)] * 3


def measure_forward(chip: str, width: int) -> dict:
    from jaxlm.kernels.flash_tpu_fwd import choose_blocks
    from jaxlm.kernels.masks import EVERYTHING

    (schedule,) = aot.schedule(forward, *shapes(width), chip=chip, kernel="flash_forward").values()
    blocks = choose_blocks(EVERYTHING, TOKENS, TOKENS, 8, 1, 2)
    (grid,) = [loop for loop in schedule.loops if loop.is_grid]
    conditions = [c for c in schedule.conditions() if grid.start <= c[0] and c[1] <= grid.stop]
    if len(conditions) != 2:
        raise RuntimeError(f"expected to clear and to finish under a condition, found {conditions}")
    rest = (0, grid.start), (grid.stop, len(schedule.used))
    how = {"skip": (*conditions, *rest)}
    columns = blocks.q * blocks.heads
    finish = conditions[1][1] - conditions[1][0]
    bundles = schedule.bundles(**how) * SIDE**2 / (columns * blocks.k) + finish * SIDE / columns
    return {"bundles": round(bundles), "blocks": [blocks.q, blocks.k, blocks.heads], **shares(schedule, how)}


def measure_backward(chip: str, width: int) -> dict:
    from jaxlm.kernels.flash_tpu_bwd import choose_blocks
    from jaxlm.kernels.masks import EVERYTHING

    (schedule,) = aot.schedule(backward, *shapes(width), chip=chip, kernel="flash_backward").values()
    blocks = choose_blocks(EVERYTHING, TOKENS, TOKENS, 2 * max(width, 128), 2, False)
    # What clears and what writes dk and dv runs once for a chunk of keys and the queries of all heads of its group.
    starts = {loop.start for loop in schedule.loops}
    once = tuple(c for c in schedule.conditions() if c[0] not in starts)
    if len(once) != 2:
        raise RuntimeError(f"expected to clear and to write under a condition, found {once}")
    # The loops are over the tiles that need no predicate, and over those that do.
    how = {"dynamic": (blocks.chunk // blocks.k, 0), "skip": once}
    bundles = schedule.bundles(**how) * SIDE**2 / (blocks.q * blocks.chunk)
    bundles += sum(stop - start for start, stop in once) * SIDE**2 / (TOKENS * blocks.chunk)
    return {"bundles": round(bundles), "blocks": [blocks.q, blocks.k, blocks.chunk], **shares(schedule, how)}


def recurrence(r, k, v, a, b, log_w):
    """RWKV-7's form, with its gradient."""
    import jax
    import jax.numpy as jnp

    from jaxlm.kernels.recurrence import recurrence as recur

    run = lambda r, k, v, a, b, log_w: recur(r, k, v, log_w, a=a, b=b, impl="tpu")[0].astype(jnp.float32).sum()
    return jax.grad(run, argnums=tuple(range(6)))(r, k, v, a, b, log_w)


def measure_recurrence(chip: str, width: int, kernel: str) -> dict:
    """Of the steps between the first chunk, which reads a state, and the last, which writes one."""
    import jax
    import jax.numpy as jnp

    from jaxlm.kernels.recurrence_tpu import CHUNK, GROUPS, tile_heads

    arrays = [jax.ShapeDtypeStruct(s.shape, x) for s in shapes(width)[:1] for x in [jnp.bfloat16] * 5 + [jnp.float32]]
    (schedule,) = aot.schedule(recurrence, *arrays, chip=chip, kernel=f"{kernel}_recurrence").values()
    (grid,) = [loop for loop in schedule.loops if loop.is_grid]
    size = grid.stop - grid.start
    rare = [c for c in schedule.conditions(1) if grid.start <= c[0] and c[1] <= grid.stop and c[1] - c[0] < size / 4]
    how = {"skip": (*rare, (0, grid.start), (grid.stop, len(schedule.used)))}
    heads = GROUPS * tile_heads(width, width)
    bundles = schedule.bundles(**how) * SIDE / (CHUNK * heads)
    return {"bundles": round(bundles), "blocks": [CHUNK, heads], **shares(schedule, how)}


def measure_splash(what: str, chip: str, width: int, fused: bool = False) -> int | None:
    """Bundles of jax's splash attention; None where it does not compile with these blocks."""
    compute = 512 if chip == "v6e" else 256  # more does not fit v5p's default share of VMEM
    call = functools.partial(splash, gradient=what == "backward", compute=compute, fused=fused)
    try:
        found = aot.schedule(call, *shapes(width), chip=chip)
    except RuntimeError as e:
        print(f"splash {what} {chip} {width}: {str(e).strip().splitlines()[-1]}")
        return None
    kept = {name: s for name, s in found.items() if ("fwd" in name) == (what == "forward") and "splash" in name}
    return sum(s.bundles() for s in kept.values())


MEASURES = {
    "forward": measure_forward,
    "backward": measure_backward,
    "recurrence forward": functools.partial(measure_recurrence, kernel="forward"),
    "recurrence backward": functools.partial(measure_recurrence, kernel="backward"),
}


def shares(schedule: aot.Schedule, how: dict) -> dict:
    return {unit: round(schedule.share(unit, **how), 3) for unit in ("MXU", "EUP", "VLOAD:FILL", "VSTORE:SPILL")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="store the numbers, and measure splash attention too")
    parser.add_argument("--only", default="", help="points whose name contains this, such as 'forward v6e'")
    chosen = parser.parse_args()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    slower = []
    for what, chip, width in POINTS:
        name = f"{what} {chip} {width}"
        if chosen.only not in name:
            continue
        found = MEASURES[what](chip, width)
        before = stored.get(name, {})
        for key in {"forward": ("splash",), "backward": ("splash", "splash_fused")}.get(what, ()):
            fused = key == "splash_fused"
            found[key] = measure_splash(what, chip, width, fused) if chosen.update else before.get(key)
        print(name, found, f"stored {before.get('bundles')}", flush=True)
        if chosen.update:
            stored[name] = found
            STORED.parent.mkdir(parents=True, exist_ok=True)
            STORED.write_text(json.dumps(dict(sorted(stored.items())), indent=1) + "\n")
        elif not before or found["bundles"] > ALLOWED * before["bundles"]:
            slower.append(f"{name}: {found['bundles']} bundles, stored {before.get('bundles')}")
    sys.exit("slower than stored: " + "; ".join(slower) if slower else 0)


if __name__ == "__main__":
    from scripts.tpu_schedule import main  # not __main__'s, whose functions no other process can unpickle

    main()
