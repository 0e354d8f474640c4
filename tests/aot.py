"""Compiling for accelerators that are not there: libtpu compiles for a topology on a CPU-only host, and its static
schedule can be read.

libtpu reads its flags once, when it loads, so a schedule is made in a process of its own: `schedule` pickles the
function and its shapes into one. Two processes may load libtpu at once (ALLOW_MULTIPLE_LIBTPU_LOAD).
"""

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.parallel.topology import prepare_environment

# Chip -> its smallest topology of four chips, and the accelerator type that libtpu wants to read somewhere.
CHIPS = {
    "v4": ("v4:2x2x1", "v4-8"),
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
    "tpu7x": ("tpu7x:2x2x1", "tpu7x-8"),
}
DELAY = 4  # bundles after a branch that run in any case
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None

prepare_environment()


def tpu_topology(chip: str) -> Any:
    """The compile-only topology of four chips of this kind; ValueError for an unknown chip."""
    from jax.experimental import topologies

    if chip not in CHIPS:
        raise ValueError(f"unknown {chip=}; there are {', '.join(CHIPS)}")
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0])


def tpu_mesh(chip: str, mesh_shape: dict[str, int] | None = None) -> Any:
    """A Mesh over the first chips of the topology; by default over one chip."""
    import jax

    sizes = {"x": 1} if mesh_shape is None else mesh_shape
    devices = np.array(tpu_topology(chip).devices[: int(np.prod(list(sizes.values())))]).reshape(*sizes.values())
    return jax.sharding.Mesh(devices, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def compile_tpu(f, *shapes, chip: str = "v6e", mesh_shape: dict[str, int] | None = None, specs=None) -> Any:
    """f compiled for real chips: a jax.stages.Compiled, never run.

    shapes are ShapeDtypeStructs (or pytrees of them), replicated over the mesh unless specs gives one PartitionSpec for
    each. Without mesh_shape one chip is used: then Mosaic kernels need no shard_map.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = tpu_mesh(chip, mesh_shape)
    specs = [PartitionSpec()] * len(shapes) if specs is None else specs

    def placed(shape, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shape)

    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*map(placed, shapes, specs)).compile()


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of a schedule: its bundles [start, stop) and how often they run; None if that is not static."""

    start: int
    stop: int
    trips: int | None
    is_grid: bool


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The static VLIW schedule of one kernel: one row of used slots per bundle, and its loops."""

    name: str
    units: tuple[str, ...]
    capacity: tuple[int, ...]
    used: np.ndarray  # int [bundles, units]
    loops: tuple[Loop, ...]
    branches: tuple[tuple[int, int], ...]  # bundles [start, stop) that a condition may skip, in order

    def weights(self, dynamic: tuple[int, ...] = (), skip: tuple[tuple[int, int], ...] = ()) -> np.ndarray:
        """How often each bundle runs in one step of the grid, int [bundles].

        The loop over the grid counts once, and what a condition may skip as run, except the ranges of bundles in skip.
        dynamic gives the trip counts of the loops that have no static one, in order.
        """
        weights, given = np.ones(len(self.used), np.int64), list(dynamic)
        for loop in sorted(self.loops, key=lambda loop: loop.start):
            if loop.is_grid:
                continue
            if (trips := loop.trips) is None:
                if not given:
                    at = f"{loop.start}..{loop.stop}"
                    raise ValueError(f"{self.name}: the loop over bundles {at} has no static trip count")
                trips = given.pop(0)
            weights[loop.start : loop.stop] *= trips
        for start, stop in skip:
            weights[start:stop] = 0
        return weights

    def bundles(self, **how) -> int:
        """Bundles of one step of the grid, those of loops times their trip count; how as in `weights`."""
        return int(self.weights(**how).sum())

    def slots(self, unit: str, **how) -> int:
        """Slots of a unit used in one step of the grid."""
        return int(self.weights(**how) @ self.used[:, self.units.index(unit)])

    def share(self, unit: str, **how) -> float:
        """Used slots over all slots of that unit."""
        return self.slots(unit, **how) / (self.bundles(**how) * self.capacity[self.units.index(unit)])

    def conditions(self, least: int = 150) -> list[tuple[int, int]]:
        """The innermost ranges of at least so many bundles that a condition may skip, in order."""
        ranges = [(a, b) for a, b in self.branches if b - a >= least]
        return [r for r in ranges if not any(o != r and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]

    def report(self, **how) -> dict[str, Any]:
        shares = {unit: round(self.share(unit, **how), 3) for unit in self.units}
        return {"bundles": self.bundles(**how), "slots": shares}


KERNELS = Path(__file__).parent.parent / "jaxlm" / "kernels"


@functools.cache
def source_hash(*modules: str) -> str:
    """Of the code of these modules of jaxlm/kernels; comments, format and the version of Python do not matter."""
    code = "".join(ast.dump(ast.parse((KERNELS / f"{module}.py").read_text())) for module in modules)
    code = re.sub(r"\w+=(\[\]|Load\(\))|,? ", "", code)  # versions of Python differ in which empty fields are shown
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def schedule(f, *shapes, chip: str = "v6e", kernel: str = "") -> dict[str, Schedule]:
    """The schedule of every Pallas kernel in f whose name contains `kernel`, by name, compiled for one chip.

    f must be picklable: a module's function, or functools.partial of one.
    """
    with tempfile.TemporaryDirectory() as folder:
        job = pickle.dumps((f, shapes, chip))
        # The dump holds every pass of the compiler unless the last ones are asked for by name.
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=(final_bundles|final_hlo).*"
        )
        env = os.environ | {"LIBTPU_INIT_ARGS": flags, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)  # what comes from a cache is not compiled, and dumps nothing
        command = [sys.executable, "-m", "tests.aot"]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, input=job, env=env, cwd=root, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"compiling for {chip} failed:\n{done.stderr.decode()[-6000:]}")
        return read_schedules(Path(folder), kernel)


def read_schedules(folder: Path, kernel: str = "") -> dict[str, Schedule]:
    """The schedules of the kernels in a folder that libtpu dumped into."""
    found = {}
    for usage in sorted(folder.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        match = re.fullmatch(r"\d+-(.+?)(\.\d+)?-\d+-final_hlo-static-per-bundle-utilization\.txt", usage.name)
        assert match, usage.name
        stem = usage.name.rsplit("-final_hlo", 1)[0].rsplit("-", 1)[0]
        (bundles,) = folder.glob(f"{_escape(stem)}-*-final_bundles.txt")
        text = bundles.read_text()
        if kernel in match[1] and "entry bundle" in text and "custom-call" in text:
            found[match[1]] = parse_schedule(match[1], usage.read_text(), text)
    return found


def parse_schedule(name: str, utilization: str, bundles: str) -> Schedule:
    """A Schedule from the two texts that libtpu writes."""
    lines = utilization.splitlines()
    units = tuple(unit.strip() for unit in lines[1].split(","))
    used = np.array([[int(n) for n in line.split()] for line in lines[4:] if line.strip()], np.int64)
    return Schedule(name, units, tuple(map(int, lines[2].split())), used, *parse_branches(bundles))


def parse_branches(text: str) -> tuple[tuple[Loop, ...], tuple[tuple[int, int], ...]]:
    """The loops of a text of bundles: a branch to a region that started before it, up to the region's end; and the
    ranges of bundles that a branch forward skips."""
    bundles = re.split(r"^ *(?=0x[0-9a-f]+ |0 )", text, flags=re.MULTILINE)[1:]
    bundles = [bundle for bundle in bundles if re.match(r"(0x[0-9a-f]+|0) [^:]*: ", bundle)]
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    loops, branches = [], []
    for at, bundle in enumerate(bundles):
        for region in re.findall(r"Start(?:/End empty)? region (\d+)", bundle):
            starts[region] = at
        for region in re.findall(r"End region (\d+)", bundle):
            ends[region] = at
    for at, bundle in enumerate(bundles):
        for region in re.findall(r"sbr\.rel .*?target = \$region(\d+)", bundle):
            start = starts.get(region)
            if start is not None and start > at:
                branches.append((at + 1 + DELAY, start))
            if start is None or start > at or "LB" not in bundles[start].split(":", 1)[0]:
                continue
            stop = max(at, ends.get(region, at)) + 1
            body = bundles[start : at + 1]
            loops.append(Loop(start, stop, _trips(body, bundles), "iteration index" in bundles[start]))
    return tuple(loops), tuple(branches)


def _trips(body: list[str], bundles: list[str]) -> int | None:
    """The trip count of `counter >= limit` with a constant limit, step and start; None if any is not constant."""
    text = "".join(body)
    back = re.search(r"sbr\.rel \(!(%p\w+)\)", body[-1])
    test = back and re.search(rf"{back[1]} = scmp\.ge\.s32\.totalorder (%s\w+), (\d+) /\* loop exit test", text)
    if not test:
        return None
    counter, limit = test[1], test[2]
    step = re.search(rf"{counter} = sadd\.s32 (\d+), (%s\w+)", text)
    if not step:
        return None
    phi = re.search(rf"{step[2]} = sphi (%?\w+), {counter}\b", text)
    start = _constant(phi[1], bundles) if phi else None
    return None if start is None else -(-(int(limit) - start) // int(step[1]))


def _constant(name: str, bundles: list[str]) -> int | None:
    if name.isdigit():
        return int(name)
    made = re.search(rf"{name} = smov (\w+)", "".join(bundles))
    return int(made[1]) if made and made[1].isdigit() else None


def _escape(stem: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", stem)


def _child() -> None:
    f, shapes, chip = pickle.load(sys.stdin.buffer)
    compile_tpu(f, *shapes, chip=chip)


if __name__ == "__main__":
    _child()
