"""The update: token-weighted accumulation, clipping, skipping, frozen leaves; against torch's AdamW and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models import decoder
from jaxlm.models.registry import family
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import NAMES, Optimizer
from jaxlm.train.scaler import loss_scale
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import init_state, make_train_step

CONSTANT = Schedule(name="constant", steps=100)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.fixture(scope="module")
def config():
    return family("llama").config(LLAMA)


def variables(config):
    return {"params": decoder.init(dataclasses.replace(config, init_std=0.2), jax.random.key(0))}


def batch(b=4, t=8, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 61, (b, t))
    targets[rng.uniform(size=(b, t)) < 0.4] = -100
    return {"tokens": rng.integers(0, 61, (b, t)), "targets": targets}


def lm(config, **settings):
    return causal_lm(Objective(backbone=decoder, config=config, **settings))


def quadratic(variables, batch, rng):
    """Sum of squared distances to the batch's numbers; the weight is how many there are."""
    w = variables["params"]["w"]
    keep = batch["tokens"] >= 0
    return jnp.where(keep, (w - batch["tokens"]) ** 2, 0).sum() / 2, keep.sum().astype(jnp.float32), {}


def copy(tree):
    return jax.tree.map(jnp.array, tree)


def sgd(rate=1.0):
    return Optimizer(name="sgd", rate=rate, schedule=CONSTANT)


def test_every_target_counts_the_same():
    """10 tokens at 2.0 and 90 at 4.0 are 3.8, not 3.0."""
    fill = lambda n, value: np.r_[np.full(n, value), np.full(100 - n, -1)][None].astype(np.float32)
    settings = sgd(0.5)
    optimizer = settings.make()
    state = init_state({"params": {"w": jnp.zeros(())}}, optimizer, jax.random.key(0))
    step = make_train_step(quadratic, optimizer, settings, clip=None)
    micro = {"tokens": jnp.stack([fill(10, 2.0), fill(90, 4.0)])}
    state, metrics = step(state, micro)
    np.testing.assert_allclose(state.trainable["params"]["w"], 0.5 * 3.8, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (10 * 2 + 90 * 8) / 100, rtol=1e-6)


def test_accumulated_equals_one_batch(config):
    whole = batch()
    parts = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), whole)
    settings = sgd()
    optimizer = settings.make()
    after = []
    for given in (whole, parts):
        state = init_state(variables(config), optimizer, jax.random.key(1))
        state, metrics = make_train_step(lm(config), optimizer, settings, clip=None)(state, given)
        after.append((state.trainable, metrics))
    for a, b in zip(*map(jax.tree.leaves, after), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1, abs(a).max()))


def test_gradient_is_that_of_the_mean_over_all_logits(config):
    """The chunked loss through the whole model, against jax.grad of log_softmax."""
    given, values = batch(), variables(config)

    def defined(v):
        logits, _, _ = decoder.forward(config, v["params"], given["tokens"])
        logp = jax.nn.log_softmax(logits)
        keep = given["targets"] != -100
        picked = jnp.take_along_axis(logp, np.where(keep, given["targets"], 0)[..., None], -1)[..., 0]
        return -(picked * keep).sum() / keep.sum()

    wanted, grads = jax.value_and_grad(defined)(values)
    settings = sgd()
    optimizer = settings.make()
    state = init_state(copy(values), optimizer, jax.random.key(1))
    state, metrics = make_train_step(lm(config, chunk=3), optimizer, settings, clip=None)(state, given)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=2e-6)
    for old, new, g in zip(*map(jax.tree.leaves, (values, state.trainable, grads)), strict=True):
        np.testing.assert_allclose(old - new, g, atol=3e-6 * max(1, abs(old).max()))


def test_clipping():
    settings = sgd()
    optimizer = settings.make()
    state = init_state({"params": {"w": jnp.zeros(2)}}, optimizer, jax.random.key(0))
    step = make_train_step(quadratic, optimizer, settings, clip=1.0)
    state, metrics = step(state, {"tokens": jnp.array([[6.0, 8.0]])})  # gradient (-3, -4)
    np.testing.assert_allclose(metrics["grad_norm"], 5, rtol=1e-6)
    np.testing.assert_allclose(state.trainable["params"]["w"], [0.6, 0.8], rtol=1e-6)


def test_a_nan_skips_the_update_and_its_schedule():
    settings = Optimizer(rate=0.1, schedule=Schedule(name="linear", steps=10, warmup=5))
    optimizer = settings.make()
    state = init_state({"params": {"w": jnp.ones(2)}}, optimizer, jax.random.key(0))
    step = make_train_step(quadratic, optimizer, settings)
    state, _ = step(state, {"tokens": jnp.array([[3.0, 4.0]])})
    before = jax.tree.map(np.asarray, (state.trainable, state.optimizer))
    state, metrics = step(state, {"tokens": jnp.array([[jnp.inf, 4.0]])})
    assert metrics["skipped"] == 1 and state.step == 2
    for a, b in zip(*map(jax.tree.leaves, (before, (state.trainable, state.optimizer))), strict=True):
        np.testing.assert_array_equal(a, b)
    state, metrics = step(state, {"tokens": jnp.array([[3.0, 4.0]])})
    np.testing.assert_allclose(metrics["learning_rate"], 0.1 * 1 / 5, rtol=1e-6)
    assert metrics["skipped"] == 0


def test_frozen_leaves_have_no_gradient_and_no_state(config):
    values = variables(config)
    settings = Optimizer(rate=0.1, schedule=CONSTANT)
    optimizer = settings.make()
    state = init_state(copy(values), optimizer, jax.random.key(0), trainable=("params/layers/attn/*",))
    trained = sum(leaf.size for leaf in jax.tree.leaves(values["params"]["layers"]["attn"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) == 2 * trained + 2  # two moments, two counts
    frozen = jax.tree.map(np.asarray, state.frozen)
    state, _ = make_train_step(lm(config), optimizer, settings)(state, batch())
    for a, b in zip(*map(jax.tree.leaves, (frozen, state.frozen)), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(
        ValueError, match=r"trainable: 'params/layer/\*' matches no parameter; there are params/embed/w"
    ):
        init_state(values, optimizer, jax.random.key(0), trainable=("params/layer/*",))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_optimizers_learn(config, name):
    """Each overfits one batch, with decay and a rate of its own for the embedding."""
    rate = {"sgd": 0.3, "adafactor": 0.02, "lamb": 0.02, "lion": 0.003}.get(name, 0.02)
    settings = Optimizer(name=name, rate=rate, schedule=CONSTANT, decay=0.01, rates=(("params/embed", 0.5),))
    axes = {"params": decoder.logical_axes(config)}
    optimizer = settings.make(axes)
    state = init_state(variables(config), optimizer, jax.random.key(0))
    step, given = make_train_step(lm(config), optimizer, settings), batch()
    losses = []
    for _ in range(25):
        state, metrics = step(state, given)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.75 * losses[0], losses


@pytest.mark.parametrize("name", ["lamb", "adafactor"])
def test_norms_are_those_of_one_layer(name):
    """A stack's layers are updated as if each were a leaf of its own, however unlike their norms are."""
    rng, size = np.random.default_rng(0), np.array([1.0, 50.0])[:, None, None]
    stack = (rng.normal(size=(2, 4, 6)) * size).astype(np.float32)
    optimizer = Optimizer(name=name, rate=0.1, schedule=CONSTANT).make()
    grads = {"a": (rng.normal(size=(2, 4, 6)) / size).astype(np.float32)}

    def update(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    together = update({"layers": {"a": stack}}, {"layers": grads})["layers"]["a"]
    for i in range(2):
        alone = update({"a": stack[i]}, {"a": grads["a"][i]})["a"]
        np.testing.assert_allclose(together[i], alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "sgd", "beta1": 0.8}, "beta1=0.8: sgd has none"),
        ({"momentum": 0.9}, "momentum=0.9: adamw has none"),
        ({"name": "adafactor", "eps": 1e-6}, "eps=1e-06: adafactor has none"),
    ],
)
def test_a_number_that_an_optimizer_lacks(given, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(schedule=CONSTANT, **given)


@pytest.mark.torch
def test_adamw_equals_torch(config):
    """Five updates with warm-up, decay and clipping, beside torch.optim.AdamW on the same gradients."""
    import torch

    schedule = Schedule(name="linear", steps=8, warmup=2)
    settings = Optimizer(rate=0.05, schedule=schedule, decay=0.1, beta2=0.95)
    optimizer = settings.make()
    start = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    state = init_state({"params": {"w": jnp.array(start), "b": jnp.ones(4)}}, optimizer, jax.random.key(0))

    def loss(v, given, rng):
        y = given["tokens"] @ v["params"]["w"] + v["params"]["b"]
        return (y**2).sum() / 2, jnp.float32(given["tokens"].shape[0]), {}

    w, b = torch.nn.Parameter(torch.tensor(start)), torch.nn.Parameter(torch.ones(4))
    groups = [{"params": [w], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    step = make_train_step(loss, optimizer, settings, clip=1.0)
    for i in range(5):
        x = np.random.default_rng(i).normal(size=(6, 3)).astype(np.float32)
        state, _ = step(state, {"tokens": jnp.array(x)})
        theirs.zero_grad()
        (((torch.tensor(x) @ w + b) ** 2).sum() / 2 / 6).backward()
        torch.nn.utils.clip_grad_norm_([w, b], 1.0)
        for group in theirs.param_groups:
            group["lr"] = 0.05 * float(schedule(i))
        theirs.step()
    np.testing.assert_allclose(state.trainable["params"]["w"], w.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(state.trainable["params"]["b"], b.detach().numpy(), atol=2e-6)


def test_loss_scale_follows_deepspeed():
    scale, trace = loss_scale(), []
    for _ in range(18):
        scale = scale.update(jnp.array(False))
        trace.append(float(scale.scale))
    assert trace[:3] == [65536, 32768, 16384] and trace[16] == 1 and trace[17] == 1
    for i in range(1000):
        assert scale.scale == 1, i
        scale = scale.update(jnp.array(True))
    assert scale.scale == 2 and scale.patience == 2


@pytest.mark.slow
def test_float16_with_a_scale_learns(config):
    settings = Optimizer(rate=0.02, schedule=CONSTANT)
    optimizer = settings.make()
    state = init_state(variables(config), optimizer, jax.random.key(0), scale=loss_scale(2.0**24))
    loss = lm(config, runtime=decoder.Runtime(dtype="float16"))
    step, given = make_train_step(loss, optimizer, settings), batch()
    seen = []
    for _ in range(40):
        state, metrics = step(state, given)
        seen.append(jax.tree.map(float, metrics))
    assert seen[0]["skipped"] == 1 and seen[-1]["skipped"] == 0  # it overflowed, then came down
    assert seen[-1]["loss"] < 0.75 * seen[0]["loss"]


def test_neftune_is_bounded(config, monkeypatch):
    seen = []
    real = decoder.trunk
    fake = lambda config, params, x, **options: seen.append(x) or real(config, params, x, **options)
    monkeypatch.setattr(decoder, "trunk", fake)
    given, values = batch(), variables(config)
    for alpha, rng in ((0.0, jax.random.key(0)), (5.0, jax.random.key(0)), (5.0, None)):
        lm(config, neftune=alpha)(values, given, rng)
    noise = np.abs(seen[1] - seen[0])
    bound = 5 / np.sqrt(8 * 16)
    assert noise.max() <= bound * (1 + 1e-6) and noise.max() > 0.9 * bound
    np.testing.assert_array_equal(seen[2], seen[0])  # none in evaluation


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "adam"}, "unknown optimizer 'adam'; there are adamw"),
        ({"rate": 0}, "rate=0"),
        ({"decay": -1}, "decay=-1"),
        ({"beta2": 1.0}, "beta2=1.0"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        Optimizer(**{"schedule": CONSTANT} | bad)


def test_a_rate_that_fits_nothing():
    settings = Optimizer(schedule=CONSTANT, rates=(("params/embd", 0.1),))
    with pytest.raises(ValueError, match="rates: 'params/embd' matches no parameter"):
        settings.make().init({"params": {"embed": {"w": jnp.ones(2)}}})
