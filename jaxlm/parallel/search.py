"""The cheapest way to spread a run that fits: presets and remat policies, from fast to slow."""

import itertools
from collections.abc import Callable, Iterable, Iterator

from jaxlm.parallel.plan import Plan

Choice = tuple[str, str]  # preset, remat policy
REMAT = ("none", "dots", "full")


def choices(devices: int, heads: int, batch: int, policies: Iterable[str] = REMAT) -> list[Choice]:
    """Presets over all devices, each with the remat policies: data alone, fsdp within data, fsdp, fsdp with tensor.

    tensor goes up to 8 and divides the heads; the rest divides the batch.
    """
    powers = [2**i for i in range(devices.bit_length()) if devices % 2**i == 0]
    presets: list[dict[str, int]] = []
    for tensor, data in itertools.product(powers, powers):
        rest = devices // tensor
        if tensor <= 8 and heads % tensor == 0 and rest % data == 0 and batch % rest == 0:
            presets.append({"data": data, "fsdp": rest // data, "tensor": tensor})
    words = lambda sizes: ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "data=1"
    return [(words(preset), policy) for preset in presets for policy in policies]


def cheapest(
    ranked: Iterable[Choice],
    compile: Callable[[Choice], Plan],
    limit: int,
    tell: Callable[[int, Choice], None] = lambda n, choice: None,
) -> tuple[Plan | None, list[tuple[Choice, Plan]]]:
    """The first choice that compiles and fits, after at most `limit` compilations, and all that were tried."""
    tried: list[tuple[Choice, Plan]] = []
    for n, choice in enumerate(itertools.islice(ranked, limit)):
        tell(n, choice)
        plan = compile(choice)
        tried.append((choice, plan))
        if plan.fits:
            return plan, tried
    return None, tried


def rank(options: Iterable[Choice], estimate: Callable[[Choice], Plan], slack: float = 1.0) -> Iterator[Choice]:
    """The choices whose estimate fits the memory, `slack` times it, by their estimated time."""
    judged = [(choice, estimate(choice)) for choice in options]
    fitting = [
        (plan.times.worst, i, choice)
        for i, (choice, plan) in enumerate(judged)
        if plan.peak is not None and plan.peak <= slack * plan.topology.chip.hbm
    ]
    return iter([choice for *_, choice in sorted(fitting)])
