"""Parameters in the form that decoding on a CPU wants, and back.

XLA on a CPU reads a weight at the memory's speed only where the weight is an array of its own: a scan copies every
layer out of its stack first. And few large products beat many small ones. So the view has a tuple of layers for each
stack, with q, k and v side by side in one array, and gate and up in another. It is private to running a model: never
saved, never trained. `Weights` holds one form at a time; converting needs room for one group of joined stacks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxlm.checkpoints.load import flatten, unflatten
from jaxlm.models.config import DecoderConfig, groups
from jaxlm.models.stack import is_unrolled

Tree = dict[str, Any]
# joined leaf, its members, and the axis along which they lie side by side (heads; features)
JOINED = (("attn/qkv", ("attn/q", "attn/k", "attn/v"), -2), ("mlp/gate_up", ("mlp/gate", "mlp/up"), -1))


class Weights:
    """The parameters of a model, stacked or as a view; asking for the other form converts them.

    The dicts that go in and come out are the caller's own: only arrays are shared.
    """

    def __init__(self, config: DecoderConfig, params: Tree):
        self.config, self._params = config, _copy(params)

    @property
    def current(self) -> Tree:
        """Whichever form is held."""
        return _copy(self._params)

    @property
    def stacked(self) -> Tree:
        if is_unrolled(self._params["layers"]):
            with jax.ensure_compile_time_eval():  # also where a caller is just being traced
                self._params = _convert(self.config, self._params, _stack)
        return self.current

    @property
    def unrolled(self) -> Tree:
        if not is_unrolled(self._params["layers"]):
            with jax.ensure_compile_time_eval():
                self._params = _convert(self.config, self._params, _unroll)
        return self.current

    @property
    def on_one_device(self) -> bool:
        """False also for parameters that are being traced."""
        leaves = jax.tree.leaves(self._params)
        return not any(isinstance(leaf, Tracer) or len(leaf.devices()) > 1 for leaf in leaves)


def _convert(config: DecoderConfig, params: Tree, one) -> Tree:
    """Each stack through `one`; takes the leaves out of `params` as it goes."""
    layers, single = params.pop("layers"), groups(config.kinds)[0] == ""
    stacks = {"": layers} if single and not is_unrolled(layers) else layers
    done = {name: one(config, stacks.pop(name)) for name in list(stacks)}
    return params | {"layers": done[""] if "" in done and isinstance(done[""], dict) else done}


def _unroll(config: DecoderConfig, stack: Tree) -> tuple[Tree, ...]:
    """Layers that share the stack's memory, but for what is joined."""
    flat = flatten(stack)
    stack.clear()
    layers: list[Tree] = [{} for _ in range(len(next(iter(flat.values()))))]
    for path in list(flat):
        if path not in flat:
            continue
        into, sources, axis = _joined(path, flat)
        arrays = [np.asarray(flat.pop(source)) for source in sources]
        for layer, *pieces in zip(layers, *arrays, strict=True):
            layer[into] = jax.device_put(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis))
        del arrays
    return tuple(unflatten(layer) for layer in layers)


def _stack(config: DecoderConfig, layers: Sequence[Tree]) -> Tree:
    flat = [flatten(layer) for layer in layers]
    del layers
    stacked: Tree = {}
    for path in list(flat[0]):
        whole = np.stack([layer.pop(path) for layer in flat])
        for target, piece in _parted(config, path, whole):
            stacked[target] = jax.device_put(piece)
    return unflatten(stacked)


def _parted(config: DecoderConfig, path: str, whole: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The leaves that a leaf of the view holds."""
    parent, leaf = path.rsplit("/", 1)
    for joined, members, axis in JOINED:
        if parent == joined:
            a = config.attention
            cuts = (a.n_heads, a.n_heads + a.n_kv_heads) if len(members) == 3 else (whole.shape[axis] // 2,)
            pieces = map(np.ascontiguousarray, np.split(whole, cuts, axis))
            return list(zip((f"{member}/{leaf}" for member in members), pieces, strict=True))
    return [(path, whole)]


def _joined(path: str, flat: Tree) -> tuple[str, tuple[str, ...], int]:
    """Where a leaf goes in the view, the leaves that go there together, and along which axis."""
    parent, leaf = path.rsplit("/", 1)
    for joined, members, axis in JOINED:
        sources = tuple(f"{member}/{leaf}" for member in members)
        if parent in members and all(source in flat for source in sources):
            return f"{joined}/{leaf}", sources, axis
    return path, (path,), 0


def _copy(tree: Any) -> Any:
    """The same arrays in new containers."""
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return tuple(map(_copy, tree)) if isinstance(tree, tuple) else tree
