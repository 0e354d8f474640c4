"""The decoder backbone: embed, trunk and head, for every family that is data over it.

Parameters are a nested dict: embed/w, layers/... (stacked on axis 0; layers/<group>/... when layers differ in
structure), final_norm/scale, and head/w when the head is not tied to the embedding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jaxlm.models import adapters as adapting
from jaxlm.models import stack
from jaxlm.models.config import DecoderConfig, Kind, groups, states
from jaxlm.models.layers import Embed, Norm, dropout, reducing_in
from jaxlm.models.mlp import Mlp
from jaxlm.models.moe import Moe, load_balancing_loss
from jaxlm.models.rope import table
from jaxlm.models.self_attention import SelfAttention, State, Tokens, empty_state, write
from jaxlm.parallel.sharding import constrain

Params = dict[str, Any]
Cache = dict[str, Any]  # {state: State, its arrays stacked, or a tuple of them}
TAPS = ("residual",)
VIEW = True  # parameters may come unrolled (view.py)
REMAT = {
    "none": None,
    "full": functools.partial(jax.checkpoint, prevent_cse=False),
    "dots": functools.partial(
        jax.checkpoint,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names("attention"),
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How to run, as opposed to what: static, hashable. dtype is that of activations, None for the embedding's.

    expert_capacity: rows that an expert takes, as a multiple of an even share; what does not fit is dropped, counted in
    aux["router_dropped"]. None drops nothing (models/dispatch.py). layers: what runs them in place of stack.run; a
    hashable, such as parallel/pipeline.py has.
    reduce_dtype: of the gradients of the layers' weights as they are summed over devices.
    """

    dtype: str | None = None
    attention: str | None = None  # an implementation's name, None to choose
    remat: str = "none"  # none; full: keep only each layer's input; dots: keep the products
    expert_capacity: float | None = None
    layers: Callable | None = None
    reduce_dtype: str = "float32"

    def __post_init__(self):
        if self.reduce_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"reduce_dtype={self.reduce_dtype!r}: expected float32 or bfloat16")
        if self.remat not in REMAT:
            raise ValueError(f"unknown remat policy {self.remat!r}; there are {', '.join(REMAT)}")
        if self.expert_capacity is not None and not self.expert_capacity > 0:
            raise ValueError(f"expert_capacity={self.expert_capacity}: expected a number above 0, or None")


class Block(nn.Module):
    """One layer: mixer and feed-forward branch, each normed before, after or both, added to the stream."""

    config: DecoderConfig
    kind: Kind
    impl: str | None = None
    capacity: float | None = None

    @nn.compact
    def __call__(self, x: Array, tokens: Tokens, state: State | None, depth, rng):
        c = self.config
        keys = (None,) * 3 if rng is None else jax.random.split(jax.random.fold_in(rng, depth), 3)
        norm = lambda name, on, y: Norm(c.norm, (c.d_model,), name=name)(y) if on else y
        add = lambda x, y, key: (
            x + dropout(y * c.residual_scale if c.residual_scale != 1 else y, c.dropout.residual, key)
        )
        y, state = SelfAttention(c, self.kind, self.impl, name="attn")(
            norm("attn_norm", c.pre_norm, x), tokens, state, depth, keys[0]
        )
        x = add(x, norm("attn_post_norm", c.post_norm, y), keys[1])
        y, extra = norm("mlp_norm", c.pre_norm, x), {}
        if self.kind.mlp == "moe":
            assert c.moe is not None
            y, extra = Moe(c.moe, c.d_model, c.init_std, self.capacity, name="mlp")(y, tokens.valid)
        else:
            assert c.mlp is not None
            y = Mlp(c.mlp, c.d_model, c.init_std, name="mlp")(y)
        x = add(x, norm("mlp_post_norm", c.post_norm, y), keys[2])
        return constrain(x, "batch", "length", None), state, extra


def init(config: DecoderConfig, key: Array) -> Params:
    """Fresh float32 parameters: normal(init_std) matrices, unit norms, zero biases."""
    params: Any = nn.unbox(_boxed(config, key))
    return params


def logical_axes(config: DecoderConfig) -> Params:
    """The axis names of every parameter: a tree of tuples with the structure of `init`."""
    boxed = jax.eval_shape(lambda k: _boxed(config, k), jax.random.key(0))
    is_box = lambda b: isinstance(b, nn.LogicallyPartitioned)
    axes = jax.tree.map(lambda b: tuple(b.names), boxed, is_leaf=is_box)
    prepend = lambda tree: jax.tree.map(lambda a: ("layers", *a), tree, is_leaf=lambda a: isinstance(a, tuple))
    return axes | {"layers": prepend(axes["layers"])}


def embed(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    *,
    positions: Array | None = None,
    rng: Array | None = None,
    runtime: Runtime = Runtime(),
    adapters: Params | None = None,
) -> Array:
    """tokens [B, T] int -> [B, T, D] in the runtime's dtype; positions [B, T] matter to learned positions only.

    Adapters with virtual tokens move the positions: give `embed` what `trunk` gets.
    """
    x = _apply(_vocabulary(config), params["embed"], tokens)
    x = x.astype(runtime.dtype or x.dtype)
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.learned_positions:
        first = adapting.virtual(adapters)
        if first + tokens.shape[1] > config.context:
            raise ValueError(f"{first + tokens.shape[1]} tokens do not fit the {config.context} learned positions")
        at = jnp.arange(tokens.shape[1])[None] if positions is None else jnp.maximum(positions, 0)
        at = at + first if first else at
        x = x + _apply(_position_embed(config), params["positions"], at).astype(x.dtype)
    return dropout(constrain(x, "batch", "length", None), config.dropout.embed, rng)


def trunk(
    config: DecoderConfig,
    params: Params,
    x: Array,
    *,
    positions: Array | None = None,
    segments: Array | None = None,
    valid: Array | None = None,
    cache: Cache | None = None,
    rope_len: int | None = None,
    taps: tuple[str, ...] = (),
    rng: Array | None = None,
    runtime: Runtime = Runtime(),
    adapters: Params | None = None,
) -> tuple[Array, Cache | None, dict[str, Array]]:
    """x [B, T, D] through all layers and the final norm -> (hidden [B, T, D], cache, aux).

    positions [B, T] int32, -1 for padding, default 0..T-1 (with `valid` [B, T] bool: counted over valid tokens);
    required with a cache, which holds what came before. segments [B, T] int32 keep packed sequences apart, each
    in one piece. rope_len
    (default T) is the length that `dynamic` and `longrope` frequencies are made for; with a cache it must be given
    for those. taps=("residual",) returns the stream after each layer, aux["residual"] [L, B, T, D]. aux["router_loss"]
    is the load-balancing loss of mixture-of-experts layers, aux["router_dropped"] the share of choices that found no
    room. rng switches dropout on. adapters: a tree as
    models/adapters.py describes it; its virtual tokens come first, seen by all, and are in no result; positions and
    rope_len do not count them. With a cache they are in it (`begin`), and counted.
    """
    prompt, room = None, adapting.virtual(adapters)
    if room:
        if cache is not None:
            raise ValueError("with a cache, virtual tokens are in it (`begin`): pass adapters without them")
        prompt = _prompt(config, params, adapters, x)
        rope_len = (rope_len or x.shape[1]) + room
        x, positions, segments = adapting.make_room(room, prompt, x, positions, segments, valid)
        valid = None
    tokens = _tokens(config, x, positions, segments, valid, cache, rope_len, room)
    if unknown := set(taps) - set(TAPS):
        raise ValueError(f"unknown taps {sorted(unknown)}; there are {TAPS}")

    if taps and runtime.layers is not None:
        raise ValueError(f"taps={taps} are not returned from a pipeline: its devices see other layers' streams pass by")

    def block(kind: Kind, p: Params, x: Array, state: State | None, depth, tokens: Tokens, rng):
        own = {}
        if adapters is not None:
            p, own = p["params"], adapting.of_layer(p["adapters"], rng, depth)
        args = x, tokens, state, jnp.asarray(depth), rng
        module = Block(config, kind, runtime.attention, runtime.expert_capacity)
        with reducing_in(runtime.reduce_dtype):
            x, state, extra = _apply(module, p, *args, adapters=own)
        return x, state, extra | ({"residual": x} if "residual" in taps else {})

    stacks = _stacks(config, params)
    if adapters is not None:
        stacks = adapting.beside(stacks, _stacks(config, {"layers": adapters.get("layers", {})}))
    run, given = runtime.layers or stack.run, (tokens, rng)
    x, cache, extras = run(block, layers(config), stacks, x, cache, given=given, remat=REMAT[runtime.remat])
    x = x if prompt is None else x[:, room:]
    aux = {}
    if "residual" in taps:
        stream = stack.collect(extras, "residual")
        aux["residual"] = stream if prompt is None else stream[:, :, room:]
    if any(kind.mlp == "moe" for kind in config.kinds):
        picks, probs, count = (stack.collect(extras, f"router_{name}") for name in ("picks", "probs", "tokens"))
        aux["router_loss"] = load_balancing_loss(picks, probs, count)
        aux["router_dropped"] = stack.collect(extras, "router_dropped").sum() / picks.sum()
    return _apply(_final_norm(config), params["final_norm"], x), cache, aux


def head(config: DecoderConfig, params: Params, hidden: Array) -> Array:
    """hidden [B, T, D] -> logits [B, T, V] float32."""
    table = params["embed" if config.tie_embeddings else "head"]
    logits = _apply(_vocabulary(config), table, hidden, method="logits")
    if config.logit_scale != 1:
        logits = logits * config.logit_scale
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def forward(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    *,
    positions: Array | None = None,
    valid: Array | None = None,
    rng: Array | None = None,
    runtime: Runtime = Runtime(),
    adapters: Params | None = None,
    **options,
) -> tuple[Array, Cache | None, dict[str, Array]]:
    """tokens [B, T] int -> (logits [B, T, V] float32, cache, aux); options as `trunk`."""
    if positions is None and valid is not None:
        positions = count_positions(valid)
    both: Any = {"positions": positions, "rng": rng, "runtime": runtime, "adapters": adapters}
    x = embed(config, params, tokens, **both)
    hidden, cache, aux = trunk(config, params, x, valid=valid, **both, **options)
    return head(config, params, hidden), cache, aux


def init_cache(config: DecoderConfig, params: Params, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """An empty cache for `length` positions, {state: arrays [L_state, B, ...]}; windowed layers keep their window.

    For unrolled parameters (view.py) each state is a tuple of layers instead.
    """
    unrolled = stack.is_unrolled(_stacks(config, params))
    by_state: dict[str, list[Kind]] = {}
    for name, kind in zip(states(config.kinds), config.kinds, strict=True):
        by_state.setdefault(name, []).append(kind)
    empty = {name: empty_state(config, kinds[0], batch, length, dtype) for name, kinds in by_state.items()}
    if unrolled:
        return {name: (state,) * len(by_state[name]) for name, state in empty.items()}
    stacked = lambda n: lambda a: jnp.broadcast_to(a, (n, *a.shape))
    return {name: jax.tree.map(stacked(len(by_state[name])), state) for name, state in empty.items()}


def begin(
    config: DecoderConfig,
    params: Params,
    adapters: Params,
    cache: Cache,
    batch: int,
    *,
    rope_len: int | None = None,
    runtime: Runtime = Runtime(),
) -> Cache:
    """An empty cache with the adapters' virtual tokens in it, at positions 0..P-1; the real ones begin at P.

    rope_len counts them, as it does for `trunk` with a cache.
    """
    n = adapting.virtual(adapters)
    at = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
    if "prompt" in adapters:
        dtype = runtime.dtype or jax.tree.leaves(params["embed"])[0].dtype
        x = _prompt(config, params, adapters, jnp.zeros((batch, 0, config.d_model), dtype))
        assert x is not None
        _, full, _ = trunk(config, params, x, positions=at, cache=cache, rope_len=rope_len, runtime=runtime)
        assert full is not None
        return full
    keys, seen = adapting.prefix_of(adapters), dict.fromkeys(groups(config.kinds), 0)
    by_state: dict[str, list[tuple[Array, Array]]] = {}
    for layer in layers(config):
        first = [jnp.broadcast_to(a[seen[layer.group]], (batch, *a.shape[1:])) for a in keys[layer.group]]
        by_state.setdefault(layer.state, []).append((first[0], first[1]))
        seen[layer.group] += 1

    def filled(state: Any, new: list[tuple[Array, Array]]) -> Any:
        if isinstance(state, tuple):
            return tuple(write(one, k, v, at) for one, (k, v) in zip(state, new, strict=True))
        k, v = map(jnp.stack, zip(*new, strict=True))
        return jax.vmap(write, in_axes=(0, 0, 0, None))(state, k, v, at)

    return {name: filled(cache[name], new) for name, new in by_state.items()}


def layers(config: DecoderConfig) -> tuple[stack.Layer, ...]:
    """Per depth: the kind of layer, its parameter stack and its cache stack."""
    return tuple(map(stack.Layer, config.kinds, groups(config.kinds), states(config.kinds)))


def count_positions(valid: Array) -> Array:
    """valid [B, T] bool -> positions counted over valid tokens, -1 elsewhere."""
    return jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, -1).astype(jnp.int32)


def _tokens(config, x, positions, segments, valid, cache, rope_len, room) -> Tokens:
    if cache is not None and positions is None:
        raise ValueError("with a cache, positions must be given: the cache does not know which tokens are new")
    if cache is not None and segments is not None:
        raise ValueError("packed segments and a cache cannot be combined")
    ropes = {kind.rope for kind in config.kinds if kind.rope is not None}
    if cache is not None and rope_len is None and any(rope.depends_on_length for rope in ropes):
        raise ValueError("with a cache, dynamic and longrope frequencies need rope_len: prompt plus new tokens")
    if valid is not None:
        positions = count_positions(valid) if positions is None else jnp.where(valid, positions, -1)
    elif positions is not None:
        valid = positions >= 0
    at = jnp.arange(x.shape[1])[None] if positions is None else positions
    tables = {rope: table(rope, at, rope_len or x.shape[1]) for rope in ropes}
    return Tokens(positions, segments, valid, tables, room if room and segments is not None else None)


def _boxed(config: DecoderConfig, key: Array) -> Params:
    keys = dict(zip(("embed", "positions", "layers", "final_norm", "head"), jax.random.split(key, 5), strict=True))
    x, at = jnp.zeros((1, 1, config.d_model)), jnp.zeros((1, 1), jnp.int32)
    params: Any = {
        "embed": _vocabulary(config).init(keys["embed"], at)["params"],
        "layers": _boxed_layers(config, keys["layers"], x, at),
        "final_norm": _final_norm(config).init(keys["final_norm"], x)["params"],
    }
    if config.learned_positions:
        params["positions"] = _position_embed(config).init(keys["positions"], at)["params"]
    if not config.tie_embeddings:
        params["head"] = _vocabulary(config).init(keys["head"], at)["params"]
    return params


def _boxed_layers(config: DecoderConfig, key: Array, x: Array, at: Array) -> Params:
    tables = {kind.rope: table(kind.rope, at, 1) for kind in config.kinds if kind.rope is not None}

    def one(kind: Kind, key: Array) -> Params:
        made: Any = Block(config, kind).init(key, x, Tokens(tables=tables), None, jnp.int32(0), None)
        return made["params"]

    by_group: dict[str, list[Kind]] = {}
    for name, kind in zip(groups(config.kinds), config.kinds, strict=True):
        by_group.setdefault(name, []).append(kind)
    made: Any = {}
    for i, (name, kinds) in enumerate(by_group.items()):
        keys = jax.random.split(jax.random.fold_in(key, i), len(kinds))
        made[name] = jax.vmap(functools.partial(one, kinds[0]))(keys)
    return made.get("", made)


def _prompt(config: DecoderConfig, params: Params, adapters: Params | None, x: Array) -> Array | None:
    """The prompt's virtual tokens for x's batch, [B, P, D], with their positions where those are learned."""
    if adapters is None or "prompt" not in adapters:
        return None
    rows = adapters["prompt"]["w"].astype(x.dtype)
    if config.learned_positions:
        rows = rows + _apply(_position_embed(config), params["positions"], jnp.arange(len(rows))).astype(x.dtype)
    return jnp.broadcast_to(rows, (len(x), *rows.shape))


def _stacks(config: DecoderConfig, params: Params) -> dict[str, Any]:
    one_group = groups(config.kinds)[0] == "" and "" not in params["layers"]
    return {"": params["layers"]} if one_group else params["layers"]


def _vocabulary(config: DecoderConfig) -> Embed:
    """The table [V, D] of tokens, and that of the output head: the same one when they are tied."""
    return Embed((config.vocab_size, config.d_model), std=config.init_std)


def _position_embed(config: DecoderConfig) -> Embed:
    return Embed((config.context, config.d_model), ("positions", "embed"), config.init_std)


def _final_norm(config: DecoderConfig) -> Norm:
    return Norm(config.norm, (config.d_model,))


def _apply(module: nn.Module, params: Params, *args, method: str | None = None, adapters: Params | None = None) -> Any:
    return module.apply({"params": params, **({"adapters": adapters} if adapters else {})}, *args, method=method)
