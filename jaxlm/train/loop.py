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

from jaxlm.parallel.plan import local_bytes, out_of_memory
from jaxlm.train.adapters import Lora
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.config import plain
from jaxlm.train.metrics import Sink, plot, sinks, utilization
from jaxlm.train.placement import place_batch, within
from jaxlm.train.setup import Job
from jaxlm.train.step import TrainState, make_eval_step, make_train_step, on_device

FINAL, ADAPTER = "model", "adapter"


class Callback(Protocol):
    """What may be told of a run; everything is a Python number by then, and nothing waits for the device.

    `run.stop("why")` ends it after the present step.
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
        self.checkpoints = Checkpoints(self.out / "checkpoints", job.config.keep)
        clip = job.config.optim.clip or None
        step = make_train_step(
            job.loss, job.optimizer, job.settings, clip=clip, shardings=job.shardings, gradients=job.gradients
        )
        self.step_function = within(job.mesh, step)
        self.eval_function = within(job.mesh, make_eval_step(job.loss))
        self.memory = _Memory()
        self._why: str | None = None

    def stop(self, why: str) -> None:
        """Ends the run after the present step."""
        self._why = self._why or why

    def train(self) -> Result:
        """Runs to the end, and exports the model; ValueError when the directory holds another run."""
        config, state, start = self.job.config, self.job.state, 0
        if self.checkpoints.latest is not None:
            state, about = self.checkpoints.restore(state)
            self.memory, start = _Memory(**about["memory"]), int(state.step)
        self._sinks: list[Sink] = sinks(config.report, self.out, plain(config))
        with self._sigterm():
            state, step = self._steps(state, start)
        ended = self._why or "done"
        if ended != "SIGTERM" and self.job.eval and self.memory.eval_step != step:
            state = self._evaluate(state, step)
        if step not in self.checkpoints.steps:
            self._save(state, step)
        self.checkpoints.wait()
        exported = None if ended == "SIGTERM" else self._export(state)
        for sink in self._sinks:
            sink.close()
        if (self.out / "metrics.jsonl").is_file():
            plot(self.out / "metrics.jsonl", self.out / "loss.png")
        result = Result(step, ended, self.memory.loss, self.memory.eval_loss, self.checkpoints.best, exported)
        self._tell("on_end", result)
        self.checkpoints.close()
        return result

    def _steps(self, state: TrainState, start: int) -> tuple[TrainState, int]:
        config, steps = self.job.config, self.job.steps
        window: list[dict[str, jax.Array]] = []
        since, step = time.perf_counter(), start
        batches = self.job.train.iterate(start, stop=steps)
        while step < steps and self._why is None:
            with self._traced(step):
                batch = _split(next(batches), config.accumulate)
                batch = place_batch(batch, self.job.mesh, lead=int(config.accumulate > 1))
                with self._explained(batch):
                    state, metrics = self.step_function(state, batch)
            window.append(metrics)
            step += 1
            if self.on_step:
                self.on_step(step, steps)
            if step % config.log_every == 0 or step == steps:
                self._log(step, window, time.perf_counter() - since)
                window, since = [], time.perf_counter()
            if self.job.eval and config.eval_every and step % config.eval_every == 0:
                state = self._evaluate(state, step)
                since = time.perf_counter()
            if config.save_every and step % config.save_every == 0:
                self._save(state, step)
        return state, step

    def _log(self, step: int, window: list[dict[str, jax.Array]], seconds: float) -> None:
        """The only place where a step's numbers are waited for."""
        found = jax.device_get(window)
        weights = np.array([m["weight"] for m in found])
        keep = np.array([m["skipped"] == 0 for m in found])
        mean = lambda name: float(
            (np.array([m[name] for m in found])[keep] * weights[keep]).sum() / weights[keep].sum()
        )
        tokens = len(found) * self.job.train.batch_size * self.job.train.seq_len
        self.memory.tokens += float(weights.sum())
        values = (
            {name: mean(name) for name in found[0] if name in ("loss", "nll", "accuracy", "router_loss")}
            if keep.any()
            else {}
        )
        last = found[-1]
        values |= {name: float(last[name]) for name in ("learning_rate", "grad_norm", "loss_scale") if name in last}
        values |= {
            "skipped": float((~keep).sum()),
            "epoch": self.job.train.epoch(step),
            "targets": self.memory.tokens,
            "tokens_per_second": tokens / seconds,
        }
        device = jax.devices()[0].device_kind
        rate = values["tokens_per_second"]
        values |= utilization(rate, self.job.flops, self.job.config.remat, device, jax.device_count())
        self.memory.loss = values.get("loss", math.nan)
        self._write(step, values)
        self._tell("on_log", step, values)

    def _evaluate(self, state: TrainState, step: int) -> TrainState:
        """The held-out loss, per target; patience, and the rate on a plateau."""
        config, batches = self.job.config, self.job.eval
        assert batches is not None
        count = min(len(batches), config.eval_batches or len(batches))
        sums: dict[str, float] = {}
        for i in range(count):
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
        self.memory.best = loss if better else self.memory.best
        self.memory.without_progress = 0 if better else self.memory.without_progress + 1
        self.memory.plateau = 0 if better else self.memory.plateau + 1
        if config.optim.schedule == "reduce_on_plateau" and self.memory.plateau > config.optim.plateau_patience:
            self.memory.plateau = 0
            state = dataclasses.replace(state, lr_scale=state.lr_scale * config.optim.plateau_factor)
        self._write(step, values)
        if better:
            self._save(state, step)
        self._tell("on_evaluate", step, values)
        if config.patience and self.memory.without_progress >= config.patience:
            self.stop("patience")
        return state

    def _save(self, state: TrainState, step: int) -> None:
        if step in self.checkpoints.steps:
            return
        about = {"memory": dataclasses.asdict(self.memory), "data": self.job.train.identity, "steps": self.job.steps}
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
            model.save_adapters(self.out / ADAPTER, overwrite=True)
            if not isinstance(job.adapter, Lora):
                return self.out / ADAPTER  # virtual tokens are no part of the weights
            model = model.merge_adapters()
        model.save(out, overwrite=True)
        if job.config.tokenizer:
            load_tokenizer(job.config.tokenizer).save_pretrained(str(out))
        return out

    def _check_settings(self) -> None:
        """Writes the settings down; ValueError where the directory holds a run that these would not continue."""
        import yaml

        file, mine = self.out / "config.yaml", plain(self.job.config)
        if file.is_file():
            before = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not self.job.config.resume:
                raise ValueError(f"{self.out} holds a run already: choose another `out`, or let it resume")
            free = {"out", "log_every", "keep", "report", "profile", "resume", "save_every", "patience"}
            free |= {"zero", "offload"}  # where a state lies is no part of it
            changed = [name for name in mine if name not in free and before.get(name) != mine[name]]
            if changed:
                said = ", ".join(f"{name}: {before.get(name)!r} -> {mine[name]!r}" for name in changed)
                raise ValueError(f"{self.out} holds a run with other settings, which would not go on: {said}")
        file.write_text(yaml.safe_dump(mine, sort_keys=False), encoding="utf-8")

    def _write(self, step: int, values: dict[str, float]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def _tell(self, what: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(self, *args)

    @contextlib.contextmanager
    def _sigterm(self) -> Iterator[None]:
        """SIGTERM, as a cluster sends it before it takes a machine away, ends the run after the step, and saves."""
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
        """A profiler trace of the chosen steps."""
        chosen = self.job.config.profile
        if chosen and step == chosen[0]:
            jax.profiler.start_trace(str(self.out / "profile"))
        yield
        if chosen and step == chosen[1]:
            jax.profiler.stop_trace()


def _split(batch: dict[str, np.ndarray], parts: int) -> dict[str, np.ndarray]:
    """[A * B, T] -> [A, B, T]."""
    if parts == 1:
        return batch
    return {name: a.reshape(parts, a.shape[0] // parts, *a.shape[1:]) for name, a in batch.items()}
