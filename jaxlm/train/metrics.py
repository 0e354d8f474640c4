"""Where a run's numbers go: JSON lines, TensorBoard, wandb or trackio, and a picture of the loss."""

import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Dense bfloat16 FLOP/s of one device, as its maker states them.
PEAK = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}  # fmt: skip


class Sink(Protocol):
    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Jsonl:
    """One object a line, {"step", "time", ...}; appended to, and written through at once."""

    def __init__(self, file: Path):
        self._file = file.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    def __init__(self, directory: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Tracker:
    """wandb or trackio, which share their calls."""

    def __init__(self, module: Any, name: str, settings: Mapping[str, Any]):
        self._module = module
        module.init(project="jaxlm", name=name, config=dict(settings))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


REPORTS = ("jsonl", "tensorboard", "wandb", "trackio")


def sinks(names: Sequence[str], directory: Path, settings: Mapping[str, Any]) -> list[Sink]:
    """The sinks by name; one whose library is missing is a ValueError that says how to get it."""
    made: list[Sink] = []
    for name in names:
        if name not in REPORTS:
            raise ValueError(f"report {name!r}: expected some of {', '.join(REPORTS)}")
        if name in ("wandb", "trackio"):
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"report {name!r} needs a package that is not installed: pip install {name}")
            made.append(Tracker(importlib.import_module(name), directory.name, settings))
        else:
            made.append(
                Jsonl(directory / "metrics.jsonl") if name == "jsonl" else TensorBoard(directory / "tensorboard")
            )
    return made


def flops_per_token(n_params: int, n_embedding: int, layers: int, width: int, length: int) -> float:
    """Of a training step, forward and backward: 6 a parameter that multiplies (the input embedding does not), and 12 a
    layer with attention, position and feature for attention over the whole length (PaLM, appendix B). What a recurrence
    does with its state, a few per cent of its layer's products, is not counted."""
    return 6 * (n_params - n_embedding) + 12 * layers * width * length


def utilization(tokens_per_second: float, flops: float, remat: str, kind: str, devices: int) -> dict[str, float]:
    """mfu: model FLOPs a second over the devices' peak; hfu counts what `full` remat computes again, too: a third.

    Empty where the device's peak is not known.
    """
    peak = next((p for name, p in sorted(PEAK.items(), key=lambda x: -len(x[0])) if kind.startswith(name)), None)
    if peak is None:
        return {}
    mfu = tokens_per_second * flops / (peak * devices)
    return {"mfu": mfu, "hfu": mfu * (4 / 3 if remat == "full" else 1)}


def forget(file: Path, step: int) -> None:
    """Drops the lines after a step, which a resumed run writes again, and one that a kill cut short."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            known = json.loads(line)["step"] <= step
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        kept += [line + "\n"] * known
    partial = file.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(file)


def plot(file: Path, picture: Path) -> None:
    """The losses of a metrics.jsonl as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name in ("loss", "eval_loss"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
