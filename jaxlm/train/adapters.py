"""Adapters as parameters: made, counted, merged into the weights they stand beside, and taken out again.

The tree is described in models/adapters.py. A and B start as the peft package starts them, so that a fresh adapter
changes nothing; with `is_trainable` a train step tells what learns from the settings that lie beside it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoints import peft
from jaxlm.checkpoints.adapter_config import AdapterConfig, Lora, Prefix, Prompt
from jaxlm.checkpoints.adapter_modules import Module, Modules, modules
from jaxlm.checkpoints.load import flatten, unflatten
from jaxlm.models import adapters as adapting
from jaxlm.models.registry import Family

__all__ = [
    "AdapterConfig", "Counts", "Lora", "Prefix", "Prompt", "column_norms", "count", "init", "is_trainable", "merge",
    "modules_of", "unmerge",
]  # fmt: skip
Tree = dict[str, Any]


def modules_of(family: Family, config: Any, params: Tree | None = None) -> Modules:
    """The linear layers of a model under transformers' names; params may be shapes, and are made as such if missing."""
    if params is None:
        params = jax.eval_shape(lambda: family.backbone.init(config, jax.random.key(0)))
    shapes = {path: leaf.shape for path, leaf in flatten(params or {}).items()}
    return modules(family.rules(config), shapes, [layer.group for layer in family.backbone.layers(config)])


def init(adapter: AdapterConfig, family: Family, config: Any, params: Tree, key: jax.Array) -> Tree:
    """Fresh float32 adapters for a model: its parameters, stacked; their shapes will do, except for dora and Prompt.

    `a` is uniform within 1 / sqrt(inputs) (kaiming_uniform with a = sqrt(5)), `b` zero, DoRA's m the norm of each
    column. Prefix and Prompt are normal(1), as in peft, unless their `init` says otherwise.
    """
    table = modules_of(family, config, params)
    if isinstance(adapter, Lora):
        return _init_lora(adapter, table, flatten(params), key)
    if isinstance(adapter, Prompt):
        return {"prompt": {"w": _init_prompt(adapter, family, config, params, key)}}
    flat: dict[str, jax.Array] = {}
    for group in dict.fromkeys(table.layers):
        at = f"layers/{group}/attn" if group else "layers/attn"
        if f"{at}/k/w" not in table.shapes:
            raise ValueError(f"prefix tuning needs attention in every layer, and there is no {at}/k/w")
        shape = (table.layers.count(group), adapter.tokens, *table.shapes[f"{at}/k/w"][-2:])
        for name in "kv":
            key, use = jax.random.split(key)
            flat[f"{at}/prefix/{name}"] = jax.random.normal(use, shape) * (adapter.init == "normal")
    return unflatten(flat)


def is_trainable(path: str) -> bool:
    """Whether the leaf at a path of an adapters tree learns; the others are settings: scale, dropout. They must stay
    frozen: weight decay would move them even though their gradient is zero."""
    return path.rsplit("/", 1)[-1] not in adapting.FIXED


def merge(params: Tree, adapters: Tree) -> Tree:
    """The parameters, stacked, with the low-rank pairs added in float32 and cast back; DoRA's columns rescaled."""
    return _mapped(params, adapters, _merged)


def unmerge(merged: Tree, adapters: Tree, norms: Mapping[str, jax.Array] | None = None) -> Tree:
    """`merge` undone, up to rounding. DoRA replaces the norms of columns, so it needs `column_norms` of before."""
    return _mapped(merged, adapters, _unmerged, norms)


def column_norms(params: Tree, adapters: Tree) -> dict[str, jax.Array]:
    """{path of the weight: norms of the columns of w + scale * a b, float32 [L, out...]} where there is DoRA."""
    leaves, found = flatten(params), {}
    for path, node in _weights(adapters).items():
        if "m" in node:
            found[path] = _over_layers(_norm, leaves[path], node, None)
    return found


@dataclasses.dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / self.total


def count(
    adapter: AdapterConfig,
    family: Family,
    config: Any,
    *,
    head: int | None = None,
    peft_convention: bool = False,
) -> Counts:
    """What an adapter trains, and all parameters there are, from shapes alone.

    head: the parameters of a task's head, trained whole, in the place of the output head. peft keeps such a head twice,
    the original and the copy in modules_to_save; peft_convention=True counts both, in both numbers, as the numbers
    that it printed and others published do.
    """
    table = modules_of(family, config)
    leaves = {path: shape for path, shape in table.shapes.items() if head is None or not path.startswith("head/")}
    base = sum(int(np.prod(shape, dtype=np.int64)) for shape in leaves.values())
    if isinstance(adapter, Lora):
        own = sum(
            adapter.rank_of(m.name) * (m.n_in + m.n_out) + (m.n_out if adapter.dora else 0)
            for m in table.select(adapter)
        )
    else:
        own = int(np.prod(peft.virtual_shape(adapter, table)))
    own += (head or 0) * (2 if peft_convention else 1)
    return Counts(own, base + own)


def _init_lora(adapter: Lora, table: Modules, leaves: Mapping[str, Any], key: jax.Array) -> Tree:
    nodes: dict[str, list[Module]] = {}
    for module in table.select(adapter):
        nodes.setdefault(module.node, []).append(module)
    flat: dict[str, Any] = {}
    for node, use in zip(nodes, jax.random.split(key, len(nodes)), strict=True):
        first = nodes[node][0]
        ranks = np.zeros(first.depth, int)
        for module in nodes[node]:
            ranks[module.index] = adapter.rank_of(module.name)
            peft.settings(adapter, module, flat)
        # Where ranks differ, and in layers without the adapter, what is beyond a rank is zero and stays so: each of a
        # and b has no gradient where the other is zero.
        inside = np.arange(ranks.max()) < ranks.reshape(-1, *(1,) * (len(first.ins) + 1))
        bound = first.n_in**-0.5
        a = jax.random.uniform(use, (first.depth, *first.ins, ranks.max()), minval=-bound, maxval=bound)
        flat[f"{node}/a"] = jnp.where(inside, a, 0)
        for part, out in zip(first.parts or ("",), first.outs, strict=True):
            suffix = f"/{part}" if part else ""
            flat[f"{node}/b{suffix}"] = jnp.zeros((first.depth, ranks.max(), *out))
            if adapter.dora:
                w = leaves[f"{node.rsplit('/', 1)[0]}/{part}/w" if part else f"{node}/w"]
                axes = tuple(range(1, 1 + len(first.ins)))
                flat[f"{node}/m{suffix}"] = jnp.sqrt(jnp.square(w.astype(jnp.float32)).sum(axes))
    return jax.tree.map(jnp.asarray, unflatten(flat))


def _init_prompt(adapter: Prompt, family: Family, config: Any, params: Tree, key: jax.Array) -> jax.Array:
    if adapter.init == "normal":
        return jax.random.normal(key, (adapter.tokens, config.d_model))
    table = params["embed"]["w"]
    rows = table[jax.random.randint(key, (adapter.tokens,), 0, len(table))].astype(jnp.float32)
    return rows * config.embed_scale


def _weights(adapters: Tree) -> dict[str, Tree]:
    """{path of a weight: its pair}."""
    spread = (adapting.members(path, node) for path, node in adapting.pairs(adapters.get("layers", {}), ("layers",)))
    return {"/".join((*path, "w")): node for places in spread for path, node in places.items()}


def _mapped(params: Tree, adapters: Tree, one: Callable, norms: Mapping[str, jax.Array] | None = None) -> Tree:
    if adapting.virtual(adapters):
        raise ValueError("a prefix or prompt is no part of the weights: only low-rank pairs can be merged")
    leaves = flatten(params)
    for path, node in _weights(adapters).items():
        if path not in leaves:
            raise ValueError(f"adapters for {path}, and the parameters have no such weight")
        leaves[path] = _over_layers(one, leaves[path], node, norms.get(path) if norms else None)
    return unflatten(leaves)


def _merged(w: jax.Array, node: Tree, _: Any) -> jax.Array:
    new = w.astype(jnp.float32) + adapting.delta(node)
    if "m" in node:
        new = new * adapting.magnitude(adapting.column_norm(w, node), node)
    return new.astype(w.dtype)


def _unmerged(w: jax.Array, node: Tree, norm: jax.Array | None) -> jax.Array:
    old = w.astype(jnp.float32)
    if "m" in node:
        if norm is None:
            raise ValueError("DoRA is unmerged with norms=column_norms(params, adapters), from before merging")
        old = old / adapting.magnitude(norm, node)
    return (old - adapting.delta(node)).astype(w.dtype)


def _norm(w: jax.Array, node: Tree, _: Any) -> jax.Array:
    return adapting.column_norm(w, node)


def _over_layers(one: Callable, stack: jax.Array, node: Tree, norm: jax.Array | None) -> jax.Array:
    """One layer at a time, so that float32 copies are of one."""
    return _map(one, stack, {name: leaf for name, leaf in node.items() if name != "dropout"}, norm)


@functools.partial(jax.jit, static_argnums=0)
def _map(one: Callable, stack: jax.Array, node: Tree, norm: jax.Array | None) -> jax.Array:
    return jax.lax.map(lambda layer: one(*layer), (stack, node, norm))
