"""A program compiled for devices that are not there, and what it would take of them."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.parallel.collectives import Total, read_collectives, totals
from jaxlm.parallel.flops import Flops, count_flops
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.topology import Topology

Tree = Any
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and its abstract arguments with their shardings, after static ones; nothing is allocated.

    kinds: what the arguments are, for people; model_flops: of one run over all devices, nothing done twice; tokens: how
    many a run reads or makes.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kinds: dict[str, Tree]
    model_flops: float
    tokens: int
    static: tuple[Any, ...] = ()

    def trace(self) -> Any:
        """The function traced for its arguments, under the mesh in force."""
        return self.function.trace(*self.static, *self.args)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a run: each resource at its peak; best if they overlap fully, worst if not at all."""

    compute: float
    memory: float
    network: float

    @property
    def best(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def worst(self) -> float:
        return self.compute + self.memory + self.network


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a program takes, per device. bytes: the arguments by kind; temporaries and peak None where nothing was
    compiled, or it did not fit (why then says it in the compiler's words)."""

    name: str
    topology: Topology
    preset: str
    bytes: dict[str, int]
    arguments: int
    temporaries: int | None
    peak: int | None
    collectives: list[Total]
    flops: Flops
    model_flops: float
    tokens: int
    times: Times
    compile_seconds: float | None
    why: str | None = None
    is_estimate: bool = False

    @property
    def fits(self) -> bool:
        return self.why is None

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs over the chips' peak: without overlap, and with all of it."""
        peak = self.topology.chip.flops * self.topology.size
        return self.model_flops / self.times.worst / peak, self.model_flops / self.times.best / peak


def place(tree: Tree, shardings: Tree) -> Tree:
    """Abstract arrays with their shardings."""
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(put, tree, shardings)


def without_shardings(tree: Tree) -> Tree:
    """The abstract arrays anywhere."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def local_bytes(tree: Tree) -> int:
    """Bytes of abstract arrays on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * _itemsize(leaf.dtype)
    return total


def compile_plan(make: Callable[[Mesh], Program], topology: Topology, preset: str) -> Plan:
    """Compiles the program that `make` builds for a mesh of the topology; ValueError where the preset does not fit it,
    and without libtpu. That it does not fit the memory is no error, but the plan's `why`.
    """
    mesh = make_mesh(preset, topology.devices())
    program = make(mesh)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        traced = program.trace()
        flops = count_flops(traced.jaxpr) * (1 / mesh.size)
        lowered, compiled, why = traced.lower(), None, None
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as problem:
            if (why := out_of_memory(str(problem))) is None:
                raise
    seconds = time.perf_counter() - start
    found, memory = [], None
    if compiled is not None:
        memory = compiled.memory_analysis()
        found = totals(read_collectives(compiled.as_text(), mesh.shape))
    kinds = {name: local_bytes(tree) for name, tree in program.kinds.items()}
    arguments = sum(kinds.values()) if memory is None else int(memory.argument_size_in_bytes)
    return Plan(
        name=program.name,
        topology=topology,
        preset=preset,
        bytes=kinds,
        arguments=arguments,
        temporaries=None if memory is None else int(memory.temp_size_in_bytes),
        peak=None if memory is None else int(memory.peak_memory_in_bytes),
        collectives=found,
        flops=flops,
        model_flops=program.model_flops,
        tokens=program.tokens,
        times=times(topology, flops.total, 2 * arguments, sum(t.moved for t in found)),
        compile_seconds=seconds,
        why=why,
    )


def times(topology: Topology, flops: float, traffic: float, moved: float) -> Times:
    """Seconds at the peaks: products at the dense bfloat16 rate, `traffic` bytes of HBM, `moved` bytes into the device
    over all its links."""
    chip = topology.chip
    network = 0.0 if topology.size == 1 else moved / chip.bandwidth
    return Times(flops / chip.flops, traffic / chip.hbm_bandwidth, network)


def out_of_memory(message: str) -> str | None:
    """What a compiler's or runtime's error says of too little memory, in short; None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    used = re.search(r"Used [\d.]+[KMGT]? of [\d.]+[KMGT]? \w+(\. Exceeded \w+ capacity by [\d.]+[KMGT]?)?", message)
    return used[0] if used else message.splitlines()[0][:300]


def needed(why: str) -> int | None:
    """Bytes that the program wants, out of `why`."""
    match = re.search(r"(?:Used |required for HLO temporaries \()([\d.]+)([KMGT]?)(?: of|\))", why)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def _itemsize(dtype: Any) -> int:
    return 8 if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) else dtype.itemsize
