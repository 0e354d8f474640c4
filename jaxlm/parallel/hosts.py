"""Several processes as one program: how they find each other, wait for each other, and what becomes of the others when
one dies.

All of it is `jax.distributed`: every process runs the same program, and sees its own devices and everyone's.
"""

import contextlib
import glob
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from jaxlm.parallel.sharding import RULES, spec

log = logging.getLogger(__name__)

# Without a sign of life for this long, a process counts as dead, and every other one stops.
HEARTBEAT_SECONDS = 100
# What a scheduler sets for each process it starts; more than one means that they belong together.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_ON_THIS_MACHINE = ("SLURM_STEP_TASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Joins this process to the others of its program; to be called before anything else asks for devices.

    coordinator: HOST:PORT at which process 0 is reached, given together with the number of processes and this one's.
    Without them jax asks SLURM, Open MPI, Kubernetes or the TPU pod; on a machine that none of those manages, nothing
    happens. heartbeat_seconds: how long after a process falls silent every other one stops with an error, at the
    latest; a connection that breaks ends them at once (`failing_together`).
    """
    given = (coordinator, processes, process_id)
    if any(one is not None for one in given) and any(one is None for one in given):
        raise ValueError(f"{coordinator=} {processes=} {process_id=}: they go together, all three or none")
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise ValueError(f"{process_id=}: expected 0 to {processes - 1}, there are {processes} processes")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"{coordinator=}: expected HOST:PORT")
    if jax.distributed.is_initialized():
        raise ValueError("this process has joined the others already")
    options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds, "local_device_ids": _all_gpus()}
    if coordinator is not None:
        options |= {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as problem:
        # Nothing to join, or, where a program has used its devices already, nothing to be joined any more.
        alone = "coordinator_address" in str(problem) or "must be called before" in str(problem)
        if coordinator is not None or not alone:
            raise
        counts = {name: os.environ[name] for name in _COUNTS if os.environ.get(name, "1") != "1"}
        if counts:
            raise ValueError(
                f"{counts} says that there are several processes, and jax cannot join them; say coordinator, processes "
                f"and process_id, before anything uses a device ({str(problem).splitlines()[0]})"
            ) from problem
        log.info("one process: %s", problem)
        return
    log.info("process %d of %d", jax.process_index(), jax.process_count())


def _all_gpus() -> list[int] | None:
    """Every GPU here where one process runs per machine: jax would give each process of SLURM or Open MPI one GPU."""
    if not any(re.fullmatch(r"1(\(x\d+\))?", os.environ.get(name, "")) for name in _ON_THIS_MACHINE):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len([one for one in visible.split(",") if one])
    return list(range(count)) or None


def leads() -> bool:
    """Whether this is the process that prints and writes files for all."""
    return jax.process_index() == 0


def spans_hosts(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of other processes."""
    return mesh is not None and mesh.is_multi_process


def share_of_rows(mesh: Mesh | None) -> tuple[int, int]:
    """(index, count): which of `count` equal parts of a batch's rows the devices of this process compute.

    Processes with parts of one model have the same rows. ValueError where a process's rows do not lie together.
    """
    if not spans_hosts(mesh):
        return 0, 1
    assert mesh is not None
    axes = dict(RULES)["batch"]
    cuts = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    placed = NamedSharding(mesh, spec(("batch",), (cuts,), mesh)[0]).devices_indices_map((cuts,))
    rows: dict[int, set[int]] = {}
    for device, (part,) in placed.items():
        rows.setdefault(device.process_index, set()).update(range(*part.indices(cuts)))
    parts = sorted({(min(one), max(one) + 1) for one in rows.values()})
    even = [(i * cuts // len(parts), (i + 1) * cuts // len(parts)) for i in range(len(parts))]
    if parts != even or any(len(one) != cuts // len(parts) for one in rows.values()):
        raise ValueError(
            f"mesh {dict(mesh.shape)}: its processes have rows {parts} of {cuts}, which are no equal parts"
        )
    mine = rows[jax.process_index()]
    return parts.index((min(mine), max(mine) + 1)), len(parts)


def place(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` that also takes what every process has for itself (a key, a count) to all of them."""

    def one(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)

    return jax.tree.map(one, tree, shardings)


@contextlib.contextmanager
def leader_first(what: str) -> Iterator[None]:
    """The first process runs the block before the others do, who then find what it made."""
    if not leads():
        wait_for_all(what)
    yield
    if leads():
        wait_for_all(what)


def ends(step: int) -> bool:
    """Whether a process has had SIGTERM, said to all of them after the same step; to be asked after every step."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def failing_together(then: str) -> Iterator[None]:
    """An error in the block ends this process at once, with exit code 1, where there are several. then: what to do.

    Python would first wait for the others, who wait for this one in their next computation; so they see it leave.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as problem:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        where = f"process {jax.process_index()} of {jax.process_count()}"
        if isinstance(problem, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(problem):
            said = (str(problem).splitlines() or ["no reason given"])[0]
            message = f"error: {where} has lost another one, and stops; {then} ({said})"
        elif isinstance(problem, ValueError | OSError):
            message = f"error: {where}: {problem}"
        else:
            message = f"{traceback.format_exc()}error: {where} stops"
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


def wait_for_all(what: str) -> None:
    """Returns when every process has come here; `what` names the place, and must be the same in all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
