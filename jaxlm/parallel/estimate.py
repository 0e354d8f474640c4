"""Bytes, FLOPs and collectives by formula and by shapes, without compiling: for GPUs, and for quick answers."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlm.parallel.collectives import Total
from jaxlm.parallel.flops import flops_of
from jaxlm.parallel.mesh import abstract_mesh
from jaxlm.parallel.plan import Plan, Program, local_bytes, times, without_shardings
from jaxlm.parallel.topology import Topology

ROWS = ("data", "fsdp", "expert")  # mesh axes that cut a batch


@dataclasses.dataclass(frozen=True)
class States:
    """Bytes of parameters, gradients and optimizer states that a host and a device hold."""

    host: float
    device: float
    offload_params: bool = False
    offload_optimizer: bool = False
    sharded_init: bool = True  # parameters are made in their shards, never whole on the host

    def __str__(self) -> str:
        words = ["offload parameters"] * self.offload_params + ["offload optimizer"] * self.offload_optimizer
        made = "sharded init" if self.sharded_init else "init on the host"
        return f"{self.host / 2**30:.2f} GB host, {self.device / 2**30:.2f} GB device: {', '.join([*words, made])}"


def zero3(params: int, largest: int, devices: int, nodes: int = 1, buffer: float = 1.5) -> list[States]:
    """ZeRO stage 3 with Adam in mixed precision, as DeepSpeed accounts for it: 18 bytes a parameter (2 half-precision
    weights, 4 each of float32 weights, gradients and two moments), the largest layer whole on each device.

    params and largest count parameters, of the model and of its largest layer; devices are those of one node. What is
    offloaded is on the host, `buffer` times. In order: parameters and optimizer offloaded, the optimizer alone, none;
    each with parameters made in shards, and on the host.
    """
    whole, found = 4 * largest, []
    for offload_params, offload_optimizer in ((True, True), (False, True), (False, False)):
        kept = 18 if offload_params else 16
        device = whole + (0 if offload_params else 2 if offload_optimizer else 18) * params / (devices * nodes)
        for sharded_init in (True, False):
            if not offload_optimizer:
                host = (largest if sharded_init else params) * 4 * devices * buffer
            else:
                host = params * buffer * (kept / nodes if sharded_init else max(4 * devices, kept / nodes))
            found.append(States(host, device, offload_params, offload_optimizer, sharded_init))
    return found


def zero2(params: int, devices: int, nodes: int = 1, buffer: float = 1.5) -> list[States]:
    """ZeRO stage 2 likewise: with the optimizer offloaded, and without."""
    count = devices * nodes
    return [
        States(params * max(4 * count, 16) * buffer, 2 * params, offload_optimizer=True),
        States(params * 4 * devices * buffer, 4 * params + 16 * params / count),
    ]


def largest_layer(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters of the module that itself holds most, of {path: shape}; a stack of layers counts as one of them."""
    held: dict[str, int] = {}
    for path, shape in shapes.items():
        one = shape[1:] if path.startswith("layers/") else shape
        held[path.rpartition("/")[0]] = held.get(path.rpartition("/")[0], 0) + math.prod(one)
    return max(held.values())


def estimate_plan(
    make: Callable[[Any], Program],
    topology: Topology,
    preset: str,
    *,
    activations: float,
    rows: int,
    width: int,
    layers: int,
    remat: str | None,
) -> Plan:
    """A plan without compiling. activations: bytes that one of `rows` keeps for the backward pass; width and
    layers of the model, for what tensor parallelism sums; remat None where nothing trains.

    Memory is what the arguments take by their shardings, the gradients and the activations; the compiler's own
    temporaries are left out.
    """
    mesh = abstract_mesh(preset)
    if mesh.size != topology.size:
        raise ValueError(f"mesh {preset!r} is for {mesh.size} devices; there are {topology.size}")
    program = make(mesh)
    run = functools.partial(program.function, *program.static)
    flops = flops_of(run, *without_shardings(program.args)) * (1 / topology.size)
    kinds = {name: local_bytes(tree) for name, tree in program.kinds.items()}
    cut = math.prod(mesh.shape[axis] for axis in ROWS)
    temporaries = int(activations * rows / cut)
    if remat is not None:
        temporaries += kinds["parameters"]  # the gradients
    arguments = sum(kinds.values())
    found = traffic(program, dict(mesh.shape), width, layers, remat)
    over = arguments + temporaries - topology.chip.hbm
    why = f"Needs {over / 2**30:.2f} GiB more than {topology.chip.hbm / 2**30:.2f} GiB" if over > 0 else None
    return Plan(
        name=program.name,
        topology=topology,
        preset=preset,
        bytes=kinds,
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries,
        collectives=found,
        flops=flops,
        model_flops=program.model_flops,
        tokens=program.tokens,
        times=times(topology, flops.total, 2 * arguments, sum(t.moved for t in found)),
        compile_seconds=None,
        why=why,
        is_estimate=True,
    )


def traffic(program: Program, sizes: Mapping[str, int], width: int, layers: int, remat: str | None) -> list[Total]:
    """Collectives of a run in 2-byte numbers: fsdp gathers the weights for each pass and scatters their gradients, data
    sums the gradients, tensor sums each layer's two branches in each pass."""
    whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.kinds["parameters"]))
    held = 2 * whole / sizes["tensor"] / sizes["expert"] / sizes["pipe"]
    passes = {None: 1, "none": 2}.get(remat, 3)
    found = []

    def add(kind: str, axis: str, bytes: float, runs: int) -> None:
        share = (sizes[axis] - 1) / sizes[axis] * (2 if kind == "all-reduce" else 1)
        if sizes[axis] > 1 and runs:
            found.append(Total(kind, (axis,), runs, runs, bytes * share * runs))

    add("all-gather", "fsdp", held, min(passes, 2) if remat in (None, "none") else 3)
    if remat is not None:
        add("reduce-scatter", "fsdp", held, 1)
        add("all-reduce", "data", held / sizes["fsdp"], 1)
    rows = math.prod(sizes[axis] for axis in (*ROWS, "sequence"))
    add("all-reduce", "tensor", 2 * program.tokens * width / rows, 2 * layers * passes)
    return found
