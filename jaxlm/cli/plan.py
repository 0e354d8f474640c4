"""`jaxlm plan`: what a run takes of machines that are not here."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxlm.cli.console import IgnoreFields, Option, count, err, facts, out, size, table

Remat = Literal["none", "dots", "full"]
Precision = Literal["float32", "bfloat16", "float16"]
PlanSource = Annotated[
    str, tyro.conf.arg(metavar="SOURCE", help="a config.json, or a checkpoint: directory, .gguf file, org/name")
]


def plan(
    source: PlanSource,
    /,
    *,
    topology: Annotated[str, Option(metavar="CHIP:SHAPE", help="v4, v5e, v5p, v6e, tpu7x; a100, h100, h200")],
    mesh: Annotated[str | None, Option(metavar="PRESET", help="as in fsdp=16,tensor=4; default fsdp over all")] = None,
    batch: Annotated[int | None, Option(metavar="N", help="rows over all devices; default one for each")] = None,
    seq: Annotated[int, Option(help="tokens a row")] = 8192,
    train: Annotated[bool, Option(help="a training step, which is the default")] = False,
    serve: Annotated[bool, Option(help="a prefill and a decoding step instead")] = False,
    remat: Annotated[Remat, Option(help="what the backward pass computes again")] = "full",
    precision: Annotated[Precision, Option(help="of the computation; of weights and cache too, with --serve")] = (
        "bfloat16"
    ),
    optimizer: Annotated[str, Option(help="as in a training run's settings")] = "adamw",
    microbatches: Annotated[int, Option(help="of a pipeline, over pipe in the mesh; 0 to choose")] = 0,
    pipe_repeats: Annotated[int, Option(help="how often they go round its stages")] = 1,
    auto: Annotated[bool, Option(help="look for the fastest preset and remat policy that fit")] = False,
    tries: Annotated[int, Option(help="compilations that --auto may make")] = 6,
    estimate: Annotated[bool, Option(help="by formulas, without compiling")] = False,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Says whether a run fits a machine, and what it takes: memory, collectives, FLOPs, time.

    Compiles the real training step for a TPU topology, without one, from a config alone; of GPUs it estimates. Exit
    code 1: it does not fit.

    Example: jaxlm plan config.json --topology v5p:4x4x4 --mesh fsdp=64 --batch 64 --seq 8192
    """
    from jaxlm.models.registry import family
    from jaxlm.parallel.mesh import parse_preset
    from jaxlm.parallel.topology import parse_topology

    if train and serve:
        raise ValueError("--train and --serve: expected one of them")
    where = parse_topology(topology)
    model_type, hf_config = read_config(source)
    fam = family(model_type)
    wanted = Wanted(
        fam, fam.config(hf_config, ignore_fields), where, mesh or f"fsdp={where.size}", batch or where.size, seq,
        serve, remat, precision, optimizer, microbatches, pipe_repeats,
    )  # fmt: skip
    if auto and serve:
        raise ValueError("--auto chooses how to train; with --serve give a mesh")
    if not where.chip.is_tpu and not estimate:
        err.print(f"{where.chip.name}: an estimate, as only TPUs can be compiled for")
        estimate = True
    no_pipeline = serve or estimate or auto or parse_preset(wanted.mesh).get("pipe", 1) == 1
    if no_pipeline and (microbatches, pipe_repeats) != (0, 1):
        raise ValueError("--microbatches, --pipe-repeats: of a pipeline that trains on TPUs, over pipe=N in --mesh")
    if auto:
        return _auto(wanted, tries, estimate)
    plans = wanted.estimates() if estimate else wanted.compiled()
    for one in plans:
        show(one, wanted)
    if estimate and not serve:
        zero_table(wanted)
    return 0 if all(one.fits for one in plans) else 1


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What was asked for."""

    family: Any
    config: Any
    topology: Any
    mesh: str
    batch: int
    seq: int
    serve: bool
    remat: str
    precision: str
    optimizer: str
    microbatches: int = 0
    repeats: int = 1

    def programs(self) -> list[Any]:
        """Functions from a mesh to a program."""
        shared = {"family": self.family, "config": self.config, "batch": self.batch, "seq": self.seq}
        if self.serve:
            from jaxlm.generation.program import Serving

            serving = Serving(**shared, precision=self.precision)
            return [serving.prefill, serving.decode]
        return [self.training().program]

    def training(self) -> Any:
        from jaxlm.train.program import Training

        return Training(
            family=self.family, config=self.config, batch=self.batch, seq=self.seq, remat=self.remat,
            precision=self.precision, optimizer=self.optimizer, microbatches=self.microbatches, repeats=self.repeats,
        )  # fmt: skip

    def compiled(self) -> list[Any]:
        from jaxlm.parallel.plan import compile_plan

        return [compile_plan(make, self.topology, self.mesh) for make in self.programs()]

    def estimates(self, activations: float | None = None) -> list[Any]:
        from jaxlm.parallel.estimate import estimate_plan

        if activations is None:
            activations = 0.0 if self.serve else self.training().activations()
        how: Any = {
            "activations": activations,
            "rows": self.batch,
            "width": self.config.d_model,
            "layers": len(self.config.kinds),
            "remat": None if self.serve else self.remat,
        }
        return [estimate_plan(make, self.topology, self.mesh, **how) for make in self.programs()]


def read_config(source: str) -> tuple[str, dict[str, Any]]:
    """The architecture and the config.json of a source; of a repository on the hub nothing else is downloaded."""
    from jaxlm.checkpoints import files
    from jaxlm.opening import on_hub, open_checkpoint

    if on_hub(source):
        from huggingface_hub import hf_hub_download

        source = hf_hub_download(source, files.CONFIG)
    if source.endswith(".json"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source}: no such config.json")
        found = files.read_json(Path(source))
        if not isinstance(found.get("model_type"), str):
            raise ValueError(f"{source} has no 'model_type', which names the architecture")
        return found["model_type"], found
    opened = open_checkpoint(source)
    return opened.model_type, opened.hf_config


def show(one: Any, wanted: Wanted) -> None:
    """Prints a plan."""
    chip = one.topology.chip
    answer = "fits" if one.fits else "DOES NOT FIT"
    used = f"{size(one.peak)} of {size(chip.hbm)}" if one.peak is not None else size(chip.hbm)
    how = "estimate, nothing was compiled" if one.is_estimate else f"compiled in {one.compile_seconds:.0f} s"
    kinds = "; ".join(f"{name} {size(n)}" for name, n in one.bytes.items())
    low, high = one.mfu
    rows = [
        ("program", f"{one.name}, {wanted.batch} x {wanted.seq:,} tokens, {wanted.precision}"
                    + ("" if wanted.serve else f", remat {wanted.remat}")),
        ("devices", f"{one.topology.size} x {chip.name}, mesh {one.preset}"),
        ("answer", f"{answer}: {used} a device ({how})"),
        *([("because", one.why)] if one.why else []),
        ("arguments", f"{size(one.arguments)}: {kinds}"),
    ]  # fmt: skip
    if not wanted.serve:
        rows.append(("gradients", f"{size(one.bytes['parameters'])} in float32, among the temporaries"))
    if one.temporaries is not None:
        rows.append(("temporaries", size(one.temporaries)))
    kernels = f", {one.flops.kernels:.3g} of them in kernels" if one.flops.kernels else ""
    rows += [
        ("FLOPs", f"{one.flops.total:.4g} a device{kernels}"),
        ("time", f"{_seconds(one.times.best)} to {_seconds(one.times.worst)}: products {_seconds(one.times.compute)}, "
                 f"memory {_seconds(one.times.memory)}, network {_seconds(one.times.network)}"),
        ("MFU", f"{low:.0%} to {high:.0%}; {one.tokens / one.times.worst:,.0f} to {one.tokens / one.times.best:,.0f} "
                "tokens a second"),
        ("assumed", f"{chip.flops / 1e12:g} TFLOP/s, HBM {chip.hbm_bandwidth / 1e9:,.0f} GB/s (arguments read and "
                    f"written once), {chip.links} x {chip.link / 1e9:g} GB/s links; everything at its peak, overlapped "
                    "fully or not at all"),
    ]  # fmt: skip
    out.print(facts(rows), highlight=False)
    if one.collectives:
        made = table("collective", "over", ">operations", ">runs", ">bytes into a device")
        for t in one.collectives:
            made.add_row(t.kind, ",".join(t.axes), str(t.count), f"{t.runs:,}", size(int(t.moved)))
        out.print()
        out.print(made, highlight=False)
    out.print()


def zero_table(wanted: Wanted) -> None:
    """What ZeRO 2 and 3 with mixed precision would hold on hosts and devices, with and without offload."""
    from jaxlm.api import parameter_shapes
    from jaxlm.parallel.estimate import largest_layer, zero2, zero3

    shapes = parameter_shapes(wanted.family, wanted.config)
    total, largest = sum(map(math.prod, shapes.values())), largest_layer(shapes)
    made = table("ZeRO", ">host", ">device", "offloaded", "parameters made")
    n = wanted.topology.size
    for stage, rows in ((3, zero3(total, largest, n)), (2, zero2(total, n))):
        for row in rows:
            words = ["parameters"] * row.offload_params + ["optimizer"] * row.offload_optimizer
            init = "in shards" if row.sharded_init else "on the host"
            made.add_row(
                str(stage), f"{row.host / 2**30:.2f} GB", f"{row.device / 2**30:.2f} GB",
                " and ".join(words) or "nothing", init if stage == 3 else "",
            )  # fmt: skip
    out.print(f"States with Adam in mixed precision, {count(total)} parameters on one host of {n} devices (GB = 2^30):")
    out.print(made, highlight=False)


def _auto(wanted: Wanted, tries: int, estimate: bool) -> int:
    """Proposes the cheapest preset and policy that fit."""
    from jaxlm.parallel.search import cheapest, choices, rank

    kept: dict[str, float] = {}

    def judged(choice: tuple[str, str]) -> Any:
        preset, policy = choice
        one = dataclasses.replace(wanted, mesh=preset, remat=policy)
        if policy not in kept:
            kept[policy] = one.training().activations()
        return one.estimates(kept[policy])[0]

    def tell(n: int, choice: tuple[str, str]) -> None:
        err.print(f"trying {n + 1} of at most {tries}: mesh {choice[0]}, remat {choice[1]}", highlight=False)

    options = choices(wanted.topology.size, wanted.config.shared_heads, wanted.batch)
    if not options:
        raise ValueError(f"batch {wanted.batch} divides over no preset of {wanted.topology.size} devices")
    err.print(f"estimating {len(options)} ways", highlight=False)
    compile = lambda c: judged(c) if estimate else dataclasses.replace(wanted, mesh=c[0], remat=c[1]).compiled()[0]
    found, tried = cheapest(rank(options, judged), compile, tries, tell)
    if found is None:
        reasons = _reasons((f"{c[0]}, remat {c[1]}", p.why) for c, p in tried)
        out.print(f"nothing fits {wanted.topology}{reasons}", highlight=False)
        return 1
    (preset, policy), _ = tried[-1]
    out.print(f"--mesh {preset} --remat {policy}", highlight=False)
    show(found, dataclasses.replace(wanted, mesh=preset, remat=policy))
    return 0


def _reasons(tried: Iterable[tuple[str, str | None]]) -> str:
    return "".join(f"\n  {what}: {why}" for what, why in tried) or ": the arguments alone are too large"


def _seconds(s: float) -> str:
    return f"{s:.3g} s" if s >= 1 else f"{1000 * s:.3g} ms"
