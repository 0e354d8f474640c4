"""Adapters in the forward pass: low-rank pairs that `Einsum` adds, and virtual tokens that every query sees.

An adapters tree is nested as the parameters are. Where those have a weight, at layers/attn/q for example, it may have
{"a": [L, in..., r], "b": [L, r, out...], "scale": [L]}, with "m": [L, out...] for DoRA and "dropout": [L], a rate. A
layer with scale 0 is left alone. Where a checkpoint stores several of our weights as one (phi3's qkv_proj), a node
beside them, attn/q_k_v, has one `a`, and dicts of `b` and `m`. layers/attn/prefix is {"k", "v"}: [L, P, K, H], and
prompt is {"w": [P, D]}, in the space of `embed`'s result: P virtual tokens at positions 0..P-1, the real ones follow.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.kernels.call import precision

Tree = Mapping[str, Any]
Dict = dict[str, Any]
Path = tuple[str, ...]
FIXED = ("scale", "dropout")  # leaves that are settings, and never learn
FLOAT = jnp.float32


def beside(stacks: Mapping[str, Any], adapters: Mapping[str, Tree]) -> dict[str, Any]:
    """{group: {"params": stack, "adapters": stack}}, to be indexed together; ValueError for what has no weight."""
    if unknown := sorted(set(adapters) - set(stacks)):
        raise ValueError(f"adapters for layers/{unknown[0]}, expected some of {', '.join(sorted(stacks))}")

    def both(name: str, stack: Any) -> Any:
        own = adapters.get(name, {})
        unrolled = isinstance(stack, tuple)
        _check(own, stack[0] if unrolled else stack)
        if not unrolled:
            return {"params": stack, "adapters": own}
        layer = lambda i: jax.tree.map(lambda leaf: leaf[i], own)
        return tuple({"params": p, "adapters": layer(i)} for i, p in enumerate(stack))

    return {name: both(name, stack) for name, stack in stacks.items()}


def pairs(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Tree]]:
    """(path, node) of every low-rank pair in a tree, fused ones as they are stored."""
    for name, node in tree.items():
        if "a" in node:
            yield (*path, name), node
        elif name != "prefix":
            yield from pairs(node, (*path, name))


def members(path: Path, node: Tree) -> dict[Path, Dict]:
    """The weights that a pair belongs to, each with a pair of its own; those of a fused one share `a`."""
    if not isinstance(node["b"], Mapping):
        return {path: dict(node)}
    pick = lambda name: {key: leaf[name] if isinstance(leaf, Mapping) else leaf for key, leaf in node.items()}
    return {(*path[:-1], name): pick(name) for name in node["b"]}


def of_layer(adapters: Tree, rng: Array | None, depth: Any) -> Dict:
    """The `adapters` collection of one layer: fused pairs spread out, and with an rng a key wherever there is dropout.

    The members of a fused pair get one key, so that they drop the same inputs, as the one module that they are does.
    """
    if rng is not None:
        rng = jax.random.fold_in(jax.random.fold_in(rng, 0x10A), depth)
    out: Dict = {}
    for i, (path, node) in enumerate(pairs(adapters)):
        key = {} if rng is None or "dropout" not in node else {"key": jax.random.fold_in(rng, i)}
        for place, own in members(path, {**node, **key}).items():
            _put(out, place, own)
    if "prefix" in adapters.get("attn", {}):
        _put(out, ("attn", "prefix"), adapters["attn"]["prefix"])
    return out


def adapted(x: Array, w: Array, y: Array, node: Tree) -> Array:
    """y = x w with the low-rank pair added, in y's dtype; DoRA's direction and magnitude where the pair has an `m`.

    LoRA: arXiv 2106.09685; DoRA: arXiv 2402.09353, whose norm is a constant to the gradient (section 4.3).
    """
    a, b = node["a"], node["b"]
    if "key" in node:
        keep = 1 - jax.lax.stop_gradient(node["dropout"]).astype(FLOAT)
        x = jnp.where(jax.random.bernoulli(node["key"], keep, x.shape), x / keep.astype(x.dtype), 0)
    flat = x.reshape(*x.shape[: x.ndim - a.ndim + 1], -1)
    h = _dot(flat, a.reshape(-1, a.shape[-1]).astype(x.dtype)).astype(x.dtype)
    added = _scale(node) * _dot(h, b.reshape(len(b), -1).astype(x.dtype)).reshape(y.shape)
    if "m" not in node:
        return y + added.astype(y.dtype)
    return ((y.astype(FLOAT) + added) * magnitude(column_norm(w, node), node)).astype(y.dtype)


def delta(node: Tree) -> Array:
    """scale * a b, float32 [in..., out...]."""
    a, b = node["a"].astype(FLOAT), node["b"].astype(FLOAT)
    product = _dot(a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1))
    return _scale(node) * product.reshape(*a.shape[:-1], *b.shape[1:])


def column_norm(w: Array, node: Tree) -> Array:
    """The norm of each column of w + scale * a b, float32 [out...]; a constant to the gradient."""
    w = jax.lax.stop_gradient(w.astype(FLOAT) + delta(node))
    return jnp.sqrt(jnp.square(w).sum(tuple(range(node["a"].ndim - 1))))


def magnitude(norm: Array, node: Tree) -> Array:
    """DoRA's factor of each output, float32 [out...]."""
    return jnp.where(_scale(node) == 0, 1, node["m"].astype(FLOAT) / norm)


def virtual(adapters: Tree | None) -> int:
    """How many virtual tokens stand before the real ones."""
    if adapters is None:
        return 0
    prefixes = [keys.shape[1] for keys, _ in prefix_of(adapters).values()]
    counts = {*prefixes, *([len(adapters["prompt"]["w"])] if "prompt" in adapters else [])}
    if len(counts) > 1 or ("prompt" in adapters and prefixes):
        raise ValueError("adapters have one prompt, or a prefix of one length in every layer, not several of those")
    return counts.pop() if counts else 0


def grouped(layers: Tree) -> Tree:
    """{group: stack} of what lies under `layers`, where a single group has no name."""
    return {"": layers} if isinstance(layers, tuple) or {"attn", "mlp"} & set(layers) else layers


def prefix_of(adapters: Tree) -> dict[str, tuple[Array, Array]]:
    """{group: (k, v)}, each [L, P, K, H]."""
    found = {name: stack.get("attn", {}).get("prefix") for name, stack in grouped(adapters.get("layers", {})).items()}
    return {name: (p["k"], p["v"]) for name, p in found.items() if p is not None}


def make_room(n: int, prompt: Array | None, x: Array, positions, segments, valid) -> tuple[Array, Array, Any]:
    """x, positions and segments with n virtual tokens before the first: in x itself where there is a prompt [B, n, D].

    `valid` has gone into the positions, which padding has at -1.
    """
    at = jnp.arange(x.shape[1])[None] if positions is None else positions
    at = jnp.where(at >= 0 if valid is None else valid, at + n, -1)
    at = jnp.broadcast_to(at, x.shape[:2])
    if prompt is None:
        return x, at, segments
    virtual = jnp.broadcast_to(jnp.arange(n, dtype=at.dtype), (len(at), n))
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (n, 0)))
    return jnp.concatenate([prompt, x], 1), jnp.concatenate([virtual, at], 1), segments


def _check(adapters: Tree, params: Tree) -> None:
    """ValueError for a pair where there is no weight: `Einsum` would never look at it."""
    have = {"/".join(path): leaf for path, leaf in _weights(params)}
    for path, node in pairs(adapters):
        for place, own in (("/".join(at), own) for at, own in members(path, node).items()):
            if place in have:
                shape = (*own["a"].shape[1:-1], *own["b"].shape[2:])
                if shape != have[place].shape[-len(shape) :]:
                    raise ValueError(f"adapters for layers/{place} fit a weight {shape}, it is {have[place].shape}")
            else:
                near = difflib.get_close_matches(place, have, 1)
                hint = f", did you mean {near[0]}" if near else ""
                joined = place.startswith(("attn/", "mlp/")) and {"attn/qkv", "mlp/gate_up"} & set(have)
                why = "; merge adapters before parameters are joined for decoding" if joined else hint
                raise ValueError(f"adapters for layers/{place}, where these parameters have no weight{why}")


def _weights(tree: Tree, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for name, node in tree.items():
        if isinstance(node, Mapping):
            if "w" in node:
                yield (*path, name), node["w"]
            else:
                yield from _weights(node, (*path, name))


def _put(tree: Dict, path: Path, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _scale(node: Tree) -> Array:
    return jax.lax.stop_gradient(node["scale"]).astype(FLOAT)


def _dot(x: Array, w: Array) -> Array:
    return jnp.einsum("...i,io->...o", x, w, precision=precision(x.dtype), preferred_element_type=FLOAT)
