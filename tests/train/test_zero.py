"""ZeRO's stages, host memory and the dtype of the sums of gradients: what one device computes, and what they cost."""

import dataclasses
import functools
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxlm.models import decoder
from jaxlm.models.config import MlpConfig
from jaxlm.models.layers import reducing_in
from jaxlm.models.mlp import Mlp
from jaxlm.models.registry import family
from jaxlm.parallel.mesh import make_mesh
from jaxlm.parallel.sharding import batch_shardings
from jaxlm.train import placement
from jaxlm.train.config import TrainConfig, parse
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.placement import bytes_per_device, gradient_shardings, place_batch, state_shardings, within
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import init_state, make_eval_step, make_train_step
from tests import aot
from tests.conftest import NO_LIBTPU

needs_libtpu = pytest.mark.skipif(not aot.HAS_LIBTPU, reason=NO_LIBTPU)
WIDE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
SMALL = WIDE | {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, an optimizer and how they are laid out; `make` gives the state's shapes and all that a step takes."""

    hf: dict[str, Any] = dataclasses.field(default_factory=lambda: SMALL)
    zero: int = 0
    offload: tuple[str, ...] = ()

    def make(self, mesh: Mesh | None):
        config = family("llama").config(self.hf)
        settings = Optimizer(rate=1e-2, schedule=Schedule(name="constant", steps=9), decay=0.1)
        optimizer, axes = settings.make(), {"params": decoder.logical_axes(config)}
        start = functools.partial(_start, dataclasses.replace(config, init_std=0.2), optimizer)
        shapes, placed, gradients = jax.eval_shape(start), None, None
        if mesh is not None:
            placed, _ = state_shardings(shapes, axes, optimizer, mesh, zero=self.zero, offload=self.offload)
            gradients = gradient_shardings(shapes, axes, mesh, self.zero)
        loss = causal_lm(Objective(backbone=decoder, config=config))
        step = make_train_step(loss, optimizer, settings, shardings=placed, gradients=gradients)
        return start, shapes, placed, gradients, step, make_eval_step(loss)


def _start(config, optimizer):
    return init_state({"params": decoder.init(config, jax.random.key(0))}, optimizer, jax.random.key(1))


def batches(accumulate: int, steps: int = 3):
    for i in range(steps):
        rng = np.random.default_rng(i)
        shape = (accumulate, 8, 6) if accumulate > 1 else (8, 6)
        tokens = rng.integers(0, 61, shape).astype(np.int32)
        yield {"tokens": tokens, "targets": np.where(rng.uniform(size=shape) < 0.3, -100, tokens).astype(np.int32)}


def run(preset: str | None, accumulate: int = 1, **case):
    """Losses of three updates, the loss after them, and the state."""
    mesh = None if preset is None else make_mesh(preset)
    start, _, placed, _, step, evaluate = Case(**case).make(mesh)
    state = start() if placed is None else jax.device_put(start(), placed)
    losses = []
    for batch in batches(accumulate):
        given = place_batch(batch, mesh, lead=int(accumulate > 1))
        state, metrics = within(mesh, step)(state, given)
        losses.append(float(metrics["loss"]))
    last = within(mesh, evaluate)(state, place_batch(next(batches(1, 1)), mesh))
    return [*losses, float(last["loss"])], state


alone = functools.cache(lambda accumulate: run(None, accumulate))


def assert_equal(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name in ("trainable", "optimizer"):
        for a, b in zip(*(jax.tree.leaves(getattr(one[1], name)) for one in (got, want)), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("preset", "zero", "accumulate"),
    [
        *(pytest.param("data=8", zero, 2, marks=pytest.mark.slow) for zero in (1, 2, 3)),
        ("data=2,fsdp=4", 2, 2),
        pytest.param("data=8", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_stages_equal_one_device(preset, zero, accumulate):
    assert_equal(run(preset, accumulate, zero=zero), alone(accumulate))


@pytest.mark.parametrize(
    ("preset", "zero", "held", "gradients"),
    [
        ("data=8", 0, 12, 4),
        ("data=8", 1, 4 + 8 / 8, 4),
        ("data=8", 2, 4 + 8 / 8, 4 / 8),
        ("data=8", 3, 12 / 8, 4 / 8),
        ("fsdp=8", 0, 12 / 8, 4 / 8),
        ("data=2,fsdp=4", 1, 4 / 4 + 8 / 8, 4 / 4),
    ],
)
def test_bytes_of_a_parameter_on_a_device(preset, zero, held, gradients):
    """12, 5, 5 and 1.5 on 8 devices for float32 parameters and Adam's moments; norm scales (0.1 %) are whole."""
    start, shapes, placed, at, _, _ = Case(WIDE, zero).make(make_mesh(preset))
    assert at is not None
    state = jax.device_put(start(), placed)
    trees = state.trainable, state.optimizer
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes.trainable))
    shards = [shard for leaf in jax.tree.leaves(trees) for shard in leaf.addressable_shards]
    found = sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[3])
    np.testing.assert_allclose(found / count, held, rtol=0.01)
    summed_at = bytes_per_device(shapes.trainable, at.summed)
    np.testing.assert_allclose(summed_at["device"] / count, gradients, rtol=0.01)


def test_the_state_stays_where_it_was():
    """After an update the buffers lie as before it: nothing was gathered for good."""
    _, state = run("data=8", zero=1)
    _, _, placed, *_ = Case(zero=1).make(make_mesh("data=8"))
    jax.tree.map(lambda a, s: np.testing.assert_equal(a.sharding.is_equivalent_to(s, a.ndim), True), state, placed)
    moment = state.optimizer[0].mu["params"]["layers"]["mlp"]["up"]["w"]
    assert moment.addressable_shards[0].data.size == moment.size // 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "zero", "offload"),
    [("data=8", 0, ("optimizer",)), ("data=2,fsdp=4", 1, ("optimizer", "params"))],
)
def test_host_memory_changes_nothing(preset, zero, offload):
    got = run(preset, 2, zero=zero, offload=offload)
    assert_equal(got, alone(2))
    state = got[1]
    kinds = lambda tree: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}
    assert kinds(state.optimizer) == {"pinned_host"}
    assert kinds(state.trainable) == {"pinned_host" if "params" in offload else "device"}


def test_a_device_without_host_memory(monkeypatch):
    monkeypatch.setattr(placement, "HOST", "elsewhere")
    with pytest.raises(ValueError, match=r"offload: cpu has no elsewhere memory; it has .*pinned_host"):
        Case(offload=("optimizer",)).make(make_mesh("data=8"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": 4, "mesh": "data=8"}, "zero=4: expected one of 0, 1, 2, 3"),
        ({"zero": 1}, "zero=1 cuts over the mesh's axis data, and there is no mesh"),
        ({"offload": ["moments"]}, "offload: unknown moments; there are optimizer and params"),
        ({"reduce_dtype": "float16"}, "reduce_dtype='float16': expected one of float32, bfloat16"),
        ({"reduce_dtype": "bfloat16"}, "reduce_dtype='bfloat16' is for precision='bfloat16'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(TrainConfig, {"model": "m", "out": "o", "data": {"train": "t"}} | settings, "here")


def test_stages_need_data():
    with pytest.raises(ValueError, match="zero=2 cuts over the axis data, which is 1 here"):
        Case(zero=2).make(make_mesh("fsdp=8"))


# What is compiled for four chips that are not there: two layers of the feed-forward branch instead of a model, whose
# compilation takes a minute.

LAYERS, WIDTH = 2, 2048
PARAMETERS = LAYERS * 3 * WIDTH * 2 * WIDTH


@functools.cache
def compiled(zero: int, reduce_dtype: str, offload: tuple[str, ...] = ()):
    """The step over data=4, accumulated over two micro-batches of 8 rows, in bfloat16."""
    mesh = make_mesh("data=4", aot.tpu_topology("v5e").devices)
    module = Mlp(MlpConfig(d_ff=2 * WIDTH), WIDTH, 0.02)
    wide, narrow = (LAYERS, WIDTH, 2 * WIDTH), (LAYERS, 2 * WIDTH, WIDTH)
    shape = {"gate": wide, "up": wide, "down": narrow}
    start = lambda: {name: {"w": jnp.zeros(size)} for name, size in shape.items()}
    named = {wide: ("layers", "embed", "mlp"), narrow: ("layers", "mlp", "embed")}
    axes = {"params": {name: {"w": named[size]} for name, size in shape.items()}}

    def loss(variables, batch, rng):
        def layer(x, w):
            with reducing_in(reduce_dtype):
                y: Any = module.apply({"params": w}, x)
            return x + y, None

        x = batch["tokens"].astype(jnp.bfloat16)[..., None] * jnp.ones(WIDTH, jnp.bfloat16)
        x, _ = jax.lax.scan(layer, x, variables["params"])
        return jnp.square(x.astype(jnp.float32)).sum(), jnp.float32(x.size), {}

    settings = Optimizer(rate=1e-2, schedule=Schedule(name="constant", steps=9), decay=0.1)
    optimizer = settings.make()
    shapes = jax.eval_shape(lambda: init_state({"params": start()}, optimizer, jax.random.key(1)))
    placed, _ = state_shardings(shapes, axes, optimizer, mesh, zero=zero, offload=offload)
    gradients = gradient_shardings(shapes, axes, mesh, zero)
    step = make_train_step(loss, optimizer, settings, shardings=placed, gradients=gradients)
    at = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    batch = {"tokens": jax.ShapeDtypeStruct((2, 8, 128), jnp.int32)}
    batch = {name: at(batch[name], where) for name, where in batch_shardings(batch, mesh, lead=1).items()}
    with jax.set_mesh(mesh):
        return step.lower(jax.tree.map(at, shapes, placed), batch).compile()


def collectives(text: str) -> Counter[tuple[str, str, int]]:
    """(kind, dtype, elements of an operand) of every array that a TPU program's collectives take.

    The compiler writes a reduce-scatter as a fusion that is named after it.
    """
    found: Counter[tuple[str, str, int]] = Counter()
    inside = ""
    for line in text.splitlines():
        if line.startswith("%") or line.startswith("ENTRY"):
            inside = line.split(" ", 1)[0]
        match = re.match(r"\s*(?:ROOT )?%[\w.-]+ = (.*?) (all-reduce|all-gather|reduce-scatter)(?:-start)?\(", line)
        if match:
            kind = "reduce-scatter" if "all-reduce-scatter" in inside else match[2]
            for dtype, shape in re.findall(r"\b(f32|bf16)\[([\d,]*)\]", match[1]):
                found[kind, dtype, int(np.prod([int(n) for n in shape.split(",") if n]))] += 1
    return found


@needs_libtpu
def test_stage_2_reduce_scatters():
    """Gradients come to a device as its share, and only that is kept while micro-batches are summed."""
    found = [collectives(compiled(zero, "float32").as_text()) for zero in (0, 2)]
    kinds = [{kind for kind, _, size in one if size >= WIDTH**2 / 4} for one in found]
    assert kinds == [{"all-reduce"}, {"reduce-scatter", "all-gather"}]  # what is gathered are new parameters
    memory = [compiled(zero, "float32").memory_analysis() for zero in (0, 2)]
    temporaries = [one.temp_size_in_bytes / PARAMETERS for one in memory]
    assert temporaries[1] < temporaries[0] - 2, temporaries
    held = [one.argument_size_in_bytes / PARAMETERS for one in memory]
    np.testing.assert_allclose(held, [12, 4 + 8 / 4], rtol=0.01)


@needs_libtpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_summed_in_the_dtype_asked_for(dtype):
    found = collectives(compiled(2, dtype).as_text())
    kinds = {kind for name, kind, size in found if name == "reduce-scatter" and size >= WIDTH**2 / 4}
    assert kinds == {{"float32": "f32", "bfloat16": "bf16"}[dtype]}


@needs_libtpu
@pytest.mark.slow
def test_moments_in_host_memory_are_no_argument_of_the_device():
    there = compiled(1, "float32", ("optimizer",)).memory_analysis()
    np.testing.assert_allclose(there.host_argument_size_in_bytes / PARAMETERS, 8 / 4, rtol=0.01)
    np.testing.assert_allclose(there.argument_size_in_bytes / PARAMETERS, 4, rtol=0.01)
