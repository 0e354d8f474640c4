"""The settings of a run: one frozen dataclass, read from YAML or the command line by the same names."""

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.models.decoder import REMAT
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.schedules import Schedule

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What is learnt. train and eval: caches of `jaxlm prepare`, or sources, which are then prepared with `format`
    under the run's directory. batch_size counts rows of a micro-batch over all hosts."""

    train: str
    eval: str | None = None
    format: str = "text"
    seq_len: int = 1024
    batch_size: int = 8
    mode: str = "pack"  # pack, pad or bucket
    long: str = "split"  # examples longer than seq_len: split, truncate or drop
    buckets: tuple[int, ...] = ()
    max_bad_rows: float = 0.0
    fim_rate: float = 0.0  # fill-in-the-middle, with the tokenizer's own tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its schedule; warmup and decay_steps below 1 are shares of all steps."""

    name: str = "adamw"
    rate: float = 5e-5
    schedule: str = "linear"
    warmup: float = 0.0
    end: float = 0.0
    cycles: float | None = None
    power: float = 1.0
    decay_steps: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    clip: float = 1.0  # greatest global norm of the gradient; 0 for no limit
    rates: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)  # pattern of paths -> factor
    plateau_patience: int = 2  # reduce_on_plateau: evaluations without progress before the rate falls
    plateau_factor: float = 0.1

    def make(self, steps: int) -> Optimizer:
        count = lambda n: math.ceil(n * steps) if n < 1 else int(n)
        schedule = Schedule(
            name=self.schedule, steps=steps, warmup=count(self.warmup), cycles=self.cycles, power=self.power,
            end=self.end, decay=count(self.decay_steps),
        )  # fmt: skip
        return Optimizer(
            name=self.name, rate=self.rate, schedule=schedule, decay=self.weight_decay, beta1=self.beta1,
            beta2=self.beta2, eps=self.eps, momentum=self.momentum, rates=tuple(self.rates.items()),
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """The objective beside its data."""

    smoothing: float = 0.0
    z: float = 0.0
    neftune: float = 0.0
    router: float | None = None  # None: the checkpoint's router_aux_loss_coef
    chunk: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run. Steps are optimizer updates, each over `accumulate` micro-batches; intervals count them.

    model: a checkpoint, or a config.json to begin from scratch with (then `tokenizer` says whose). steps: 0 for
    `epochs` over the data. eval_every, save_every: 0 for the end only. keep: checkpoints beside the best one.
    patience: evaluations without progress before the run stops, 0 for never. zero: what the mesh's axis data cuts: 1
    the optimizer's moments, 2 gradients too, 3 parameters too. offload: "optimizer" (its moments) and "params", kept in
    host memory between updates. reduce_dtype: in which the layers' gradients are summed over devices. adapter: {"kind":
    "lora", "prefix" or "prompt"} and the settings of that method; then nothing else trains, and the adapter is exported
    beside the model. attention: an implementation, None to choose; over a mesh's axis sequence that is "ring" or
    "all_to_all". microbatches: how many a pipeline over the axis pipe makes of its rows, 0 to choose. pipe_repeats: how
    often these go round its stages; above 1 idles less, and moves the weights over the links (parallel/pipeline.py).
    expert_capacity: rows that an expert takes, as a multiple of an even share, the rest is dropped and counted; 0 drops
    nothing.
    """

    model: str
    out: str
    data: Data
    tokenizer: str | None = None
    optim: Optim = Optim()
    loss: Loss = Loss()
    trainable: tuple[str, ...] = ("*",)
    adapter: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    mesh: str | None = None
    zero: int = 0
    offload: tuple[str, ...] = ()
    precision: str = "float32"
    reduce_dtype: str = "float32"
    remat: str = "none"
    attention: str | None = None
    microbatches: int = 0
    pipe_repeats: int = 1
    expert_capacity: float = 0.0
    accumulate: int = 1
    steps: int = 0
    epochs: float = 1.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int = 0  # 0 for all
    save_every: int = 0
    keep: int = 2
    patience: int = 0
    min_delta: float = 0.0
    resume: bool = True
    report: tuple[str, ...] = ("jsonl", "tensorboard")
    export: str = "last"  # which checkpoint becomes the model: the last, or the best by evaluation
    profile: tuple[int, int] | None = None  # the first and the last step of which a trace is kept
    ignore_fields: tuple[str, ...] = ()

    def __post_init__(self):
        choices = {"precision": PRECISIONS, "remat": tuple(REMAT), "reduce_dtype": PRECISIONS[:2], "zero": range(4)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(str, allowed))}")
        if unknown := set(self.offload) - {"optimizer", "params"}:
            raise ValueError(f"offload: unknown {', '.join(sorted(unknown))}; there are optimizer and params")
        if self.reduce_dtype != "float32" and self.reduce_dtype != self.precision:
            raise ValueError(f"reduce_dtype={self.reduce_dtype!r} is for precision={self.reduce_dtype!r}")
        if self.zero and self.mesh is None:
            raise ValueError(f"zero={self.zero} cuts over the mesh's axis data, and there is no mesh")
        for name in ("accumulate", "log_every", "keep", "pipe_repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        counts = ("steps", "eval_every", "save_every", "eval_batches", "patience", "microbatches", "expert_capacity")
        for name in counts:
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or more")
        if not self.steps and not self.epochs > 0:
            raise ValueError(f"steps={self.steps} epochs={self.epochs}: expected one of them above 0")
        if self.patience and not (self.data.eval and self.eval_every):
            raise ValueError("patience needs data.eval and eval_every: there is nothing to be patient about")
        if self.optim.schedule == "reduce_on_plateau" and not (self.data.eval and self.eval_every):
            raise ValueError("optim.schedule=reduce_on_plateau needs data.eval and eval_every")
        if not self.data.eval:
            for name in ("eval_every", "eval_batches", "min_delta"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)} needs data.eval: there is nothing to evaluate")
        for name in ("plateau_patience", "plateau_factor"):
            if getattr(self.optim, name) != getattr(Optim, name) and self.optim.schedule != "reduce_on_plateau":
                raise ValueError(f"optim.{name} is for schedule reduce_on_plateau, not {self.optim.schedule}")
        if self.export not in ("last", "best") or (self.export == "best" and not self.data.eval):
            raise ValueError(f"export={self.export!r}: expected last, or with data.eval best")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile={list(self.profile)}: expected the first and the last step, from 1")
        if self.adapter is not None and self.optim.name == "muon":
            raise ValueError("optim.name=muon is for the matrices of layers, and an adapter trains none of them")
        if self.optim.clip < 0:
            raise ValueError(f"optim.clip={self.optim.clip}: expected 0 (no limit) or more")


def read(file: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of a YAML file, with overrides such as "optim.rate=1e-4"."""
    import yaml

    try:
        value = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        for override in overrides:
            name, equals, given = override.partition("=")
            if not equals or not isinstance(value, dict):
                raise ValueError(f"{override!r}: expected NAME=VALUE, as in optim.rate=1e-4")
            *parents, last = name.split(".")
            node = value
            for parent in parents:
                node = node.setdefault(parent, {})
                if not isinstance(node, dict):
                    raise ValueError(f"{override!r}: {parent} is no group of settings")
            node[last] = yaml.safe_load(given)
    except yaml.YAMLError as problem:
        raise ValueError(f"{file}: {problem}") from problem
    return parse(TrainConfig, value, str(file))


def parse(kind: Any, value: Any, where: str) -> Any:
    """Plain values as the dataclass `kind`, by name and type; ValueError naming what is unknown, missing or wrong."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected names and values, found {type(value).__name__}")
    hints, fields = typing.get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, 1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown setting {name!r}{hint}; there are {', '.join(fields)}")
    none = dataclasses.MISSING
    required = [name for name, f in fields.items() if f.default is none and f.default_factory is none]
    if missing := [name for name in required if name not in value]:
        raise ValueError(f"{where}: {', '.join(missing)} must be given")
    return kind(**{name: _value(hints[name], given, f"{where}: {name}") for name, given in value.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """A value checked against its annotation; numbers such as 1e-4, which YAML reads as text, are numbers."""
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in parts:
            return None
        *others, last = (part for part in parts if part is not type(None))
        for part in others:
            with contextlib.suppress(ValueError):
                return _value(part, value, where)
        return _value(last, value, where)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or (parts[-1] is not Ellipsis and len(items) != len(parts)):
            raise ValueError(f"{where}={value!r}: expected a list")
        kinds = [parts[0]] * len(items) if parts[-1] is Ellipsis else parts
        return tuple(_value(kind, item, where) for kind, item in zip(kinds, items, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r}: expected names and values")
        return {str(k): v if parts[1] is Any else _value(parts[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is not hint:
        raise ValueError(f"{where}={value!r}: expected {hint.__name__}, found {type(value).__name__}")
    return value


def plain(config: Any) -> dict[str, Any]:
    """The settings as YAML and JSON can hold them."""
    listed = lambda v: [listed(x) for x in v] if isinstance(v, tuple | list) else v
    return {
        name: plain(v) if dataclasses.is_dataclass(v) else listed(v)
        for name, v in ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    }
