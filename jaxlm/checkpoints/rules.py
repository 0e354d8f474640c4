"""One table, both directions: the name of a stored tensor <-> a place in the parameter tree.

`{layer}` and `{expert}` in a template become stacked leading axes. A pattern is einops' `stored -> ours`; it has no
reductions, so it is a bijection and its inverse is the same pattern with the sides exchanged. There is no arithmetic.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange

from jaxlm.checkpoints.source import Box

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the elements of one leaf lie in a stored tensor: from its element `begin` on, as an array of `shape`.

    axes: which axis of the leaf each axis of `shape` is; None for the one that tells interleaved leaves apart, on which
    this leaf is at `at`.
    """

    begin: int
    shape: Shape
    axes: tuple[int | None, ...]
    at: int = 0

    def box(self, wanted: Box) -> Box:
        """The box of `shape` that holds a box of the leaf."""
        return tuple((self.at, self.at + 1) if axis is None else wanted[axis] for axis in self.axes)

    def to_leaf(self, x):
        """The values of a box, as the leaf has them."""
        mine = [i for i, axis in enumerate(self.axes) if axis is not None]
        x = x.reshape([x.shape[i] for i in mine])
        order = [axis for axis in self.axes if axis is not None]
        return x.transpose(sorted(range(len(mine)), key=order.__getitem__))


@dataclasses.dataclass(frozen=True)
class Rule:
    """One stored tensor is one leaf (or one element of a stacked one)."""

    hf: str  # "model.layers.{layer}.self_attn.q_proj.weight"
    path: str  # "layers/attn/q/w"
    pattern: str | None = None  # "(n h) d -> d n h"; None: as it is
    keep_f32: bool = False  # no dtype that is asked for narrows it: decays, whose exponentials multiply

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def stored_shape(self, shapes: Sequence[Shape]) -> Shape:
        return _stored(self.pattern, shapes[0])

    def split(self, x, shapes: Sequence[Shape]) -> tuple:
        return (_forward(x, self.pattern, shapes[0]),)

    def join(self, parts: Sequence):
        return _backward(parts[0], self.pattern)

    def layouts(self, shapes: Sequence[Shape]) -> tuple[Layout, ...]:
        return (_layout(self.pattern, shapes[0]),)


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """Several leaves of one shape in one tensor; the pattern brings the axis that tells them apart to the front."""

    hf: str
    paths: tuple[str, ...]
    pattern: str  # "(n c h) d -> c d n h"

    def stored_shape(self, shapes: Sequence[Shape]) -> Shape:
        return _stored(self.pattern, (len(self.paths), *shapes[0]))

    def split(self, x, shapes: Sequence[Shape]) -> tuple:
        return tuple(_forward(x, self.pattern, (len(self.paths), *shapes[0])))

    def join(self, parts: Sequence):
        return _backward(np.stack(parts), self.pattern)

    def layouts(self, shapes: Sequence[Shape]) -> tuple[Layout, ...]:
        whole = _layout(self.pattern, (len(self.paths), *shapes[0]))
        axes = tuple(axis - 1 if axis else None for axis in whole.axes if axis is not None)
        return tuple(Layout(0, whole.shape, axes, i) for i in range(len(self.paths)))


@dataclasses.dataclass(frozen=True)
class Concat:
    """One stored tensor is the concatenation along axis 0 of several leaves, each with its own pattern."""

    hf: str
    parts: tuple[tuple[str, str | None], ...]  # (path, pattern)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(path for path, _ in self.parts)

    def stored_shape(self, shapes: Sequence[Shape]) -> Shape:
        each = [_stored(pattern, shape) for (_, pattern), shape in zip(self.parts, shapes, strict=True)]
        return (sum(shape[0] for shape in each), *each[0][1:])

    def split(self, x, shapes: Sequence[Shape]) -> tuple:
        rows = [_stored(pattern, shape)[0] for (_, pattern), shape in zip(self.parts, shapes, strict=True)]
        starts = [0, *itertools.accumulate(rows)]
        return tuple(
            _forward(x[start : start + n], pattern, shape)
            for (_, pattern), shape, start, n in zip(self.parts, shapes, starts[:-1], rows, strict=True)
        )

    def join(self, parts: Sequence):
        return np.concatenate([_backward(x, pattern) for (_, pattern), x in zip(self.parts, parts, strict=True)])

    def layouts(self, shapes: Sequence[Shape]) -> tuple[Layout, ...]:
        made = [_layout(pattern, shape) for (_, pattern), shape in zip(self.parts, shapes, strict=True)]
        begins = itertools.accumulate((math.prod(one.shape) for one in made), initial=0)
        return tuple(dataclasses.replace(one, begin=begin) for one, begin in zip(made, begins, strict=False))


@dataclasses.dataclass(frozen=True)
class Alias:
    """A stored copy of another tensor (a tied head): checked to be equal, dropped, written back where it was."""

    hf: str
    of: str


AnyRule = Rule | Interleaved | Concat | Alias


@dataclasses.dataclass(frozen=True)
class Binding:
    """One stored tensor, and the elements of leaves it fills."""

    name: str
    rule: Rule | Interleaved | Concat
    paths: tuple[str, ...]
    index: tuple[int, ...]  # into the stacked leading axes
    shapes: tuple[Shape, ...]  # of the elements

    @property
    def stored_shape(self) -> Shape:
        return self.rule.stored_shape(self.shapes)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return self.rule.layouts(self.shapes)

    def dtype(self, wanted: str) -> str:
        """What it gets where `wanted` is asked for."""
        return "float32" if isinstance(self.rule, Rule) and self.rule.keep_f32 else wanted


def bind(rules: Sequence[AnyRule], leaves: Mapping[str, Shape], groups: Sequence[str]) -> dict[str, Binding]:
    """Every stored tensor that the parameters need, by name.

    leaves: path -> shape, stacked. groups: per layer, the name of its stack ("" when there is one): layer l of rule
    path layers/x is element (number of earlier layers of its group) of layers/<group>/x. A rule without leaves (the
    experts in a dense layer) binds nothing; a leaf element without a rule, or with two, is a ValueError.
    """
    bindings: dict[str, Binding] = {}
    filled: dict[str, set[tuple[int, ...]]] = {path: set() for path in leaves}
    for rule in rules:
        if isinstance(rule, Alias):
            continue
        for binding in _expand(rule, leaves, groups):
            if binding.name in bindings:
                raise ValueError(f"two rules name {binding.name}")
            bindings[binding.name] = binding
            for path in binding.paths:
                if binding.index in filled[path]:
                    raise ValueError(f"{path}{list(binding.index)} has two rules, the second for {binding.name}")
                filled[path].add(binding.index)
    for path, indices in filled.items():
        depth = len(next(iter(indices), ()))
        if len(indices) != math.prod(leaves[path][:depth]):
            raise ValueError(f"no rule fills all of {path} {leaves[path]}")
    return bindings


def _expand(rule, leaves, groups):
    if "{layer}" not in rule.hf:
        yield from _expand_experts(rule, rule.paths, (), {}, leaves)
        return
    seen = dict.fromkeys(groups, 0)
    for layer, group in enumerate(groups):
        paths = tuple(_in_group(path, group) for path in rule.paths)
        yield from _expand_experts(rule, paths, (seen[group],), {"layer": layer}, leaves)
        seen[group] += 1


def _expand_experts(rule, paths, index, fields, leaves):
    present = [path in leaves for path in paths]
    if not any(present):
        return
    if not all(present):
        raise ValueError(f"rule {rule.hf} fills {paths}, of which the model has only some")
    shapes = [leaves[path] for path in paths]
    experts = [{"expert": e} for e in range(shapes[0][len(index)])] if "{expert}" in rule.hf else [{}]
    for expert in experts:
        at = (*index, *expert.values())
        elements = tuple(shape[len(at) :] for shape in shapes)
        yield Binding(rule.hf.format(**fields, **expert), rule, paths, at, elements)


def _in_group(path: str, group: str) -> str:
    if not path.startswith("layers/"):
        raise ValueError(f"a rule with {{layer}} must fill a path under layers/, got {path}")
    return path.replace("layers/", f"layers/{group}/", 1) if group else path


@functools.cache
def sides(pattern: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The stored axes, each a product of ours, and our axes."""
    stored, ours = pattern.split("->")
    axes = tuple(tuple((group or name).split()) for group, name in re.findall(r"\(([^)]*)\)|(\S+)", stored))
    return axes, tuple(ours.split())


def _sizes(pattern: str, shape: Shape) -> dict[str, int]:
    ours = sides(pattern)[1]
    if len(ours) != len(shape):
        raise ValueError(f"pattern {pattern!r} does not fit a leaf of shape {shape}")
    return dict(zip(ours, shape, strict=True))


def _stored(pattern: str | None, shape: Shape) -> Shape:
    if pattern is None:
        return shape
    sizes = _sizes(pattern, shape)
    return tuple(math.prod(sizes[a] for a in axes) for axes in sides(pattern)[0])


def _layout(pattern: str | None, shape: Shape) -> Layout:
    if pattern is None:
        return Layout(0, shape, tuple(range(len(shape))))
    stored, ours = sides(pattern)
    axes = tuple(ours.index(name) for group in stored for name in group)
    _sizes(pattern, shape)
    return Layout(0, tuple(shape[axis] for axis in axes), axes)


def _forward(x, pattern: str | None, shape: Shape):
    return x if pattern is None else rearrange(x, pattern, **_sizes(pattern, shape))


def _backward(x, pattern: str | None):
    if pattern is None:
        return x
    stored, ours = pattern.split("->")
    return rearrange(x, f"{ours} -> {stored}")
