"""A model's linear layers under transformers' names, and where low-rank pairs for them lie in an adapters tree.

Both come from the family's name table: the rule that lays out a stored weight [out, in] also says how a stored pair
A [r, in], B [out, r] and a magnitude [out] become our a [in..., r], b [r, out...] and m [out...]. A weight that fills
several leaves (phi3's qkv_proj, gpt2's c_attn) has one pair: a shared `a`, and a `b` for each leaf.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence

from jaxlm.checkpoints.adapter_config import Lora, Names
from jaxlm.checkpoints.rules import Alias, AnyRule, Binding, Concat, Interleaved, Rule, Shape, bind, sides

OneRule = Rule | Interleaved | Concat
LEAVES = {"a": ".lora_A.weight", "b": ".lora_B.weight", "m": ".lora_magnitude_vector"}


@dataclasses.dataclass(frozen=True)
class Module:
    """One linear layer. node: its pair's place in the tree; parts: the leaves of `b` and `m`, () where there is one."""

    name: str
    node: str
    index: int  # in the stacks
    depth: int  # of the stacks
    parts: tuple[str, ...]
    ins: Shape
    outs: tuple[Shape, ...]  # of each part
    rules: Mapping[str, OneRule]  # of a, b and m
    input_major: bool  # the weight is stored [in, out]: transformers' Conv1D

    @property
    def n_in(self) -> int:
        return math.prod(self.ins)

    @property
    def n_out(self) -> int:
        return sum(map(math.prod, self.outs))

    def shapes(self, leaf: str, rank: int) -> tuple[Shape, ...]:
        """Of our arrays for one stored tensor of a layer."""
        if leaf == "a":
            return ((*self.ins, rank),)
        return tuple((rank, *out) if leaf == "b" else out for out in self.outs)


@dataclasses.dataclass(frozen=True)
class Modules:
    """All linear layers of a model by name, and what adapters are refused for."""

    by_name: Mapping[str, Module]
    refused: Mapping[str, str]  # name -> why
    layers: tuple[str, ...]  # the group of each layer
    shapes: Mapping[str, Shape]  # of the parameters

    def select(self, config: Lora) -> tuple[Module, ...]:
        """The modules that a config targets; ValueError for a name that no module has, or that takes no adapters."""
        if isinstance(config.targets, str):
            found = [n for n in self._all if config.is_all_linear or re.fullmatch(config.targets, n)]
            found = [n for n in found if n in self.by_name] if config.is_all_linear else found
        else:
            for target in config.targets:
                if not any(_matches((target,), name) for name in self._all):
                    raise ValueError(f"no module is named {target!r}{self._near(target)}")
            found = [name for name in self._all if _matches(config.targets, name)]
        found = [name for name in found if not _matches(config.exclude, name)]
        if unknown := [layer for layer in config.layers if layer not in range(len(self.layers))]:
            raise ValueError(f"layers has {unknown[0]}, expected 0..{len(self.layers) - 1}")
        if config.layers:
            found = [name for name in found if _layer(name) in config.layers]
        for name in found:
            if name in self.refused:
                raise ValueError(f"targets has {name}: {self.refused[name]}")
        if not found:
            raise ValueError(f"targets={config.targets!r} matches no module{self._near(str(config.targets))}")
        return tuple(self.by_name[name] for name in found)

    @property
    def _all(self) -> tuple[str, ...]:
        return (*self.by_name, *self.refused)

    def _near(self, target: str) -> str:
        names = sorted({name.rsplit(".", 1)[1] for name in self.by_name})
        near = difflib.get_close_matches(target, [*names, *self.by_name], 1)
        return f", did you mean {near[0]!r}" if near else f"; there are {', '.join(names)}"


def modules(rules: Sequence[AnyRule], shapes: Mapping[str, Shape], groups: Sequence[str]) -> Modules:
    """Of a model with these parameters, {path: stacked shape}; groups: the parameter stack of each layer."""
    found: dict[str, Module] = {}
    tied = [rule.hf.removesuffix(".weight") for rule in rules if isinstance(rule, Alias)]
    refused = dict.fromkeys(tied, "it is tied to the token table")
    for name, binding in bind(rules, shapes, groups).items():
        module = name.removesuffix(".weight")
        if module == name:
            continue
        if why := _refusal(binding):
            refused[module] = why
        else:
            found[module] = _module(module, binding, shapes[binding.paths[0]][0])
    return Modules(found, refused, tuple(groups), shapes)


def _refusal(binding: Binding) -> str:
    path = binding.paths[0]
    if not path.startswith("layers/"):
        return "adapters are for the linear layers of the trunk, not for tables, heads and the final norm"
    if "/router/" in path or len(binding.index) > 1:
        return "experts and their routers take no adapters"
    return "" if path.endswith("/w") else "it is no linear layer"


def _module(name: str, binding: Binding, depth: int) -> Module:
    rule = binding.rule
    patterns = [pattern for _, pattern in rule.parts] if isinstance(rule, Concat) else [rule.pattern]
    laid = [_layout(pattern, isinstance(rule, Interleaved)) for pattern in patterns]
    places = [path.removesuffix("/w").rsplit("/", 1) for path in binding.paths]
    parts = tuple(last for _, last in places) if len(places) > 1 else ()
    node = f"{places[0][0]}/{'_'.join(last for _, last in places)}"
    return Module(
        name=name,
        node=node,
        index=binding.index[0],
        depth=depth,
        parts=parts,
        ins=binding.shapes[0][: laid[0].n_in],
        outs=tuple(shape[laid[0].n_in :] for shape in binding.shapes),
        rules={leaf: _rule(leaf, name + suffix, node, parts, laid, rule) for leaf, suffix in LEAVES.items()},
        input_major=laid[0].input_major,
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The names of a weight's axes, by stored order and by ours (without the one that tells interleaved leaves)."""

    stored_in: str
    stored_out: str
    ours_in: str
    ours_out: str
    n_in: int
    input_major: bool


def _layout(pattern: str | None, interleaved: bool) -> _Layout:
    stored, ours = sides(pattern or "i o -> i o")
    ours = ours[1:] if interleaved else ours
    if len(stored) != 2:
        raise ValueError(f"pattern {pattern!r} is not that of a matrix")
    # Our weights have their inputs first, so the stored axis with our first name is the input.
    at = next(i for i, names in enumerate(stored) if ours[0] in names)
    n = len(stored[at])
    group = lambda names: f"({' '.join(names)})"
    return _Layout(group(stored[at]), group(stored[1 - at]), " ".join(ours[:n]), " ".join(ours[n:]), n, at == 0)


def _rule(leaf: str, hf: str, node: str, parts: tuple[str, ...], laid: Sequence[_Layout], of: OneRule) -> OneRule:
    if leaf == "a":
        return Rule(hf, f"{node}/a", f"rank {laid[0].stored_in} -> {laid[0].ours_in} rank")
    rank = "rank " if leaf == "b" else ""
    pattern = lambda lay, lead="": f"{lay.stored_out} {rank}-> {lead}{rank}{lay.ours_out}"
    paths = tuple(f"{node}/{leaf}/{part}" for part in parts)
    if isinstance(of, Concat):
        return Concat(hf, tuple((path, pattern(lay)) for path, lay in zip(paths, laid, strict=True)))
    if isinstance(of, Interleaved):
        return Interleaved(hf, paths, pattern(laid[0], sides(of.pattern)[1][0] + " "))
    return Rule(hf, f"{node}/{leaf}", pattern(laid[0]))


def _matches(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _layer(module: str) -> int | None:
    number = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return int(number[1]) if number else None
