"""From a checkpoint's tensors to a parameter tree, and back; strict both ways.

Each stored tensor is read once, laid out and cast on the device, and written into its stack in place (the stack's
buffer is donated), so the peak of host memory is one tensor above the parameters.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.checkpoints import sharded
from jaxlm.checkpoints.manifest import Manifest
from jaxlm.checkpoints.rules import Alias, AnyRule, Binding, Shape, bind
from jaxlm.checkpoints.source import Source

Progress = Callable[[int, int], None]  # bytes done, bytes in all
FLOATS = ("float32", "float16", "bfloat16")
_BLOCK = 16 << 20  # bytes read at a time where two tensors are compared


class Names:
    """The stored name of every tensor that the rules know, for one model and one checkpoint.

    base: the prefix of the trunk's tensors, which checkpoints saved from a headless model do not have.
    """

    def __init__(
        self, rules: Sequence[AnyRule], leaves: Mapping[str, Shape], groups: Sequence[str], base: str, have=()
    ):
        headless = bool(have) and not any(name.startswith(base) for name in have)
        self.stored = (lambda name: name.removeprefix(base)) if headless else (lambda name: name)
        self.bindings = {self.stored(name): b for name, b in bind(rules, leaves, groups).items()}
        self.depth = len(groups)
        aliases = [rule for rule in rules if isinstance(rule, Alias)]
        self.aliases = {self.stored(rule.hf): self.stored(rule.of) for rule in aliases}

    def dtypes(self, wanted: str) -> dict[str, str]:
        """{path: dtype} where `wanted` is asked for."""
        return {path: binding.dtype(wanted) for binding in self.bindings.values() for path in binding.paths}


def load(
    source: Source,
    names: Names,
    leaves: Mapping[str, Shape],
    *,
    where: str,
    buffers: Sequence[str] = (),
    dtype: str | None = None,
    progress: Progress | None = None,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> tuple[dict[str, jax.Array], Manifest]:
    """{path: stacked array} for every leaf, and the manifest that `save` needs.

    shardings: {path: where its array goes}; then this host reads what its own devices hold, and nothing else. dtype: of
    the parameters; None keeps the checkpoint's (the widest, where one stack mixes several). buffers: templates of
    stored tensors that are no parameters. Missing, unexpected and mis-shaped tensors, or a tied duplicate that differs,
    are one ValueError naming them all.
    """
    manifest = examine(source, names, where=where, buffers=buffers)
    arrays: dict[str, jax.Array] = {}
    dtypes = names.dtypes(dtype) if dtype else _stored_dtypes(source, names.bindings)
    done, total = 0, sum(_nbytes(source, name) for name in names.bindings)

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    def checked(raw: np.ndarray, name: str) -> np.ndarray:
        if dtype and names.bindings[name].dtype(dtype) == "float16":
            _narrowed(raw, np.dtype(np.float16), name)
        return raw

    if shardings is not None:
        arrays = sharded.fill(source, names.bindings, leaves, shardings, dtypes, checked, on_bytes)
    for name, binding in names.bindings.items() if shardings is None else ():
        _fill(arrays, binding, checked(source.read(name), name), leaves, dtypes)
        # Dispatch is asynchronous: without waiting, tensors that were read would pile up in memory.
        jax.block_until_ready([arrays[path] for path in binding.paths])
        on_bytes(_nbytes(source, name))
    return {path: arrays[path] for path in leaves}, manifest


def examine(source: Source, names: Names, *, where: str, buffers: Sequence[str] = ()) -> Manifest:
    """The manifest of a checkpoint that fits the rules; ValueError as `load` raises it."""
    derived = {names.stored(t.format(layer=layer)) for t in buffers for layer in range(names.depth)}
    kept = [name for name in source.tensors if name in derived]
    copies = {name: of for name, of in names.aliases.items() if name in source.tensors}
    _check(source, names.bindings, kept, copies, where)
    return Manifest(
        files=getattr(source, "headers", {}),
        tensors=dict(source.tensors),
        buffers={name: source.read(name) for name in kept},
        aliases=copies,
        keeps_dtypes=getattr(source, "keeps_dtypes", False),
        index=getattr(source, "index", None),
    )


def streamed(
    source: Source, names: Names, manifest: Manifest, dtype: str | None
) -> tuple[dict[str, tuple[np.dtype, Shape]], Callable[[str], np.ndarray]]:
    """`stored` for a source that is written as it is read, without parameters between; what was not stored as it is
    (GGUF) is float32."""

    def spec(name: str, binding: Binding) -> tuple[np.dtype, Shape]:
        own = source.tensors[name].dtype if manifest.keeps_dtypes else np.dtype(np.float32)
        return np.dtype(jnp.dtype(binding.dtype(dtype)) if dtype else own), binding.stored_shape

    specs = {name: spec(name, binding) for name, binding in names.bindings.items()}
    return specs, lambda name: _narrowed(source.read(name), specs[name][0], name)


def stored(
    arrays: Mapping[str, jax.Array], names: Names, manifest: Manifest | None, dtype: str | None
) -> tuple[dict[str, tuple[np.dtype, Shape]], Callable[[str], np.ndarray]]:
    """What to write for a parameter tree: {name: (dtype, shape)}, and a function that makes one tensor.

    dtype None: every name in the dtype the manifest says, or its parameter's own when there is no manifest.
    """

    def spec(name: str, binding: Binding) -> tuple[np.dtype, Shape]:
        own = manifest.tensors[name].dtype if manifest and manifest.keeps_dtypes else arrays[binding.paths[0]].dtype
        return np.dtype(jnp.dtype(binding.dtype(dtype)) if dtype else own), binding.stored_shape

    specs = {name: spec(name, binding) for name, binding in names.bindings.items()}

    def read(name: str) -> np.ndarray:
        binding = names.bindings[name]
        parts = [_element(arrays[path], binding.index) for path in binding.paths]
        return _narrowed(binding.rule.join(parts), specs[name][0], name)

    return specs, read


def _element(stack: jax.Array, index: tuple[int, ...]) -> np.ndarray:
    """One element of a stack on the host; on a single CPU device it shares the stack's memory."""
    if len(stack.sharding.device_set) > 1:
        return sharded.element(stack, index)
    if next(iter(stack.devices())).platform == "cpu":
        return np.asarray(stack)[index]
    return np.asarray(stack[index])


def _narrowed(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """x in this dtype; a finite number that float16 cannot hold is a ValueError."""
    if dtype == np.float16 and x.dtype != dtype:
        with np.errstate(over="ignore"):
            narrow = x.astype(dtype)
        if np.isinf(narrow).sum() > np.isinf(x).sum():
            raise ValueError(f"{name} has numbers beyond float16's 65504; use bfloat16 or float32")
        return narrow
    return x.astype(dtype, copy=False)


def _fill(arrays, binding: Binding, raw: np.ndarray, leaves, dtypes) -> None:
    """Puts one stored tensor into its leaves."""
    wanted = tuple(dtypes[path] for path in binding.paths)
    if not binding.index:
        arrays.update(zip(binding.paths, _lay_out(raw, binding.rule, binding.shapes, wanted), strict=True))
        return
    for path, dtype in zip(binding.paths, wanted, strict=True):
        if path not in arrays:
            arrays[path] = jnp.zeros(leaves[path], dtype)
    stacks = tuple(arrays[path] for path in binding.paths)
    index = np.asarray(binding.index, np.int32)
    arrays.update(zip(binding.paths, _place(stacks, raw, index, binding.rule, binding.shapes), strict=True))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _lay_out(raw, rule, shapes: tuple[Shape, ...], dtypes: tuple[str, ...]):
    return tuple(part.astype(dtype) for part, dtype in zip(rule.split(raw, shapes), dtypes, strict=True))


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _place(stacks, raw, index, rule, shapes: tuple[Shape, ...]):
    def put(stack, part):
        start = (*index, *(0,) * part.ndim)
        return jax.lax.dynamic_update_slice(
            stack, part.astype(stack.dtype).reshape((1,) * len(index) + part.shape), start
        )

    return tuple(map(put, stacks, rule.split(raw, shapes)))


def _check(
    source: Source, bindings: Mapping[str, Binding], kept: Sequence[str], copies: Mapping[str, str], where: str
) -> None:
    missing = [
        f"  missing {name}, expected {list(b.stored_shape)}"
        for name, b in bindings.items()
        if name not in source.tensors
    ]
    unexpected = [
        f"  unexpected {name} {list(info.shape)} in {info.file}"
        for name, info in source.tensors.items()
        if name not in bindings and name not in kept and name not in copies
    ]
    wrong = []
    for name, binding in bindings.items():
        info = source.tensors.get(name)
        if info and tuple(info.shape) != binding.stored_shape:
            wrong.append(f"  {name} in {info.file} has shape {list(info.shape)}, expected {list(binding.stored_shape)}")
        elif info and info.dtype.name not in FLOATS:
            wrong.append(f"  {name} in {info.file} is {info.dtype.name}, expected one of {', '.join(FLOATS)}")
    wrong += [
        f"  {name} differs from {of}, to which config.json ties it"
        for name, of in copies.items()
        if of in source.tensors and not _equal(source, name, of)
    ]
    problems = [*_few(missing), *_few(unexpected), *_few(wrong)]
    if problems:
        count = len(missing) + len(unexpected) + len(wrong)
        raise ValueError("\n".join([f"{where} does not fit its config.json; {count} tensors are wrong:", *problems]))


def _few(lines: list[str], limit: int = 20) -> list[str]:
    return lines if len(lines) <= limit else [*lines[:limit], f"  ... and {len(lines) - limit} more like these"]


def _stored_dtypes(source: Source, bindings: Mapping[str, Binding]) -> dict[str, str]:
    """The dtype of each leaf as stored; float32 where the layers of one stack differ."""
    kinds: dict[str, set[str]] = {}
    for name, binding in bindings.items():
        for path in binding.paths:
            kinds.setdefault(path, set()).add(source.tensors[name].dtype.name)
    return {path: next(iter(found)) if len(found) == 1 else "float32" for path, found in kinds.items()}


def _nbytes(source: Source, name: str) -> int:
    info = source.tensors[name]
    return info.dtype.itemsize * int(np.prod(info.shape))


def _equal(source: Source, a: str, b: str) -> bool:
    """Whether two tensors are the same, bit for bit, a few rows at a time; of several processes each takes a share."""
    first, second = source.tensors[a], source.tensors[b]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    step = max(1, _BLOCK // max(1, _nbytes(source, a) // max(1, first.shape[0])))
    count = jax.process_count()
    begin, end = (first.shape[0] * i // count for i in (jax.process_index(), jax.process_index() + 1))
    blocks = (slice(i, min(i + step, end)) for i in range(begin, end, step))
    return all(source.read(a, rows).tobytes() == source.read(b, rows).tobytes() for rows in blocks)


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return out
