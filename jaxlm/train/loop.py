"""The loop: steps, logging, evaluation, checkpoints; ended by its last step, by patience, a callback or SIGTERM."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxlm.checkpoints.files import CONFIG, GENERATION, write_json
from jaxlm.checkpoints.run import CHECKPOINTS, SETTINGS
from jaxlm.parallel import hosts
from jaxlm.parallel.plan import local_bytes, out_of_memory
from jaxlm.train.adapters import Lora
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.config import plain
from jaxlm.train.metrics import Sink, forget, plot, sinks, utilization
from jaxlm.train.placement import place_batch, within
from jaxlm.train.setup import Job
from jaxlm.train.step import TrainState, make_eval_step, make_train_step, on_device

FINAL, ADAPTER = "model", "adapter"


class Callback(Protocol):
    """What may be told of a run; everything is a Python number by then, and nothing waits for the device.

    `run.stop("why")` ends it after the present step; with several processes all must say so, at the same step.
    """

    def on_log(self, run: "Run", step: int, values: dict[str, float]) -> None: ...

    def on_evaluate(self, run: "Run", step: int, values: dict[str, float]) -> None: ...

    def on_save(self, run: "Run", step: int) -> None: ...

    def on_end(self, run: "Run", result: "Result") -> None: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. model: the directory of the exported model, None for an interrupted run."""

    step: int
    ended: str  # "done", "patience", "SIGTERM", or what a callback said
    loss: float
    eval_loss: float | None
    best_step: int | None
    model: Path | None


@dataclasses.dataclass
class _Memory:
    """What a run remembers beside its state; saved with every checkpoint."""

    best: float = math.inf
    best_step: int | None = None
    without_progress: int = 0
    plateau: int = 0
    tokens: float = 0.0
    loss: float = math.nan
    eval_loss: float | None = None
    eval_step: int = -1


class Run:
    """One training run in its directory; `train` goes on from the latest checkpoint there."""

    def __init__(self, job: Job, callbacks: Sequence[Callback] = (), on_step: Callable[[int, int], None] | None = None):
        self.job, self.callbacks, self.on_step = job, callbacks, on_step
        self.out = Path(job.config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        hosts.wait_for_all("settings checked")
        if hosts.leads():
            self._describe()
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, job.config.keep)
        clip = job.config.optim.clip or None
        step = make_train_step(
            job.loss, job.optimizer, job.settings, clip=clip, shardings=job.shardings, gradients=job.gradients
        )
        self.step_function = within(job.mesh, step)
        self.eval_function = within(job.mesh, make_eval_step(job.loss))
        self.memory = _Memory()
        self._why: str | None = None
        self._window: list[dict[str, jax.Array]] = []  # the metrics of the steps since the last log
        self._tracing = False

    def stop(self, why: str) -> None:
        """Ends the run after the present step."""
        self._why = self._why or why

    def train(self) -> Result:
        """Runs to the end, and exports the model; ValueError when the directory holds another run."""
        config = self.job.config
        state, start = self._begin()
        lines = self.out / "metrics.jsonl"
        if hosts.leads() and lines.is_file():
            forget(lines, start)
        with contextlib.ExitStack() as ending:  # in whatever way the run ends
            self._sinks: list[Sink] = sinks(config.report, self.out, plain(config)) if hosts.leads() else []
            for sink in self._sinks:
                ending.callback(sink.close)
            with self._sigterm():
                state, step = self._steps(state, start)
                if self._why != "SIGTERM" and self.job.eval and self.memory.eval_step != step:
                    state = self._evaluate(state, step)
                self._save(state, step)
                self.checkpoints.wait()
            ended, best = self._why or "done", self.memory.best_step
            if config.export == "best" and ended != "SIGTERM" and best not in (None, step):
                state, _ = self.checkpoints.restore(_emptied(state), best)
            exported = None if ended == "SIGTERM" else self._export(state)
        if hosts.leads() and lines.is_file():
            plot(lines, self.out / "loss.png")
        result = Result(step, ended, self.memory.loss, self.memory.eval_loss, best, exported)
        self._tell("on_end", result)
        self.checkpoints.close()
        return result

    def _begin(self) -> tuple[TrainState, int]:
        """The state to go on from, and its step: the job's own, or the newest checkpoint's.

        ValueError where the data or the number of steps are not those the checkpoint was made with.
        """
        if self.checkpoints.latest is None:
            return self.job.state, 0
        state, about = self.checkpoints.restore(_emptied(self.job.state))
        mine = self._identity()
        if changed := [name for name in mine if about.get(name) != mine[name]]:
            said = ", ".join(f"{name}={mine[name]!r} (was {about.get(name)!r})" for name in changed)
            raise ValueError(f"{self.out} holds a run over other data, which would not go on where it was: {said}")
        self.memory = _Memory(**about["memory"])
        self._be_patient()
        return state, int(state.step)

    def _identity(self) -> dict[str, Any]:
        """What the order of the data and the schedule follow from."""
        return {"steps": self.job.steps, **{f"data.{k}": v for k, v in self.job.train.identity.items()}}

    def _steps(self, state: TrainState, start: int) -> tuple[TrainState, int]:
        config, steps = self.job.config, self.job.steps
        since, step, tokens = time.perf_counter(), start, 0
        batches = self.job.train.iterate(start, stop=steps)
        while step < steps and self._why is None:
            with self._traced(step + 1):
                batch = _split(next(batches), config.accumulate)
                batch = place_batch(batch, self.job.mesh, lead=int(config.accumulate > 1))
                with self._explained(batch):
                    state, metrics = self.step_function(state, batch)
            self._window.append(metrics)
            tokens += batch["tokens"].size
            step += 1
            if hosts.ends(step):
                self.stop("SIGTERM")
            if self.on_step:
                self.on_step(step, steps)
            if step % config.log_every == 0 or step == steps:
                self._log(step, tokens / (time.perf_counter() - since))
                since, tokens = time.perf_counter(), 0
            before = time.perf_counter()
            if self.job.eval and config.eval_every and step % config.eval_every == 0:
                state = self._evaluate(state, step)
            if config.save_every and step % config.save_every == 0:
                self._save(state, step)
            since += time.perf_counter() - before  # a step's speed is not an evaluation's
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
        return state, step

    def _log(self, step: int, tokens_per_second: float) -> None:
        """The only place where a step's numbers are waited for, but for checkpoints."""
        found, self._window = jax.device_get(self._window), []
        weights = np.array([m["weight"] for m in found])
        keep = np.array([m["skipped"] == 0 for m in found])
        mean = lambda name: float(
            (np.array([m[name] for m in found])[keep] * weights[keep]).sum() / weights[keep].sum()
        )
        self.memory.tokens += float(weights.sum())
        values = (
            {
                name: mean(name)
                for name in found[0]
                if name in ("loss", "nll", "accuracy", "router_loss", "router_dropped")
            }
            if keep.any()
            else {}
        )
        last = found[-1]
        values |= {name: float(last[name]) for name in ("learning_rate", "grad_norm", "loss_scale") if name in last}
        values |= {
            "skipped": float((~keep).sum()),
            "epoch": self.job.train.epoch(step),
            "targets": self.memory.tokens,
            "tokens_per_second": tokens_per_second,
        }
        device, count = jax.devices()[0].device_kind, self.job.mesh.size if self.job.mesh else 1
        values |= utilization(tokens_per_second, self.job.flops, self.job.config.remat, device, count)
        self.memory.loss = values.get("loss", math.nan)
        self._write(step, values)
        self._tell("on_log", step, values)

    def _evaluate(self, state: TrainState, step: int) -> TrainState:
        """The held-out loss, per target; patience, and the rate on a plateau. SIGTERM ends it without a result."""
        config, batches = self.job.config, self.job.eval
        assert batches is not None
        count = min(len(batches), config.eval_batches or len(batches))
        sums: dict[str, float] = {}
        for i in range(count):
            if self._why == "SIGTERM":
                return state
            for name, value in jax.device_get(
                self.eval_function(state, place_batch(batches[i], self.job.mesh))
            ).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        weight = sums.pop("weight")
        values = {f"eval_{name}": value / weight for name, value in sums.items()}
        loss = self.memory.eval_loss = values["eval_loss"]
        self.memory.eval_step = step
        values["eval_perplexity"] = math.exp(min(values.get("eval_nll", loss), 700))
        better = loss < self.memory.best - config.min_delta
        if better:
            self.memory.best, self.memory.best_step = loss, step
        self.memory.without_progress = 0 if better else self.memory.without_progress + 1
        self.memory.plateau = 0 if better else self.memory.plateau + 1
        if config.optim.schedule == "reduce_on_plateau" and self.memory.plateau > config.optim.plateau_patience:
            self.memory.plateau = 0
            state = dataclasses.replace(state, lr_scale=state.lr_scale * config.optim.plateau_factor)
        self._write(step, values)
        if better:
            self._save(state, step)
        self._tell("on_evaluate", step, values)
        self._be_patient()
        return state

    def _be_patient(self) -> None:
        if 0 < self.job.config.patience <= self.memory.without_progress:
            self.stop("patience")

    def _save(self, state: TrainState, step: int) -> None:
        if step in self.checkpoints.steps:
            return
        pending = sum(float(m["weight"]) for m in self._window)
        memory = dataclasses.asdict(self.memory) | {"tokens": self.memory.tokens + pending}
        about = {"memory": memory, **self._identity()}
        self.checkpoints.save(state, about, self.memory.eval_loss if self.memory.eval_step == step else None)
        self._tell("on_save", step)

    def _export(self, state: TrainState) -> Path:
        """The model as safetensors, with its tokenizer; an adapter alone, too, and merged if it can be."""
        from jaxlm.data.prepare import load_tokenizer

        job, out = self.job, self.out / FINAL
        variables = on_device(state.variables)
        model = job.model.with_params(variables["params"])
        if job.adapter is not None:
            model = model.with_adapters(variables["adapters"], job.adapter)
            if hosts.leads():
                model.save_adapters(self.out / ADAPTER, overwrite=True)
            if not isinstance(job.adapter, Lora):
                return self.out / ADAPTER  # virtual tokens are no part of the weights
            model = model.merge_adapters()
        model.save(out, overwrite=True)
        if job.config.tokenizer and hosts.leads():
            load_tokenizer(job.config.tokenizer).save_pretrained(str(out))
        return out

    def _describe(self) -> None:
        """Writes down the settings, and what reading a checkpoint of this run takes: config.json and tokenizer."""
        import yaml

        from jaxlm.data.prepare import load_tokenizer

        job = self.job
        described = yaml.safe_dump(plain(job.config), sort_keys=False)
        partial = self.out / f"{SETTINGS}.partial"  # a kill must not leave half of it
        partial.write_text(described, encoding="utf-8")
        partial.replace(self.out / SETTINGS)
        write_json(self.out / CONFIG, job.model.hf_config)
        if job.model.generation_config:
            write_json(self.out / GENERATION, job.model.generation_config)
        if job.config.tokenizer:
            load_tokenizer(job.config.tokenizer).save_pretrained(str(self.out))
        elif job.model.opened is not None:
            job.model.opened.write_tokenizer(self.out)

    def _check_settings(self) -> None:
        """ValueError where the directory holds a run that these settings would not continue."""
        import yaml

        file, mine = self.out / SETTINGS, plain(self.job.config)
        if file.is_file():
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not self.job.config.resume:
                raise ValueError(f"{self.out} holds a run already: choose another `out`, or let it resume")
            free = {
                "out", "log_every", "keep", "report", "profile", "resume", "save_every", "patience", "mesh", "zero",
                "offload", "export",
            }  # fmt: skip
            changed = [name for name in mine if name not in free and before.get(name) != mine[name]]
            if changed:
                said = ", ".join(f"{name}: {before.get(name)!r} -> {mine[name]!r}" for name in changed)
                raise ValueError(f"{self.out} holds a run with other settings, which would not go on: {said}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def _tell(self, what: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(self, *args)

    @contextlib.contextmanager
    def _sigterm(self) -> Iterator[None]:
        """SIGTERM, as a cluster sends it before it takes a machine away, ends the run after the step, and saves.

        With several processes jax has a handler of its own, by which all of them end after the same step.
        """
        if jax.process_count() > 1:
            yield
            return
        try:
            before = signal.signal(signal.SIGTERM, lambda *_: self.stop("SIGTERM"))
        except ValueError:  # not the main thread, which alone may handle signals
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def _explained(self, batch: dict[str, Any]) -> Iterator[None]:
        """Too little memory is said with what the state takes, and where to ask what would fit."""
        try:
            yield
        except jax.errors.JaxRuntimeError as problem:
            if (why := out_of_memory(str(problem))) is None:
                raise
            config, state = self.job.config, self.job.state
            held = {"parameters": (state.trainable, state.frozen), "optimizer": state.optimizer}
            said = ", ".join(f"{name} {local_bytes(tree) / 1e9:.3g} GB" for name, tree in held.items())
            rows, length = batch["tokens"].shape[-2:]
            mesh = f" --mesh {config.mesh}" if config.mesh else ""
            raise MemoryError(
                f"a step does not fit the device's memory: {why}. On each device: {said}, gradients and activations "
                f"beside them. What fits, without trying: jaxlm plan {config.model} --topology CHIP:SHAPE{mesh} "
                f"--batch {rows} --seq {length} --remat {config.remat} --precision {config.precision}, or --auto "
                "instead of the mesh"
            ) from problem

    @contextlib.contextmanager
    def _traced(self, step: int) -> Iterator[None]:
        """A profiler trace of the chosen steps, or of those that are left of them."""
        chosen = self.job.config.profile
        if chosen and chosen[0] <= step <= chosen[1] and not self._tracing:
            jax.profiler.start_trace(str(self.out / "profile"))
            self._tracing = True
        yield
        if chosen and step == chosen[1] and self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False


def _emptied(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings in place of what a checkpoint holds, whose memory is given back."""
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
    shapes = {name: jax.tree.map(shape, getattr(state, name)) for name in ("trainable", "optimizer")}
    for leaf in jax.tree.leaves((state.trainable, state.optimizer)):
        leaf.delete()
    return dataclasses.replace(state, **shapes)


def _split(batch: dict[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
    """[A * B, T] -> [A, B, T]."""
    if parts == 1:
        return batch
    return {name: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]) for name, a in batch.items()}
