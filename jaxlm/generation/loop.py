"""Prefill and decode with an explicit, preallocated cache; both jitted, the decode loop on the device."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.generation.sampling import Sampling, sample


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one call: the model's functions and config, how to draw, when to stop, how much room."""

    backbone: ModuleType
    config: Any
    runtime: Any
    sampling: Sampling
    eos: tuple[int, ...]
    pad: int
    new_tokens: int
    length: int  # positions the cache holds: the longest prompt plus new_tokens


State = dict[str, Any]


def generate(
    plan: Plan, params: Any, prompts: Sequence[np.ndarray], seed: int, on_token: Callable[[int], None] | None = None
) -> np.ndarray:
    """Token ids after each prompt, int32 [B, n]: n is the longest row, EOS included, and `pad` fills the rest.

    prompts: 1-D arrays of ids, of any lengths. on_token is told each id of the single prompt as soon as it is known.
    """
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), plan.pad, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in prompts], np.int32)
    state = prefill(plan, params, tokens, lengths, jax.random.key(seed))
    if on_token is None:
        state = decode(plan, params, state, plan.new_tokens)
    else:
        on_token(int(state["out"][0, 0]))
        for step in range(1, plan.new_tokens):
            if state["done"].all():
                break
            state = decode(plan, params, state, step + 1)
            on_token(int(state["out"][0, step]))
    return np.asarray(state["out"][:, : int(state["step"])])


@functools.partial(jax.jit, static_argnums=0)
def prefill(plan: Plan, params: Any, tokens: Array, lengths: Array, key: Array) -> State:
    """Runs the prompts [B, T] (the first lengths[b] of each row count) and draws the first new token."""
    batch, width = tokens.shape
    at = jnp.arange(width)[None]
    positions = jnp.where(at < lengths[:, None], at, -1).astype(jnp.int32)
    x = plan.backbone.embed(plan.config, params, tokens, positions=positions, runtime=plan.runtime)
    cache = plan.backbone.init_cache(plan.config, params, batch, plan.length, x.dtype)
    hidden, cache, _ = plan.backbone.trunk(
        plan.config, params, x, positions=positions, cache=cache, rope_len=plan.length, runtime=plan.runtime
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    logits = plan.backbone.head(plan.config, params, last)[:, 0]
    seen = None
    if plan.sampling.repetition_penalty != 1:
        # Padding is sent out of range, so that only the prompt itself counts as seen.
        ids = jnp.where(positions >= 0, tokens, logits.shape[1])
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], ids].set(True, mode="drop")
    state = {
        "cache": cache,
        "position": lengths,
        "out": jnp.full((batch, plan.new_tokens), plan.pad, jnp.int32),
        "step": jnp.int32(0),
        "done": jnp.zeros(batch, bool),
        "key": key,
        "seen": seen,
    }
    return _append(plan, state, logits)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(plan: Plan, params: Any, state: State, until: int | Array) -> State:
    """Draws tokens until `until` of them exist (at most plan.new_tokens) or every row has ended."""

    def going(state: State) -> Array:
        return (state["step"] < until) & ~state["done"].all()

    def step(state: State) -> State:
        token = jax.lax.dynamic_index_in_dim(state["out"], state["step"] - 1, 1)  # [B, 1]
        positions = state["position"][:, None]
        x = plan.backbone.embed(plan.config, params, token, positions=positions, runtime=plan.runtime)
        hidden, cache, _ = plan.backbone.trunk(
            plan.config, params, x, positions=positions, cache=state["cache"], rope_len=plan.length, runtime=plan.runtime
        )
        logits = plan.backbone.head(plan.config, params, hidden)[:, 0]
        return _append(plan, state | {"cache": cache, "position": state["position"] + 1}, logits)

    return jax.lax.while_loop(going, step, state)


def _append(plan: Plan, state: State, logits: Array) -> State:
    """Draws a token from logits [B, V] and appends it; rows that have ended get padding."""
    key, use = jax.random.split(state["key"])
    drawn = sample(logits, plan.sampling, use, state["seen"])
    token = jnp.where(state["done"], plan.pad, drawn)
    ended = jnp.isin(drawn, jnp.array(plan.eos, jnp.int32)) if plan.eos else jnp.zeros_like(state["done"])
    seen = state["seen"]
    if seen is not None:
        seen = seen.at[jnp.arange(len(drawn)), drawn].set(True)
    return state | {
        "out": jax.lax.dynamic_update_index_in_dim(state["out"], token, state["step"], 1),
        "step": state["step"] + 1,
        "done": state["done"] | ended,
        "key": key,
        "seen": seen,
    }
