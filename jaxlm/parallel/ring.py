"""Attention over sequences that are cut over the mesh axis `sequence`: around a ring, or by heads.

`ring` (arXiv 2310.01889): a device keeps its queries while blocks of keys and values travel around; the normalised
partial results are merged by their log-sum-exp. Its gradient is written out (custom_vjp around both trips): nothing but
the result and its log-sum-exp is kept, and blocks travel a second time together with their gradients. Blocks that no
query of any device sees are not visited at all; a block that a device's queries do not see costs it nothing.

`all_to_all` (DeepSpeed-Ulysses, arXiv 2309.14509): sequences are exchanged for heads, so that each device has all
tokens of some heads; plain differentiation.

Both are implementations of `attention`, which they call in turn for what is then on one device.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxlm.kernels import attention
from jaxlm.kernels.call import Call, repeat_heads
from jaxlm.kernels.masks import EVERYTHING, FULL, SKIP, Mask, Moved
from jaxlm.parallel.sharding import sizes, spec

AXIS = "sequence"
QUERY_LINES, KEY_LINES = ("q_pos", "q_segments"), ("k_pos", "k_segments", "k_valid")
FEATURES = frozenset({*QUERY_LINES, *KEY_LINES, "softcap", "sinks"})


def ring(q, k, v, mask, *, scale, return_lse=False, softcap=None, **arrays):
    """Attention as `attention` defines it; T and S are cut alike over the ring."""
    arrays = {"q": q, "k": k, "v": v, **arrays}
    if not mask.relative or {"q_pos", "k_pos"} & arrays.keys():
        whole = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        arrays = {"q_pos": whole, "k_pos": whole} | arrays
    both: Any = _ring(arrays, Static(mask, scale, softcap))
    return both if return_lse else both[0]


def refuses_ring(call: Call) -> str | None:
    """Why the ring cannot compute the call, or None."""
    if (reason := _refuses(call)) is not None:
        return reason
    t, s = call.q.shape[1], call.k.shape[1]
    return f"needs as many keys as queries, got {s} and {t}" if t != s else None


def all_to_all(q, k, v, mask, *, scale, return_lse=False, softcap=None, **arrays):
    """Attention as `attention` defines it, each device computing all tokens of its part of the heads."""
    k, v = repeat_heads(q, k, v, _tensor(q) * sizes()[AXIS])
    arrays = {"q": q, "k": k, "v": v, **arrays}
    specs = _specs(arrays)
    if "sinks" in arrays:
        specs["sinks"] = P((*(axis for axis in ("tensor",) if _tensor(q) > 1), AXIS))

    def local(x: dict[str, Array]):
        by_heads = functools.partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=2, concat_axis=1, tiled=True)
        lines = {name: jax.lax.all_gather(a, AXIS, axis=1, tiled=True) for name, a in x.items() if a.ndim == 2}
        given: Any = lines | ({"sinks": x["sinks"]} if "sinks" in x else {})
        q, k, v = (by_heads(x[name]) for name in ("q", "k", "v"))
        out, lse = attention.attention(q, k, v, mask, scale=scale, softcap=softcap, return_lse=True, **given)
        back = lambda a: jax.lax.all_to_all(a, AXIS, split_axis=1, concat_axis=2, tiled=True)
        return back(out), back(lse)

    out, lse = _shard(local, (specs,), (specs["q"], P(*specs["q"][:3])))(arrays)
    return (out, lse) if return_lse else out


def refuses_all_to_all(call: Call) -> str | None:
    """Why the exchange cannot compute the call, or None."""
    if (reason := _refuses(call)) is not None:
        return reason
    n, k, ways = call.q.shape[2], call.k.shape[2], _tensor(call.q) * sizes()[AXIS]
    return None if n % math.lcm(k, ways) == 0 else f"cannot cut {n} query heads and {k} key-value heads {ways} ways"


def _refuses(call: Call) -> str | None:
    n = sizes().get(AXIS, 1)
    if n == 1:
        return f"is for a mesh with an axis {AXIS!r}"
    if not isinstance(call.mask, Mask):
        return "takes a Mask, not a BlockTable"
    if unknown := call.given - FEATURES:
        return f"has no {', '.join(sorted(unknown))}"
    t, s = call.q.shape[1], call.k.shape[1]
    return f"cannot cut {t} queries and {s} keys {n} ways" if t % n or s % n else None


def _tensor(q) -> int:
    """How many ways the query heads are cut already."""
    ways = sizes().get("tensor", 1)
    return 1 if q.shape[2] % ways else ways


def _specs(arrays: dict[str, Array]) -> dict[str, P]:
    """Where the arrays lie; what does not divide is whole on every device, heads of queries and keys alike."""
    ways = sizes().get("tensor", 1)
    heads = "heads" if all(arrays[name].shape[2] % ways == 0 for name in ("q", "k")) else None
    axes = {1: (heads,), 2: ("batch", "length"), 4: ("batch", "length", heads, None)}
    mesh = jax.sharding.get_abstract_mesh()
    return {name: spec(axes[x.ndim], x.shape, mesh)[0] for name, x in arrays.items()}


def _shard(function: Callable, in_specs, out_specs) -> Callable:
    """The function on every device of the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    free = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=free, check_vma=False
    )  # fmt: skip


# The ring


@dataclasses.dataclass(frozen=True)
class Static:
    mask: Mask
    scale: float
    softcap: float | None


@dataclasses.dataclass(frozen=True)
class Run:
    """Steps `first` to `first + count - 1` of the trip. At step s a device i has the block of device i - s, modulo n.

    near is the mask, over indices within query and key blocks, for devices with i >= s, and far for the others, to
    whom the block of a later device has come around; None where nothing is seen.
    """

    first: int
    count: int
    near: Mask | None
    far: Mask | None


@functools.lru_cache(maxsize=256)
def trip(mask: Mask, block: int, n: int) -> tuple[Run, ...]:
    """The steps of a relative mask that have something to see, alike ones together."""
    steps = [(s, _seen(mask, s * block, block), _seen(mask, (s - n) * block, block)) for s in range(1, n)]
    steps = [step for step in steps if step[1:] != (None, None)]
    own = _seen(mask, 0, block)
    runs = [Run(0, 1, own, own)]  # apart, for only there are sinks counted
    alike = lambda i: (steps[i][0] - i, *steps[i][1:])
    for (_, near, far), same in itertools.groupby(range(len(steps)), alike):
        of_run = list(same)
        runs.append(Run(steps[of_run[0]][0], len(of_run), near, far))
    return tuple(runs)


def everywhere(mask: Mask, n: int) -> tuple[Run, ...]:
    """All steps, for a mask that is evaluated at positions."""
    return Run(0, 1, mask, mask), Run(1, n - 1, mask, mask)


def _seen(mask: Mask, by: int, block: int) -> Mask | None:
    """The mask between a block of queries and one of keys that begins `by` before it."""
    kind = int(mask.tile(by, by + block, 0, block))
    return None if kind == SKIP else EVERYTHING if kind == FULL else Moved(mask, by) if by else mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ring(arrays: dict[str, Array], static: Static) -> tuple[Array, Array]:
    specs = _specs(arrays)
    results = specs["q"], P(*specs["q"][:3])
    return _shard(functools.partial(_forward, static=static, n=sizes()[AXIS]), (specs,), results)(arrays)


def _ring_forward(arrays, static):
    both: Any = _ring(arrays, static)
    return both, (arrays, *both)


def _ring_backward(static, saved, cotangents):
    arrays, out, lse = saved
    specs = _specs(arrays)
    smooth = [name for name in ("q", "k", "v", "sinks") if name in arrays]
    results = {name: specs[name] for name in smooth}
    # Sinks are the same for all tokens: their gradient is summed over the axes that cut tokens, once, here.
    over = tuple(jax.tree.leaves(tuple(specs["q"][:2])))
    local = functools.partial(_backward, static=static, n=sizes()[AXIS], over=over)
    operands = specs["q"], P(*specs["q"][:3]), specs["q"], P(*specs["q"][:3])
    grads = _shard(local, (specs, *operands), results)(arrays, out, lse, *cotangents)
    rest = {name: np.zeros(x.shape, jax.dtypes.float0) for name, x in arrays.items() if name not in smooth}
    return (grads | rest,)


_ring.defvjp(_ring_forward, _ring_backward)


def _forward(arrays, *, static: Static, n: int):
    """(out BTNH, lse BTN) of this device's queries."""
    mine, block, i = *_apart(arrays), jax.lax.axis_index(AXIS)
    (b, t, heads, _), width = mine["q"].shape, block["v"].shape[-1]

    def nothing(block):
        return jnp.zeros((b, t, heads, width), mine["q"].dtype), jnp.full((b, t, heads), -jnp.inf, jnp.float32)

    def part(block, mask, first):
        q, k, v, given = _arguments(mine, block, static, first)
        return attention.attention(q, k, v, mask, return_lse=True, **given)

    def visit(state, _, block, s, run: Run):
        look = lambda mask: nothing if mask is None else lambda block: part(block, mask, run.first == 0)
        out, lse = _either(i >= s, run, look, block)
        return _merge(state[0], state[1], out, lse), {}

    start = jnp.zeros((b, t, heads, width)), jnp.full((b, t, heads), -jnp.inf, jnp.float32)
    (out, lse), _ = _travel(_trip(arrays, static, n), n, visit, start, block, {})
    return out.astype(mine["q"].dtype), lse


def _backward(arrays, out, lse, d_out, d_lse, *, static: Static, n: int, over: tuple[str, ...]):
    """The gradients of this device's queries, keys and values, and of the sinks."""
    mine, block, i = *_apart(arrays), jax.lax.axis_index(AXIS)

    def gradients(block, mask, first):
        q, k, v, given = _arguments(mine, block, static, first)
        found = attention.gradients(q, k, v, mask, out, lse, d_out, d_lse, **given)
        return {name: g.astype(jnp.float32) for name, g in found.items()}

    def visit(state, late, block, s, run: Run):
        first = run.first == 0
        zeros = lambda block: jax.tree.map(lambda x: jnp.zeros(x.shape), {"q": mine["q"], **_pair(block)})
        look = lambda mask: zeros if mask is None else lambda block: gradients(block, mask, first)
        found = _either(i >= s, run, look, block)
        state = {name: state[name] + found[name] if name in found else state[name] for name in state}
        return state, {name: late[name] + found[name] for name in ("k", "v")}

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    start = {name: zeros(mine[name]) for name in ("q", "sinks") if name in mine}
    state, late = _travel(_trip(arrays, static, n), n, visit, start, block, jax.tree.map(zeros, _pair(block)))
    if "sinks" in state:
        state["sinks"] = jax.lax.psum(state["sinks"], over)
    return {name: g.astype(arrays[name].dtype) for name, g in (state | late).items()}


def _apart(arrays: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What stays with its device, and what travels."""
    travels = ("k", "v", *KEY_LINES)
    return {a: x for a, x in arrays.items() if a not in travels}, {a: x for a, x in arrays.items() if a in travels}


def _pair(block: dict[str, Array]) -> dict[str, Array]:
    return {"k": block["k"], "v": block["v"]}


def _trip(arrays: dict[str, Array], static: Static, n: int) -> tuple[Run, ...]:
    if "q_pos" in arrays:
        return everywhere(static.mask, n)
    return trip(static.mask, arrays["q"].shape[1], n)


def _arguments(mine, block, static: Static, first: bool):
    """q, k, v, and what else attention is given of this device's queries and one block."""
    given = {name: x for name, x in (mine | block).items() if name in FEATURES and (first or name != "sinks")}
    return mine["q"], block["k"], block["v"], given | {"scale": static.scale, "softcap": static.softcap}


def _either(near, run: Run, look: Callable[[Mask | None], Callable], block):
    if run.near == run.far:
        return look(run.near)(block)
    return jax.lax.cond(near, look(run.near), look(run.far), block)


def _merge(out: Array, lse: Array, part: Array, part_lse: Array) -> tuple[Array, Array]:
    both = jnp.logaddexp(lse, part_lse)
    top = jnp.where(both == -jnp.inf, 0, both)
    return out * jnp.exp(lse - top)[..., None] + part * jnp.exp(part_lse - top)[..., None], both


def _travel(runs: tuple[Run, ...], n: int, visit: Callable, state, block, late):
    """visit(state, late, block, step, run) -> (state, late) at every step; late comes home at the end.

    A block is sent on before it is looked at, and `late`, what is added up for it, follows when the next device has
    looked: so neither is waited for.
    """
    at = 0
    for run, after in itertools.zip_longest(runs, runs[1:]):
        last = run.first + run.count - 1

        def step(carry, s, ahead=1, behind=1, run=run):
            state, late, block = carry
            following = _send(block, ahead, n)
            return (*visit(state, _send(late, behind, n), block, s, run), following), None

        carry, behind = (state, late, block), run.first - at
        if run.count > 1:
            carry = state, _send(late, behind - 1, n), block
            carry, _ = jax.lax.scan(step, carry, jnp.arange(run.first, last))
            behind = 1
        (state, late, block), _ = step(carry, last, 0 if after is None else after.first - last, behind)
        at = last
    return state, _send(late, -at, n)


def _send(tree, by: int, n: int):
    """The tree of the device `by` before this one."""
    if by % n == 0:
        return tree
    return jax.lax.ppermute(tree, AXIS, [(i, (i + by) % n) for i in range(n)])
