"""What holds for the backbone whatever the family: depth costs nothing to compile, options are checked, dropout."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.models import config as config_module
from jaxlm.models import decoder
from jaxlm.models.config import DropoutConfig
from jaxlm.models.decoder import Runtime
from jaxlm.models.registry import family

TINY = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.2,
}
GEMMA = TINY | {
    "model_type": "gemma3_text",
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window_pattern": 2,
}
del GEMMA["hidden_act"]
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 9))
forward = jax.jit(decoder.forward, static_argnums=0, static_argnames=("taps", "runtime"))


def close(got, want, tolerance=3e-6):
    """Equal up to float32 rounding, relative to the largest value."""
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


def model(hf=TINY, **changes):
    return jaxlm.init(hf | changes, key=jax.random.key(0))


@pytest.mark.parametrize("hf", [TINY, pytest.param(GEMMA, marks=pytest.mark.slow)], ids=["llama", "gemma3"])
def test_program_does_not_grow_with_depth(hf):
    """HLO of 2, 8 and 32 layers within 10 %, forward and gradient (compile time: scripts/bench_compile.py)."""
    sizes = []
    for depth in (4, 8, 32) if hf is GEMMA else (2, 8, 32):
        config = family(hf["model_type"]).config(hf | {"num_hidden_layers": depth})
        params = jax.eval_shape(lambda c=config: decoder.init(c, jax.random.key(0)))
        loss = lambda p, c=config: decoder.forward(c, p, TOKENS)[0].sum()
        sizes.append(len(jax.jit(jax.value_and_grad(loss)).lower(params).compile().as_text()))
    assert max(sizes) <= 1.1 * min(sizes), sizes


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing_but_memory(remat):
    m = model()
    loss = lambda p, runtime: decoder.forward(m.config, p, TOKENS, runtime=runtime)[0].var()
    plain, again = (jax.jit(jax.grad(loss), static_argnums=1)(m.params, Runtime(remat=r)) for r in ("none", remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, again)


def test_segments_are_separate_sequences():
    m = model()
    segments = jnp.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    packed, _, _ = forward(m.config, m.params, TOKENS, segments=segments, positions=positions)
    close(packed[:, :4], m(TOKENS[:, :4]))
    close(packed[:, 4:], m(TOKENS[:, 4:]))


def test_dropout_needs_an_rng_and_happens_at_its_rate():
    m = model()
    rates = DropoutConfig(embed=0.2, residual=0.3, attention=0.4)
    config = dataclasses.replace(m.config, dropout=rates)
    run = jax.jit(lambda rng: decoder.forward(config, m.params, TOKENS, rng=rng)[0])
    close(run(None), m(TOKENS))
    first, second = run(jax.random.key(0)), run(jax.random.key(1))
    assert not np.allclose(first, second)
    for name in ("embed", "residual", "attention"):
        one = dataclasses.replace(m.config, dropout=DropoutConfig(**{name: 0.5}))
        assert not np.allclose(forward(one, m.params, TOKENS, rng=jax.random.key(0))[0], m(TOKENS)), name


def test_taps_are_the_stream_after_each_layer():
    m = model(GEMMA, num_hidden_layers=5)
    states = m(TOKENS, output="all_hidden")
    assert states.shape == (6, 2, 9, 16)
    for depth in (1, 3):
        cut = dataclasses.replace(m.config, kinds=m.config.kinds[:depth])
        _, _, aux = forward(cut, m.params, TOKENS, taps=("residual",))
        close(states[depth], aux["residual"][-1])


def test_half_precision_computes_in_half_and_returns_float32_logits():
    m = model()
    half = dataclasses.replace(m, runtime=Runtime(dtype="bfloat16"))
    assert half(TOKENS, output="hidden").dtype == jnp.bfloat16
    assert half(TOKENS).dtype == jnp.float32
    np.testing.assert_allclose(half(TOKENS), m(TOKENS), atol=0.1)


def test_logical_axes_name_every_dimension():
    m = model(GEMMA)
    axes = decoder.logical_axes(m.config)
    is_axes = lambda a: isinstance(a, tuple)
    jax.tree.map(lambda p, a: len(a) == p.ndim or pytest.fail(f"{a} for {p.shape}"), m.params, axes, is_leaf=is_axes)
    assert axes["layers"]["attn"]["q"]["w"] == ("layers", "embed", "heads", "head_dim")


def test_init_is_reproducible_and_scaled():
    params = model(num_hidden_layers=8, hidden_size=64).params
    again = model(num_hidden_layers=8, hidden_size=64).params
    jax.tree.map(np.testing.assert_array_equal, params, again)
    q = np.asarray(params["layers"]["attn"]["q"]["w"])
    assert abs(q.std() - 0.2) < 0.01 and (np.asarray(params["final_norm"]["scale"]) == 1).all()
    assert not np.array_equal(q[0], q[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": ("resid",)}, r"unknown taps \['resid'\]"),
        ({"cache": {}}, "positions must be given"),
        ({"cache": {}, "positions": TOKENS, "segments": TOKENS}, "cannot be combined"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x,
)
def test_bad_options(options, message):
    m = model()
    with pytest.raises(ValueError, match=message):
        decoder.forward(m.config, m.params, TOKENS, **options)


def test_a_length_dependent_rope_needs_the_length_with_a_cache():
    m = model(rope_scaling={"type": "dynamic", "factor": 2.0}, max_position_embeddings=8)
    cache = decoder.init_cache(m.config, m.params, 2, 12)
    with pytest.raises(ValueError, match="need rope_len"):
        decoder.forward(m.config, m.params, TOKENS, positions=jnp.arange(9)[None], cache=cache)


def test_unknown_remat_policy():
    with pytest.raises(ValueError, match="unknown remat policy 'all'; there are none, full, dots"):
        Runtime(remat="all")


def test_every_config_field_is_read():
    """A field that nothing reads is a setting silently ignored."""
    import jaxlm.models.layers as layers
    from jaxlm.models import fields, mlp, moe, rope, self_attention

    source = "".join(
        inspect.getsource(m) for m in (decoder, fields, layers, mlp, moe, rope, self_attention, config_module)
    )
    for name, value in vars(config_module).items():
        if dataclasses.is_dataclass(value) and isinstance(value, type):
            for field in dataclasses.fields(value):
                assert f".{field.name}" in source, f"{name}.{field.name} is never read"
