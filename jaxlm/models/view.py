"""Parameters in the form that decoding on a CPU wants, and back.

XLA on a CPU reads a weight at the memory's speed only where the weight is an array of its own: a scan copies every
layer out of its stack first. And few large products beat many small ones. So the view has a tuple of layers for each
stack, with q, k and v side by side in one array, and gate and up in another. It is private to running a model: never
saved, never trained, and `Weights` holds one form at a time, so it costs no memory.
"""

from typing import Any

import jax
import numpy as np

from jaxlm.models.config import DecoderConfig, groups

Tree = dict[str, Any]
JOINED = {"attn": ("qkv", ("q", "k", "v")), "mlp": ("gate_up", ("gate", "up"))}


def unroll(config: DecoderConfig, params: Tree) -> Tree:
    """The decode view of stacked parameters; leaves are taken out of `params` as they are converted."""
    layers = params.pop("layers")
    stacks = {"": layers} if groups(config.kinds)[0] == "" else layers
    return params | {"layers": {name: _unrolled(stack) for name, stack in stacks.items()}}


def restack(config: DecoderConfig, view: Tree) -> Tree:
    """The stacked parameters of a decode view; leaves are taken out of `view` as they are converted."""
    stacks = {name: _stacked(config, list(layers)) for name, layers in view.pop("layers").items()}
    return view | {"layers": stacks.get("", stacks)}


def is_unrolled(params: Tree) -> bool:
    return any(isinstance(stack, tuple) for stack in params["layers"].values())


def _unrolled(stack: Tree) -> tuple[Tree, ...]:
    depth = len(jax.tree.leaves(stack)[0])
    layers: list[Tree] = [{} for _ in range(depth)]
    for name in list(stack):
        part = stack.pop(name)
        joined, members = JOINED.get(name, ("", ()))
        if members and all(member in part for member in members):
            parts = [part.pop(member) for member in members]
            for leaf in list(parts[0]):
                arrays = [np.asarray(p.pop(leaf)) for p in parts]
                for layer, *pieces in zip(layers, *arrays, strict=True):
                    # Features of one product lie side by side: heads for q, k, v; the last axis for gate and up.
                    axis = -2 if joined == "qkv" else -1
                    layer.setdefault(name, {}).setdefault(joined, {})[leaf] = jax.device_put(
                        np.concatenate(pieces, axis)
                    )
        for layer, values in zip(layers, _each(part, depth), strict=True):
            layer[name] = layer.get(name, {}) | values
    return tuple(layers)


def _each(tree: Any, depth: int) -> list[Any]:
    """The layers of a stacked tree; on a CPU they share its memory."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return [jax.tree.unflatten(structure, [jax.device_put(a[i]) for a in arrays]) for i in range(depth)]


def _stacked(config: DecoderConfig, layers: list[Tree]) -> Tree:
    layers = [dict(layer) for layer in layers]
    stack: Tree = {}
    for name in list(layers[0]):
        parts = [dict(layer.pop(name)) for layer in layers]
        joined, members = JOINED.get(name, ("", ()))
        if joined in parts[0]:
            axis = -2 if joined == "qkv" else -1
            for leaf in list(parts[0][joined]):
                whole = np.stack([part[joined].pop(leaf) for part in parts])
                for member, piece in zip(
                    members, np.split(whole, _cuts(config, joined, whole.shape[-1]), axis), strict=True
                ):
                    stack.setdefault(name, {}).setdefault(member, {})[leaf] = jax.device_put(
                        np.ascontiguousarray(piece)
                    )
            parts = [{k: v for k, v in part.items() if k != joined} for part in parts]
        stack[name] = stack.get(name, {}) | jax.tree.map(lambda *a: jax.device_put(np.stack(a)), *parts)
    return stack


def _cuts(config: DecoderConfig, joined: str, width: int) -> tuple[int, ...]:
    """Where the members of a joined array begin, after the first."""
    a = config.attention
    return (a.n_heads, a.n_heads + a.n_kv_heads) if joined == "qkv" else (width // 2,)


class Weights:
    """The parameters of a model in one of two forms; asking for the other converts them, leaf by leaf."""

    def __init__(self, config: DecoderConfig, params: Tree):
        self.config, self._params = config, params

    @property
    def on_one_device(self) -> bool:
        return all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(self._params))

    @property
    def stacked(self) -> Tree:
        if is_unrolled(self._params):
            with jax.ensure_compile_time_eval():  # also where a caller is just being traced
                self._params = restack(self.config, self._params)
        return self._params

    @property
    def unrolled(self) -> Tree:
        if not is_unrolled(self._params):
            with jax.ensure_compile_time_eval():
                self._params = unroll(self.config, self._params)
        return self._params
