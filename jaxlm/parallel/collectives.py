"""What a compiled program says to other devices: the collectives of its HLO, times the trips of their loops."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OP = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation of the program. bytes: of its result on a device (of a reduce-scatter, of its operand); times: how
    often it runs a step; axes: the mesh axes over which it speaks; group: how many devices take part."""

    kind: str
    bytes: int
    times: int
    axes: tuple[str, ...]
    group: int
    op: str = ""

    @property
    def moved(self) -> float:
        """Bytes that come into a device in a step, by the best algorithm on a ring or torus."""
        share = (self.group - 1) / self.group
        return self.bytes * self.times * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Total:
    """All collectives of one kind over the same axes: operations in the program, runs a step, bytes into a device."""

    kind: str
    axes: tuple[str, ...]
    count: int
    runs: int
    moved: float


def totals(found: Sequence[Collective]) -> list[Total]:
    """One line for each kind and axes, the greatest first."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = defaultdict(list)
    for one in found:
        groups[one.kind, one.axes].append(one)
    made = [
        Total(kind, axes, len(ones), sum(o.times for o in ones), sum(o.moved for o in ones))
        for (kind, axes), ones in groups.items()
    ]
    return sorted(made, key=lambda t: -t.moved)


def read_collectives(hlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of the text of a compiled module; mesh_shape in the order of the mesh's axes.

    A loop without a known trip count counts once. TPUs have fusions of an all-reduce with the slice of its result,
    which are reduce-scatters.
    """
    computations = _computations(hlo)
    times = _times(computations)
    found = []
    for name, lines in computations.items():
        scatter = "all-reduce-scatter" in name
        for line in lines:
            match = _OP.search(line)
            if match and times.get(name, 0):
                kind = "reduce-scatter" if scatter and match[2] == "all-reduce" else match[2]
                if scatter and match[2] == "collective-permute":
                    continue  # part of the fusion
                axes, group = _axes(line, mesh_shape)
                if group > 1:
                    size = _size(match[1], match[2], bool(match[3])) * (group if match[2] == "reduce-scatter" else 1)
                    op = re.search(r'op_name="([^"]*)"', line)
                    found.append(Collective(kind, size, times[name], axes, group, op[1] if op else ""))
    return found


def _computations(hlo: str) -> dict[str, list[str]]:
    """{name: lines}; the entry's name is "ENTRY"."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in hlo.splitlines():
        if lines is None:
            head = re.match(r"(ENTRY )?(%[\w.\-]+) .*\{$", line)
            if head:
                lines = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif line.startswith("}"):
            lines = None
        else:
            lines.append(line)
    return found


def _times(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the entry."""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in computations.items():
        for line in lines:
            trips = _trips(line, computations) if " while(" in line else 1
            for called in _CALLED.findall(line):
                calls[name] += [(callee, trips) for callee in re.findall(r"%[\w.\-]+", called)]
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, n: int) -> None:
        times[name] += n
        for callee, trips in calls[name]:
            if callee in computations:
                visit(callee, n * trips)

    visit("ENTRY", 1)
    return times


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler says, or by the constant that its counter, from 0, is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    condition = re.search(r"condition=(%[\w.\-]+)", line)
    text = "\n".join(computations.get(condition[1], ())) if condition else ""
    test = re.search(r"ROOT .* compare\(.*?(%[\w.\-]+)\), direction=LT", text)
    limit = re.search(rf"{re.escape(test[1])} = s32\[\]\S* constant\((\d+)\)", text) if test else None
    return int(limit[1]) if limit else 1


def _size(text: str, kind: str, is_start: bool) -> int:
    """Bytes of a result; of the last half of it for a start, whose tuple begins with the operands."""
    shapes = [(dtype, dims) for dtype, dims in _SHAPE.findall(text) if dtype in BYTES]
    if is_start and kind == "collective-permute":
        shapes = shapes[:1]
    elif is_start and kind != "all-reduce":
        shapes = shapes[len(shapes) // 2 :]
    return int(sum(BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in shapes))


def _axes(line: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which members of a group differ, and the size of a group."""
    members = _group(line, math.prod(mesh_shape.values()))
    at = np.array(np.unravel_index(members, tuple(mesh_shape.values())))
    axes = tuple(axis for axis, row in zip(mesh_shape, at, strict=True) if len(set(row.tolist())) > 1)
    group = len(members)
    if "source_target_pairs" in line and axes:
        group = math.prod(mesh_shape[axis] for axis in axes)
    return axes, group


def _group(line: str, devices: int) -> list[int]:
    """The devices of one group of a collective, in any of the notations of HLO."""
    if match := re.search(r"source_target_pairs=\{([{\d,}]*)\}", line):
        pairs = re.findall(r"\{(\d+),(\d+)\}", match[0])
        return next(([int(a), int(b)] for a, b in pairs if a != b), [0])  # what stays where it is is copied
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return [int(i) for i in match[1].split(",")]
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        numbers = [[int(i) for i in (part or "").split(",") if i] for part in match.groups()]
        ids = np.arange(devices).reshape(numbers[1])
        ids = ids.transpose(numbers[2]) if numbers[2] else ids
        return ids.reshape(numbers[0])[0].tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        inside = set(re.findall(r"'([^']+)'", match[2]))
        return ids[tuple(slice(None) if name in inside else 0 for name in sizes)].reshape(-1).tolist()
    return list(range(devices))
