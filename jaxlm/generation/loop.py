"""Prefill, extend and decode with an explicit, preallocated cache; all jitted, the decode loop on the device."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxlm.generation.sampling import Sampling, sample
from jaxlm.parallel.sharding import everywhere


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a generation: the model's functions and config, how to draw, how much room."""

    backbone: ModuleType
    config: Any
    runtime: Any
    sampling: Sampling
    eos: tuple[int, ...]
    pad: int
    capacity: int  # new tokens there is room for
    length: int  # positions the cache holds, beside virtual tokens
    rope_len: int | None = None  # for RoPE whose frequencies depend on the length: prompt plus new tokens
    virtual: int = 0  # tokens that stand before the first: params["adapters"] has them
    mesh: Mesh | None = None  # over which the parameters are laid out; callers put it in force
    logprobs: bool = False  # keep the log-probability of each token drawn, before temperature and filters


State = dict[str, Any]
"""cache; position [B], the number of tokens in it; out [B, capacity], drawn, of which the last is not yet in the cache;
logprobs like out, or None; step, how many are drawn; done [B]; key; seen [B, V] or None, for repetition penalties."""


@functools.partial(jax.jit, static_argnums=(0, 5))
def prefill(plan: Plan, params: Any, tokens: Array, lengths: Array, key: Array, samples: int = 1) -> State:
    """A new cache with the prompts [B, T] (the first lengths[b] of each row count), and the first token drawn.

    With samples > 1 each row of the state is repeated that often before drawing, [B * samples].
    """
    batch = tokens.shape[0]
    dtype = plan.runtime.dtype or jax.tree.leaves(params["embed"])[0].dtype
    seen = None
    if plan.sampling.repetition_penalty != 1:
        seen = jnp.zeros((batch, plan.config.vocab_size), bool)
    cache = plan.backbone.init_cache(plan.config, params, batch, plan.length + plan.virtual, dtype)
    if plan.virtual:
        options = {"rope_len": plan.rope_len, "runtime": plan.runtime}
        cache = plan.backbone.begin(plan.config, params, params["adapters"], cache, batch, **options)
    state = {
        "cache": cache,
        "position": jnp.full(batch, plan.virtual, jnp.int32),
        "key": key,
        "seen": seen,
    }
    return _extend(plan, params, state, tokens, lengths, samples)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(plan: Plan, params: Any, state: State, tokens: Array, lengths: Array) -> State:
    """Feeds more tokens [B, T] after those in the cache, and draws the first token that follows them."""
    return _extend(plan, params, state, tokens, lengths)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(plan: Plan, params: Any, state: State, until: int | Array) -> tuple[State, Array]:
    """Draws tokens until `until` of them exist (at most plan.capacity) or every row has ended; the last one too [B]."""

    def going(state: State) -> Array:
        return (state["step"] < until) & ~state["done"].all()

    def step(state: State) -> State:
        token = jax.lax.dynamic_index_in_dim(state["out"], state["step"] - 1, 1)  # [B, 1]
        logits, cache = _forward(plan, params, state["cache"], token, state["position"][:, None])
        return _append(plan, state | {"cache": cache, "position": state["position"] + 1}, logits[:, 0])

    state = jax.lax.while_loop(going, step, state)
    return state, everywhere(jax.lax.dynamic_index_in_dim(state["out"], state["step"] - 1, 1, keepdims=False))


def _extend(plan: Plan, params: Any, state: State, tokens: Array, lengths: Array, samples: int = 1) -> State:
    batch, width = tokens.shape
    at = jnp.arange(width)[None]
    real = at < lengths[:, None]
    positions = jnp.where(real, state["position"][:, None] + at, -1).astype(jnp.int32)
    logits, cache = _forward(plan, params, state["cache"], tokens, positions, lengths - 1)
    seen = state["seen"]
    if seen is not None:
        # Padding is sent out of range, so that only the prompt itself counts as seen.
        ids = jnp.where(real, tokens, logits.shape[-1])
        seen = seen.at[jnp.arange(batch)[:, None], ids].set(True, mode="drop")
    rows = {"position": state["position"] + lengths, "seen": seen, "logits": logits[:, 0]}
    if samples > 1:
        again = lambda axis: lambda a: jnp.repeat(a, samples, axis)
        unrolled = any(isinstance(layers, tuple) for layers in cache.values())
        cache = jax.tree.map(again(0 if unrolled else 1), cache)  # stacks have the layers first
        rows = jax.tree.map(again(0), rows)
    logits = rows.pop("logits")
    return _append(plan, _fresh(plan, len(logits)) | rows | {"cache": cache, "key": state["key"]}, logits)


def _fresh(plan: Plan, batch: int) -> State:
    """Nothing drawn yet."""
    shape = (batch, plan.capacity)
    return {
        "out": jnp.full(shape, plan.pad, jnp.int32),
        "logprobs": jnp.zeros(shape) if plan.logprobs else None,
        "step": jnp.int32(0),
        "done": jnp.zeros(batch, bool),
    }


def _forward(plan: Plan, params: Any, cache: Any, tokens: Array, positions: Array, only: Array | None = None):
    """Logits [B, T, V], or [B, 1, V] at index `only` of each row; and the cache."""
    x = plan.backbone.embed(plan.config, params, tokens, positions=positions, runtime=plan.runtime)
    options = {"positions": positions, "cache": cache, "rope_len": plan.rope_len, "runtime": plan.runtime}
    hidden, cache, _ = plan.backbone.trunk(plan.config, params, x, **options)
    if only is not None:
        hidden = jnp.take_along_axis(hidden, only[:, None, None], axis=1)
    return plan.backbone.head(plan.config, params, hidden), cache


def _append(plan: Plan, state: State, logits: Array) -> State:
    """Draws a token from logits [B, V] and appends it; rows that have ended get padding."""
    key, use = jax.random.split(state["key"])
    drawn = sample(logits, plan.sampling, use, state["seen"])
    token = jnp.where(state["done"], plan.pad, drawn)
    ended = jnp.isin(drawn, jnp.array(plan.eos, jnp.int32)) if plan.eos else jnp.zeros_like(state["done"])
    put = lambda into, new: jax.lax.dynamic_update_index_in_dim(into, new, state["step"], 1)
    seen, logprobs = state["seen"], state["logprobs"]
    if seen is not None:
        seen = seen.at[jnp.arange(len(drawn)), drawn].set(True)
    if logprobs is not None:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], 1)[:, 0]
        logprobs = put(logprobs, jnp.where(state["done"], 0, chosen))
    rest = {
        "out": put(state["out"], token),
        "logprobs": logprobs,
        "step": state["step"] + 1,
        "done": state["done"] | ended,
        "key": key,
        "seen": seen,
    }
    return state | everywhere(rest)


def pad_rows(rows: Sequence[np.ndarray], width: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, width] with each row at the left, and the rows' lengths."""
    tokens = np.full((len(rows), width), pad, np.int32)
    for into, row in zip(tokens, rows, strict=True):
        into[: len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def bucket(n: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, 48, ...: four sizes to each doubling, so that few lengths compile anew."""
    step = max(4, 1 << max(0, (n - 1).bit_length() - 3))
    return max(16, -(-n // step) * step)


def stream(plan: Plan, params: Any, state: State, limit: int, on_token: Callable[[int], bool], ahead: int = 1) -> State:
    """Decodes the one row of `state` to `limit` tokens, telling on_token each; it returns False to stop.

    The next step is under way before a token is looked at, so that the device never waits for the host.
    """
    pending = [state["out"][:, 0]]
    for step in range(1, limit + ahead):
        if step < limit:
            state, token = decode(plan, params, state, step + 1)
            pending.append(token)
        if len(pending) > ahead or step >= limit:
            token = int(pending.pop(0)[0])
            if not on_token(token) or token in plan.eos:
                break
    return state
