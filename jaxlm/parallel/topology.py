"""Chips and the ways they are wired: what a plan needs to know of machines that are not there.

libtpu, the compiler for TPUs, is no dependency: it is loaded when devices of a topology are first asked for.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX shows it. hbm: bytes that programs may use; flops: dense bfloat16 a second; link: bytes a
    second through one link in one direction; links: how many."""

    name: str
    hbm: int
    flops: float
    hbm_bandwidth: float
    link: float
    links: int
    dims: int = 0  # of the torus; 0 for GPUs, which all reach each other
    wraps: int = 0  # a dimension that is a multiple of this has links around its ends
    cores: int = 1  # devices a chip

    @property
    def is_tpu(self) -> bool:
        return self.dims > 0

    @property
    def bandwidth(self) -> float:
        """Bytes a second into the device with all links in use."""
        return self.link * self.links


# TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x (memory, FLOP/s, HBM); links one way from "How To Scale Your
# Model", section 2 (jax-ml.github.io/scaling-book). hbm is what libtpu's compiler lets a program have. GPUs: NVIDIA's
# data sheets of A100 80GB SXM, H100 SXM, H200 SXM; NVLink's bandwidth in one direction. A device of tpu7x is a half of
# its chip.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 275e12, 1.228e12, 45e9, 6, dims=3, wraps=4),
        Chip("v5e", int(15.75 * GIB), 197e12, 0.819e12, 45e9, 4, dims=2, wraps=16),
        Chip("v5p", int(95.74 * GIB), 459e12, 2.765e12, 90e9, 6, dims=3, wraps=4),
        Chip("v6e", int(31.25 * GIB), 918e12, 1.638e12, 90e9, 4, dims=2, wraps=16),
        Chip("tpu7x", int(94.75 * GIB), 1153.5e12, 3.69e12, 90e9, 3, dims=3, wraps=4, cores=2),
        Chip("a100", 80 * 10**9, 312e12, 2.039e12, 300e9, 1),
        Chip("h100", 80 * 10**9, 989e12, 3.35e12, 450e9, 1),
        Chip("h200", 141 * 10**9, 989e12, 4.8e12, 450e9, 1),
    )
}
INSTALL = (
    "plans for TPUs need libtpu, their compiler (Linux x86_64): pip install 'jaxlm[tpu]', or --estimate without it"
)
# Before libtpu loads: without these it asks a metadata server for a TPU, or locks other processes out.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind; shape is the torus of TPUs, (count,) of GPUs."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        """How many devices."""
        return math.prod(self.shape) * self.chip.cores

    def devices(self) -> Any:
        """Compile-only devices of a TPU topology; ValueError without libtpu, and for what cannot be wired."""
        if not self.chip.is_tpu:
            raise ValueError(f"{self}: there are compile-only devices of TPUs alone")
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError(INSTALL)
        prepare_environment()
        from jax.experimental import topologies

        # Links around the ends decide which collectives the compiler makes: without them it turns all-gathers over a
        # whole torus into all-reduces.
        shape = self.shape + (1,) * (3 - len(self.shape))
        around = tuple(n % self.chip.wraps == 0 for n in shape)
        options: dict[str, Any] = {"wrap": around} if any(around) else {}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options).devices
        except Exception as problem:
            raise ValueError(f"topology {str(self)!r}: {str(problem).splitlines()[0]}") from problem


def parse_topology(text: str) -> Topology:
    """ "v5p:4x4x4" or "h100:8" as a Topology; ValueError for an unknown chip or shape."""
    name, colon, rest = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"topology {text!r}: unknown chip {name!r}{hint}; there are {', '.join(CHIPS)}")
    chip, parts = CHIPS[name], rest.split("x")
    wanted = {0: "a count, as in h100:8", 2: "two dimensions, as in v5e:4x4", 3: "three dimensions, as in v5p:4x4x4"}
    if not colon or len(parts) != max(1, chip.dims) or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"topology {text!r}: {name} has {wanted[chip.dims]}")
    return Topology(chip, tuple(map(int, parts)))


def prepare_environment() -> None:
    """Settings that libtpu reads when it loads, where they are not made."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
