"""A vocabulary of another size: rows added to, or cut off, every table that has one for each token."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxlm import inputs
from jaxlm.checkpoints.load import flatten, unflatten

if TYPE_CHECKING:
    from jaxlm.model import Model

SPREAD = math.sqrt(1e-9)  # of drawn rows, in standard deviations of those there are; transformers' choice


def resize_embeddings(
    model: "Model", n: int, *, multiple_of: int = 1, key: jax.Array | None = None, force: bool = False
) -> None:
    """Gives the model a vocabulary of n tokens, rounded up to a multiple of `multiple_of`; config.json follows.

    New rows are the mean of those there are, as transformers does it (mean_resizing), so that no new token is likelier
    than an average one. transformers draws them around that mean with a variance of 1e-9 of the rows': so does `key`,
    with each dimension drawn on its own. The old tokens' logits do not change. Cutting off tokens that the tokenizer or
    config.json uses is a ValueError, unless force=True.
    """
    inputs.positive("n", n)
    inputs.positive("multiple_of", multiple_of)
    n = -(-n // multiple_of) * multiple_of
    old = model.config.vocab_size
    if n < old and not force:
        _check_unused(model, n)
    is_axes = lambda a: isinstance(a, tuple)
    axes: Any = model.family.backbone.logical_axes(model.config)
    axes = {path: a for path, a in flatten(axes).items() if is_axes(a) and "vocab" in a}
    leaves = flatten(model.params)
    keys = dict.fromkeys(axes) if key is None else dict(zip(axes, jax.random.split(key, len(axes)), strict=True))
    for path, names in axes.items():
        leaves[path] = _resized(leaves[path], names.index("vocab"), n, keys[path])
    model.config = dataclasses.replace(model.config, vocab_size=n)
    model.params = unflatten(leaves)
    model.hf_config = model.hf_config | {"vocab_size": n}


def _resized(table: jax.Array, axis: int, n: int, key: jax.Array | None) -> jax.Array:
    old = table.shape[axis]
    if n <= old:
        return jax.lax.slice_in_dim(table, 0, n, axis=axis)
    rows = jnp.mean(table, axis, keepdims=True, dtype=jnp.float32)
    shape = tuple(n - old if i == axis else size for i, size in enumerate(table.shape))
    if key is None:
        rows = jnp.broadcast_to(rows, shape)
    else:
        spread = SPREAD * jnp.std(table, axis, keepdims=True, dtype=jnp.float32)
        rows = rows + spread * jax.random.normal(key, shape)
    return jnp.concatenate([table, rows.astype(table.dtype)], axis)


def _check_unused(model: "Model", n: int) -> None:
    """ValueError when a token from n on is one of the tokenizer's, or a special token."""
    for where in (model.hf_config, model.generation_config):
        for name in inputs.SPECIAL_TOKENS:
            value = where.get(name)
            cut = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i >= n]
            if cut:
                raise ValueError(f"{n} tokens would cut off {name} {cut[0]}: expected more, or force=True")
    try:
        used = 0 if model.opened is None else len(model.tokenizer)
    except FileNotFoundError:
        used = 0
    if used > n:
        raise ValueError(f"{n} tokens would cut off some of the tokenizer's {used}: expected that many, or force=True")
