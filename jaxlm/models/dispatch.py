"""Tokens to their experts and back, on one device or over a mesh.

Dropless: rows are sorted by expert and meet the experts' matrices in grouped products. Over a mesh every device sorts
its own rows; where experts are cut over the axis `expert`, a device gathers the rows of its peers on that axis, which
costs no more than exchanging k copies of each with room for the worst case, computes its experts' share, and the shares
are summed and scattered. With a capacity: each expert takes at most that many rows of a device, the first choices
first; these are exchanged (all-to-all), the rest is dropped and counted (Switch Transformer, arXiv 2101.03961).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from jaxlm.kernels.call import precision
from jaxlm.parallel.sharding import sizes, spec

AXIS = "expert"
Matrices = dict[str, Array]  # up, gate where there is one: [E, D, F]; down: [E, F, D]


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How rows reach the experts of this device.

    cut: this device has a part of the experts. exchange: and a part of the rows of its peers on that axis. partial: the
    axes over which a result is a sum of parts. rows: the axes that cut rows.
    """

    experts: int
    act: Callable[[Array], Array]
    capacity: float | None = None
    cut: bool = False
    exchange: bool = False
    partial: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def dispatch(
    x: Array, weights: Array, chosen: Array, matrices: Matrices, how: Dispatch, valid: Array | None
) -> tuple[Array, Array]:
    """x [B, T, D], weights [B, T, k] float32, chosen [B, T, k] int32, valid [B, T] -> the experts' weighted results
    [B, T, D] in x's dtype, and how many choices were dropped, float32.

    how.capacity: rows an expert takes, as a multiple of an even share of a device's rows; None drops nothing.
    """
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    matrices = {name: w.astype(x.dtype) for name, w in matrices.items()}
    if not sizes():
        return _rows(x, weights, chosen, matrices, valid, how)
    mesh = jax.sharding.get_abstract_mesh()
    whole = lambda axes, a: spec(axes, a.shape, mesh)[0]
    of_rows = whole(("batch", "length", None), x)
    of_matrices = {
        name: whole(("experts", "mlp", None) if name == "down" else ("experts", None, "mlp"), w)
        for name, w in matrices.items()
    }
    rows = tuple(jax.tree.leaves(tuple(of_rows)))
    cut, features = of_matrices["down"][0] == AXIS, of_matrices["down"][1]
    how = dataclasses.replace(
        how, cut=cut, exchange=cut and AXIS in rows, partial=() if features is None else (features,), rows=rows
    )  # fmt: skip
    manual = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    ins = (of_rows, of_rows, of_rows, of_matrices, P(*of_rows[:2]))
    function = functools.partial(_rows, how=how)
    return jax.shard_map(function, mesh=mesh, in_specs=ins, out_specs=(of_rows, P()), axis_names=manual)(
        x, weights, chosen, matrices, valid
    )


def _rows(x, weights, chosen, matrices, valid, how: Dispatch) -> tuple[Array, Array]:
    rows, weights, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen))  # [M, D], [M, k], [M, k]
    if how.capacity is None:
        y, dropped = _dropless(rows, weights, chosen, matrices, how), jnp.float32(0)
    else:
        y, dropped = _capped(rows, weights, chosen, matrices, valid.reshape(-1), how)
        dropped = jax.lax.psum(dropped, how.rows) if how.rows else dropped
    return y.astype(x.dtype).reshape(x.shape), dropped


def _dropless(rows: Array, weights: Array, chosen: Array, matrices: Matrices, how: Dispatch) -> Array:
    """[M, D] float32. Sums over devices are of float32, as those over a token's experts are."""
    if how.exchange:
        gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, axis=0, tiled=True)
        rows, weights, chosen = gather(rows), gather(weights), gather(chosen)
    y = _grouped(rows, weights, _here(chosen, matrices, how), matrices, how)
    if how.exchange:
        y = jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)
    elif how.cut:
        y = jax.lax.psum(y, AXIS)
    return jax.lax.psum(y, how.partial) if how.partial else y


def _here(chosen: Array, matrices: Matrices, how: Dispatch) -> Array:
    """The number of each chosen expert on this device; as many as there are here for those of other devices."""
    here = matrices["down"].shape[0]
    if not how.cut:
        return chosen
    local = chosen - jax.lax.axis_index(AXIS) * here
    return jnp.where((local >= 0) & (local < here), local, here)


def _grouped(rows: Array, weights: Array, chosen: Array, matrices: Matrices, how: Dispatch) -> Array:
    """Rows sorted by expert, one grouped product per matrix, then each token's results weighted and summed, float32."""
    (m, k), d = chosen.shape, rows.shape[1]
    here = matrices["down"].shape[0]
    order = jnp.argsort(chosen.reshape(-1), stable=True)  # [M k]
    counts = jnp.bincount(chosen.reshape(-1), length=here + 1)[:here].astype(jnp.int32)
    # What comes last belongs to no expert here: a grouped product may leave anything in those rows.
    ours = (jnp.arange(m * k) < counts.sum())[:, None]
    clear = lambda a: jnp.where(ours, a, 0) if how.cut else a
    product = functools.partial(
        jax.lax.ragged_dot, group_sizes=counts, precision=precision(rows.dtype), preferred_element_type=jnp.float32
    )
    x = clear(rows[order // k])
    h = clear(_hidden(lambda name: product(x, matrices[name]).astype(x.dtype), matrices, how))
    y = clear(product(h, matrices["down"]))
    y = y if how.partial else y.astype(rows.dtype)
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(m, k, d)
    return jnp.einsum("MKD,MK->MD", y.astype(jnp.float32), weights)


def _capped(
    rows: Array, weights: Array, chosen: Array, matrices: Matrices, valid: Array, how: Dispatch
) -> tuple[Array, Array]:
    """([M, D] float32, choices dropped). Padding takes no room."""
    (m, k), d, e = chosen.shape, rows.shape[1], how.experts
    assert how.capacity is not None
    room = min(m, math.ceil(how.capacity * m * k / e))
    # By choice, then by token: first choices get a place before any second one.
    wanted = jnp.where(valid[:, None], chosen, e).T.reshape(-1)  # [k M]
    order = jnp.argsort(wanted, stable=True)
    starts = jnp.searchsorted(wanted[order], jnp.arange(e + 1))
    place = jnp.zeros_like(wanted).at[order].set(jnp.arange(m * k, dtype=wanted.dtype)) - starts[wanted]
    kept = (place < room) & (wanted < e)
    slot = jnp.where(kept, wanted * room + place, e * room)  # the last is out of range, and so dropped
    x = jnp.zeros((e * room, d), rows.dtype).at[slot].set(jnp.tile(rows, (k, 1)), mode="drop").reshape(e, room, d)
    if how.exchange:
        x = jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=1, tiled=True)  # [E here, peers * room, D]
    elif how.cut:
        here = matrices["down"].shape[0]
        x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(AXIS) * here, here)
    product = functools.partial(jnp.einsum, precision=precision(x.dtype), preferred_element_type=jnp.float32)
    h = _hidden(lambda name: product("ECD,EDF->ECF", x, matrices[name]).astype(x.dtype), matrices, how)
    y = product("ECF,EFD->ECD", h, matrices["down"])
    y = (jax.lax.psum(y, how.partial) if how.partial else y).astype(rows.dtype)
    if how.exchange:
        y = jax.lax.all_to_all(y, AXIS, split_axis=1, concat_axis=0, tiled=True)
    elif how.cut:
        all_experts = jnp.zeros((e, *y.shape[1:]), y.dtype)
        y = jax.lax.dynamic_update_slice_in_dim(all_experts, y, jax.lax.axis_index(AXIS) * y.shape[0], 0)
        y = jax.lax.psum(y, AXIS)
    y = y.reshape(e * room, d).at[slot].get(mode="fill", fill_value=0).reshape(k, m, d)
    dropped = ((~kept) & (wanted < e)).sum().astype(jnp.float32)
    return jnp.einsum("KMD,MK->MD", y.astype(jnp.float32), weights), dropped


def _hidden(widen: Callable[[str], Array], matrices: Matrices, how: Dispatch) -> Any:
    return how.act(widen("gate")) * widen("up") if "gate" in matrices else how.act(widen("up"))
