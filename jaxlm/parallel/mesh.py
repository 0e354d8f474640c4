"""Device meshes from preset strings such as "fsdp=4,tensor=2"."""

import contextlib
import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ("data", "fsdp", "tensor", "sequence", "expert", "pipe")


def parse_preset(preset: str) -> dict[str, int]:
    """{axis: size} of a preset; ValueError for what is no axis, no size, or said twice."""
    sizes: dict[str, int] = {}
    for part in preset.split(","):
        name, equals, size = part.strip().partition("=")
        if name not in AXES:
            near = difflib.get_close_matches(name, AXES, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"mesh {preset!r}: unknown axis {name!r}{hint}; there are {', '.join(AXES)}")
        if not equals or not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh {preset!r}: expected {name}=SIZE with a whole number above 0, got {part!r}")
        if name in sizes:
            raise ValueError(f"mesh {preset!r}: {name} is given twice")
        sizes[name] = int(size)
    return sizes


@contextlib.contextmanager
def within(mesh: Mesh | None) -> Iterator[None]:
    """The mesh in force, so that what is computed is laid out over it; nothing without one, or where it is already."""
    if mesh is None or jax.sharding.get_abstract_mesh() == mesh.abstract_mesh:
        yield
        return
    with jax.set_mesh(mesh):
        yield


def make_mesh(preset: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all of AXES, those not named of size 1; ValueError when the sizes do not use every device."""
    sizes = parse_preset(preset)
    devices = jax.devices() if devices is None else list(devices)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh {preset!r} is for {math.prod(shape)} devices; there are {len(devices)}")
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # no axes of a TPU's torus have these sizes: cut them, as expert=8 needs of 4 x 4 x 4
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(laid, AXES, axis_types=types)


def abstract_mesh(preset: str) -> AbstractMesh:
    """The mesh of a preset without its devices, of which this machine may have none: shardings follow from it."""
    sizes = parse_preset(preset)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))
