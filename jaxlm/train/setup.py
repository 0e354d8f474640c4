"""From the settings of a run to what the loop needs: model, data, objective, state, and the plan of all that."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxlm import api
from jaxlm.data.fim import Fim
from jaxlm.data.pipeline import Batches
from jaxlm.data.prepare import PrepareConfig, load_tokenizer, prepare
from jaxlm.model import Model
from jaxlm.models.decoder import Runtime
from jaxlm.parallel import hosts
from jaxlm.parallel.mesh import make_mesh, parse_preset
from jaxlm.parallel.pipeline import Pipeline
from jaxlm.parallel.sharding import Replicated
from jaxlm.train import adapters
from jaxlm.train.adapters import AdapterConfig, Lora, Prefix, Prompt, is_trainable
from jaxlm.train.config import TrainConfig, parse
from jaxlm.train.metrics import flops_per_token
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.partition import paths
from jaxlm.train.placement import HOST, bytes_per_device, gradient_shardings, state_shardings
from jaxlm.train.scaler import loss_scale
from jaxlm.train.step import Gradients, Loss, TrainState, init_state

Progress = Callable[[int, int], None]
_ADAPTERS = {"lora": Lora, "prefix": Prefix, "prompt": Prompt}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run made ready. `model` holds no parameters: those are the state's."""

    config: TrainConfig
    model: Model
    train: Batches
    eval: Batches | None
    steps: int
    settings: Optimizer
    optimizer: optax.GradientTransformation
    loss: Loss
    state: TrainState
    flops: float  # of a token's forward and backward pass
    adapter: AdapterConfig | None = None
    mesh: Mesh | None = None
    shardings: TrainState | None = None
    gradients: Gradients | None = None  # where they lie on the mesh
    whole: tuple[Replicated, ...] = ()  # dimensions that do not divide over the mesh

    @property
    def trainable(self) -> int:
        return _count(self.state.trainable)

    def plan(self) -> list[tuple[str, str]]:
        """Names and values to print before the run."""
        c, o, data = self.config, self.config.optim, self.train
        rows = data.batch_size
        total = _count(self.state.variables)
        every = f"every {c.eval_every or self.steps} steps, {len(self.eval)} batches" if self.eval else "none"
        some = f"{self.trainable:,} of them train ({self.trainable / total:.2%})"
        lines = [
            ("model", f"{c.model}: {total:,} parameters, {some}"),
            ("computes in", f"{c.precision}, gradients summed in {c.reduce_dtype}, remat {c.remat}, attention "
                            f"{c.attention or 'chosen per call'}"),
            ("devices", f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {c.mesh or 'none'}"),
            *self._memory(),
            *(("not cut", f"{r.path}: {r.axis}={r.size} does not divide over {r.over}") for r in self.whole),
            ("data", f"{len(data.cache):,} examples in {data.rows_per_epoch:,} rows of {data.seq_len} ({data.mode}); "
                     f"{data.efficiency:.1%} of the tokens are no padding"),
            ("steps", f"{self.steps:,} = {data.epoch(self.steps):.2f} epochs of {data.steps_per_epoch:,}"),
            ("a step", f"{rows} rows ({c.accumulate} x {rows // c.accumulate}), {rows * data.seq_len:,} tokens"),
            ("optimizer", f"{o.name}, rate {o.rate:g} {o.schedule}, warm-up {self.settings.schedule.warmup}, "
                          f"decay {o.weight_decay:g}, clip {o.clip or 'none'}"),
            ("evaluation", every),
            ("output", c.out),
        ]  # fmt: skip
        return lines

    def _memory(self) -> list[tuple[str, str]]:
        """What a device of the mesh holds."""
        if self.shardings is None or self.gradients is None:
            return []
        state, at = self.state, self.shardings
        trees = {
            "parameters": ((state.trainable, state.frozen), (at.trainable, at.frozen)),
            "gradients": (state.trainable, self.gradients.summed),
            "optimizer": (state.optimizer, at.optimizer),
        }
        found = []
        for name, (tree, where) in trees.items():
            kinds = bytes_per_device(tree, where)
            most = max(kinds, key=lambda kind: kinds[kind])  # counters of the optimizer are never moved
            found.append(f"{name} {sum(kinds.values()) / 1e6:,.2f} MB{' in host memory' if most == HOST else ''}")
        return [("on each", f"{', '.join(found)} (zero {self.config.zero})")]


def setup(config: TrainConfig, progress: Callable[[str], Any] | None = None) -> Job:
    """Loads and prepares everything; ValueError for what does not fit together."""
    if jax.process_count() > 1 and config.mesh is None:
        raise ValueError(f"mesh must say how {jax.process_count()} processes share the run, as in mesh=data=8")
    model = _model(config)
    tokenizer = config.tokenizer or config.model
    train = _batches(config, config.data.train, tokenizer, "train", progress, model.mesh)
    evaluated = None
    if config.data.eval:
        evaluated = _batches(config, config.data.eval, tokenizer, "eval", progress, model.mesh)
    _check_vocabulary(train, model)
    epoch = train.rows_per_epoch / train.batch_size if train.carries else train.steps_per_epoch
    steps = config.steps or math.ceil(config.epochs * epoch)
    settings = config.optim.make(steps)
    backbone = model.family.backbone
    optimizer = settings.make({"params": backbone.logical_axes(model.config)})
    router = config.loss.router
    if router is None:
        router = float(model.hf_config.get("router_aux_loss_coef") or 0.0)
    shared = {name: getattr(config.loss, name) for name in ("smoothing", "z", "neftune", "chunk")}
    objective = Objective(backbone=backbone, config=model.config, runtime=model.runtime, router=router, **shared)
    variables, trainable = {"params": model.params}, config.trainable
    adapter = None
    if config.adapter is not None:
        adapter, variables["adapters"] = _adapter(config, model)
        trainable = tuple(p for p in paths(variables) if p.startswith("adapters/") and is_trainable(p))
    scale = loss_scale() if config.precision == "float16" else None
    state = init_state(variables, optimizer, jax.random.key(config.seed), trainable=trainable, scale=scale)
    c = model.config
    embedding = 0 if c.tie_embeddings else c.vocab_size * c.d_model
    attending = sum(kind.mixer == "attention" for kind in c.kinds)
    flops = flops_per_token(_count(variables), embedding, attending, c.d_model, config.data.seq_len)
    loss = causal_lm(objective)
    model = model.with_params({})  # the state holds them: a second reference would keep them on the first device
    job = Job(config, model, train, evaluated, steps, settings, optimizer, loss, state, flops, adapter)
    return job if config.mesh is None and not config.offload else _on_mesh(job)


def _on_mesh(job: Job) -> Job:
    """The job with its state placed on the mesh; without one (host memory alone was asked for) on the first device."""
    zero, offload = job.config.zero, job.config.offload
    preset = job.config.mesh
    mesh = make_mesh("data=1", jax.devices()[:1]) if preset is None else make_mesh(preset)
    axes = {"params": job.model.family.backbone.logical_axes(job.model.config)}
    placed, whole = state_shardings(job.state, axes, job.optimizer, mesh, zero=zero, offload=offload)
    gradients = gradient_shardings(job.state, axes, mesh, zero)
    state = hosts.place(job.state, placed)
    return dataclasses.replace(
        job, state=state, mesh=mesh, shardings=placed, gradients=gradients, whole=tuple(whole)
    )  # fmt: skip


def _model(config: TrainConfig) -> Model:
    """The model, its parameters float32 whatever it computes in: updates are too small for less."""
    if config.model.endswith(".json"):
        if config.tokenizer is None:
            raise ValueError(f"model={config.model} begins from scratch: tokenizer must say whose tokenizer to use")
        model = api.init(
            config.model, key=jax.random.key(config.seed), ignore_fields=config.ignore_fields, mesh=config.mesh
        )
    else:
        model = api.load(config.model, dtype="float32", ignore_fields=config.ignore_fields, mesh=config.mesh)
    return dataclasses.replace(model, runtime=_runtime(config, model.config), layers="stacked")


def _runtime(config: TrainConfig, model: Any) -> Runtime:
    """How the model runs, checked against the mesh; ValueError for what that cannot split."""
    sizes = parse_preset(config.mesh) if config.mesh else {}
    sequence, pipe = sizes.get("sequence", 1), sizes.get("pipe", 1)
    lengths = config.data.buckets if config.data.mode == "bucket" else (config.data.seq_len,)
    if uncut := [length for length in lengths if length % sequence]:
        raise ValueError(f"mesh={config.mesh!r}: sequences of {uncut[0]} tokens do not split over sequence={sequence}")
    repeats = config.pipe_repeats
    if len(model.kinds) % (pipe * repeats):
        over = f"pipe={pipe}" + (f" with pipe_repeats={repeats}" if repeats > 1 else "")
        raise ValueError(f"mesh={config.mesh!r}: {len(model.kinds)} layers do not split over {over}")
    if (config.microbatches or repeats > 1) and pipe == 1:
        given = f"microbatches={config.microbatches} are" if config.microbatches else f"pipe_repeats={repeats} are"
        raise ValueError(f"{given} a pipeline's, and mesh={config.mesh!r} has no pipe")
    return Runtime(
        dtype=config.precision,
        attention=config.attention,
        remat=config.remat,
        expert_capacity=config.expert_capacity or None,
        reduce_dtype=config.reduce_dtype,
        layers=Pipeline(config.microbatches, repeats) if pipe > 1 else None,
    )


def _adapter(config: TrainConfig, model: Model) -> tuple[AdapterConfig, Any]:
    """The adapter's settings, and a fresh one."""
    if config.trainable != ("*",):
        raise ValueError(f"trainable={config.trainable} with an adapter: the adapter alone trains")
    given = dict(config.adapter or {})
    kind = given.pop("kind", None)
    if kind not in _ADAPTERS:
        raise ValueError(f"adapter: kind={kind!r}, expected one of {', '.join(_ADAPTERS)}")
    made = parse(_ADAPTERS[kind], given, "adapter")
    return made, adapters.init(made, model.family, model.config, model.params, jax.random.key(config.seed + 1))


def _batches(config: TrainConfig, source: str, tokenizer: str, name: str, progress, mesh: Mesh | None) -> Batches:
    from jaxlm.data.cache import open_cache

    data = config.data
    if (Path(source) / "header.json").is_file():
        cache = open_cache(source, tokenizer=load_tokenizer(tokenizer))
        if data.format not in ("text", cache.header.format.name):
            raise ValueError(f"data.format={data.format!r}: {source} was prepared as {cache.header.format.name!r}")
        if data.max_bad_rows:
            raise ValueError(f"data.max_bad_rows={data.max_bad_rows}: {source} is prepared already")
    else:
        wanted = PrepareConfig(
            source=(source,), tokenizer=tokenizer, format=data.format, max_bad_rows=data.max_bad_rows
        )  # fmt: skip
        options = {"progress": progress(f"tokenizing {name}")} if progress else {}
        with hosts.leader_first(f"tokenized {name}"):
            cache = prepare(wanted, Path(config.out) / f"data-{name}", **options)
    training = name == "train"
    fim = Fim.of(load_tokenizer(tokenizer), rate=data.fim_rate) if data.fim_rate and training else None
    index, count = hosts.share_of_rows(mesh)
    return Batches(
        cache,
        data.batch_size * (config.accumulate if training else 1),
        data.seq_len,
        seed=config.seed,
        mode=data.mode,
        long=data.long,
        buckets=data.buckets,
        shuffle=training,
        fim=fim,
        process_index=index,
        process_count=count,
    )


def _check_vocabulary(batches: Batches, model: Model) -> None:
    largest, size = int(batches.cache.tokens.max()), model.config.vocab_size
    if largest >= size:
        raise ValueError(
            f"{batches.cache.path} holds token {largest}, and the model knows {size}: it was prepared with another "
            "tokenizer"
        )


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
