"""Floating-point operations of a function, from its jaxpr: XLA's own count takes the body of a loop once."""

import dataclasses
import math
from typing import Any

import jax
from jax.extend import core
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of matrix products, and of kernels as they state it, over all devices; unknown: while loops, counted once."""

    products: float = 0.0
    kernels: float = 0.0
    unknown: int = 0

    @property
    def total(self) -> float:
        return self.products + self.kernels

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.products + other.products, self.kernels + other.kernels, self.unknown + other.unknown)

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.products * times, self.kernels * times, self.unknown)


def count_flops(jaxpr: Any) -> Flops:
    """Of a (closed) jaxpr: products, 2 a multiplication and addition; a scan's body times its length, what is computed
    again because of remat as often as it is; the most expensive branch of a cond. Elementwise work is left out."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    total = Flops()
    for eqn in jaxpr.eqns:
        total += _equation(eqn)
    return total


def _equation(eqn: Any) -> Flops:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return Flops(2 * _dot(eqn))
    if name == "conv_general_dilated":
        kernel, out = eqn.invars[1].aval, eqn.outvars[0].aval
        features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return Flops(2 * out.size * kernel.size / features)
    if name in ("ragged_dot", "ragged_dot_general"):
        return Flops(2 * _ragged(eqn))
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        return Flops(kernels=float(estimate.flops)) if estimate is not None else Flops(unknown=1)
    inner = [count_flops(j) for j in _jaxprs(params)]
    if name == "cond":
        return max(inner, key=lambda f: f.total)
    if name == "while":
        return sum(inner, Flops(unknown=1))
    total = sum(inner, Flops())
    if name == "scan":
        return total * params["length"]
    if name == "shard_map":
        return total * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs within an equation; of a function with its own derivative only what runs."""
    found = []
    for name, value in params.items():
        if name in ("jvp_jaxpr_thunk", "jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.Jaxpr | core.ClosedJaxpr):
                found.append(one)
    return found


def _dot(eqn: Any) -> float:
    """Multiplications of a dot_general: every element of the result sums over the contracted axes."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return float(out.size * math.prod(lhs.shape[i] for i in contracted))


def _ragged(eqn: Any) -> float:
    """Each row meets the one matrix of its group: [M, K] x [E, K, N] is M K N, whatever the number of groups. The
    gradient of the matrices, [M, K] x [M, N] -> [E, K, N], is as much."""
    lhs, rhs, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    m = lhs.shape[0]
    if rhs.ndim == 3 and lhs.ndim == 2:
        return float(m * rhs.shape[1] * rhs.shape[2])
    return float(m * math.prod(out.shape[1:]))


def flops_of(function: Any, *args: Any) -> Flops:
    """Of a function of these abstract arguments on one TPU, whose kernels state what they do; nothing is compiled."""
    device = AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=device)):
        return count_flops(jax.make_jaxpr(function)(*args))
