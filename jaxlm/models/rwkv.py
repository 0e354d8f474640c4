"""RWKV, versions 4 to 7: a decoder whose memory is a state of one size, however long the text.

Parameters: embed/w, embed_norm/{scale,bias} (the norm before the first layer), layers/... (stacked on axis 0), and
final_norm, head/w as other decoders have them. Under a layer attn is the mixing over time and mlp that over channels.
The cache of a layer is its state: shift [B, D], the last token that the time mixing saw; wkv, float32, [B, N, H, H] (in
version 4 [B, 3, C]); ffn_shift [B, D]. It is the same whatever the length, so a position says only whether a token is
real.

In float16 the stream of deep models overflows. So after every `rescale_every` layers it is halved, and what later
layers add is scaled alike: by powers of two, undone before every norm, so that nothing else changes. The weights stay
what they are.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxlm.kernels.wkv4 import empty_state
from jaxlm.models import adapters as adapting
from jaxlm.models import rwkv_init as starts
from jaxlm.models import stack
from jaxlm.models.config import Kind, NormConfig, groups
from jaxlm.models.decoder import REMAT, TAPS, Runtime, count_positions
from jaxlm.models.layers import Embed, Norm, reducing_in
from jaxlm.models.rwkv_config import RwkvConfig
from jaxlm.models.rwkv_layers import FLOAT, TIME_MIX, ChannelMix, Rows, TimeMix7, rows_of
from jaxlm.parallel.sharding import constrain

__all__ = [
    "CACHE_AXES", "CONSTANT_CACHE", "VIEW", "count_positions", "embed", "forward", "head", "init", "init_cache",
    "layers", "logical_axes", "trunk",
]  # fmt: skip
Params = dict[str, Any]
Cache = dict[str, Any]  # {"state": a dict of stacked arrays, or a tuple of such dicts}
VIEW = True  # parameters may come unrolled (view.py)
CONSTANT_CACHE = True  # its size does not depend on the length
CACHE_AXES = {"wkv": ("layers", "batch", "heads", None, None)}  # where they differ from those of keys and values
STATE = "state"
DEFAULT = Runtime()


class Block(nn.Module):
    """One layer. The stream is x [B, T, D]; in version 7 (x, the values of the first layer [B, T, N, H])."""

    config: RwkvConfig
    kind: Kind

    @nn.compact
    def __call__(self, stream, rows: Rows, state: Params | None, depth):
        c = self.config
        x, first = stream if c.version == 7 else (stream, None)
        scale, after = _scales(c, x.dtype, depth)
        given = state or {name: jnp.zeros((len(x), c.d_model), x.dtype) for name in ("shift", "ffn_shift")}
        time_mix = TimeMix7(c, self.kind.mixer.endswith("_first"), name="attn") if c.version == 7 else None
        time_mix = time_mix or TIME_MIX[c.version](c, name="attn")

        y = self.norm("attn_norm", x, scale)
        shift = rows.last(y, given["shift"])
        y, wkv, first = time_mix(y, given["shift"], given.get("wkv"), first, rows, depth, scale)
        x = x + y
        y = self.norm("mlp_norm", x, scale)
        ffn_shift = rows.last(y, given["ffn_shift"])
        x = x + ChannelMix(c, name="mlp")(y, given["ffn_shift"], rows, depth, scale)
        x = constrain(x if after is None else x * after, "batch", "length", None)
        if state is not None:
            new = {"shift": shift, "wkv": wkv, "ffn_shift": ffn_shift}
            state = {name: array.astype(state[name].dtype) for name, array in new.items()}
        return (x, first) if c.version == 7 else x, state

    def norm(self, name: str, x: Array, scale: Array | None) -> Array:
        return Norm(_norm(self.config), (self.config.d_model,), name=name)(_whole(x, scale)).astype(x.dtype)


def init(config: RwkvConfig, key: Array) -> Params:
    """Fresh float32 parameters, as rwkv_init.py says."""
    params: Any = nn.unbox(_boxed(config, key))
    return params


def logical_axes(config: RwkvConfig) -> Params:
    """The axis names of every parameter: a tree of tuples with the structure of `init`."""
    boxed = jax.eval_shape(lambda k: _boxed(config, k), jax.random.key(0))
    is_box = lambda b: isinstance(b, nn.LogicallyPartitioned)
    axes = jax.tree.map(lambda b: tuple(b.names), boxed, is_leaf=is_box)
    prepend = lambda tree: jax.tree.map(lambda a: ("layers", *a), tree, is_leaf=lambda a: isinstance(a, tuple))
    return axes | {"layers": prepend(axes["layers"])}


def embed(
    config: RwkvConfig,
    params: Params,
    tokens: Array,
    *,
    positions: Array | None = None,
    rng: Array | None = None,
    runtime: Runtime = DEFAULT,
    adapters: Params | None = None,
) -> Array:
    """tokens [B, T] int -> [B, T, D] in the runtime's dtype."""
    x = _apply(_vocabulary(config), params["embed"], tokens)
    return constrain(x.astype(runtime.dtype or x.dtype), "batch", "length", None)


def trunk(
    config: RwkvConfig,
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
    runtime: Runtime = DEFAULT,
    adapters: Params | None = None,
) -> tuple[Array, Cache | None, dict[str, Array]]:
    """x [B, T, D] through all layers and the final norm -> (hidden [B, T, D], cache, aux).

    positions [B, T] int32: -1 marks padding, as False in `valid` [B, T] does; their order is that of x. Padding, on
    either side or between, leaves the state as it is. segments [B, T] int32 keep packed sequences apart, each in one
    piece. The cache holds the state of what came before. taps and adapters as decoder.trunk has them; virtual tokens,
    and an implementation of attention in the runtime, are a ValueError. rng is for the dropout of adapters; rope_len
    changes nothing.
    """
    _check(runtime, adapters, taps, cache, segments)
    if valid is None and positions is not None:
        valid = positions >= 0
    rows = rows_of(valid, segments)
    x = _apply(Norm(_norm(config), (config.d_model,)), params["embed_norm"], x)

    def block(kind: Kind, p: Params, stream, state, depth, rows: Rows, rng):
        own = {}
        if adapters is not None:
            p, own = p["params"], adapting.of_layer(p["adapters"], rng, depth)
        with reducing_in(runtime.reduce_dtype):
            stream, state = _apply(Block(config, kind), p, stream, rows, state, jnp.asarray(depth), adapters=own)
        x = stream[0] if config.version == 7 else stream
        extra = {"residual": _whole(x, _scales(config, x.dtype, depth + 1)[0])} if "residual" in taps else {}
        return stream, state, extra

    stacks = _stacks(config, params)
    if adapters is not None:
        stacks = adapting.beside(stacks, _stacks(config, {"layers": adapters.get("layers", {})}))
    stream: Any = x
    if config.version == 7:
        stream = x, jnp.zeros((*x.shape[:2], config.heads, config.head_dim), x.dtype)
    run = runtime.layers or stack.run
    stream, cache, extras = run(
        block, layers(config), stacks, stream, cache, given=(rows, rng), remat=REMAT[runtime.remat]
    )
    x = stream[0] if config.version == 7 else stream
    aux = {"residual": stack.collect(extras, "residual")} if "residual" in taps else {}
    whole = _whole(x, _scales(config, x.dtype, config.n_layers)[0])
    return _apply(Norm(_norm(config), (config.d_model,)), params["final_norm"], whole).astype(x.dtype), cache, aux


def head(config: RwkvConfig, params: Params, hidden: Array) -> Array:
    """hidden [B, T, D] -> logits [B, T, V] float32."""
    table = params["embed" if config.tie_embeddings else "head"]
    return _apply(_vocabulary(config), table, hidden, method="logits")


def forward(
    config: RwkvConfig,
    params: Params,
    tokens: Array,
    *,
    runtime: Runtime = DEFAULT,
    **options,
) -> tuple[Array, Cache | None, dict[str, Array]]:
    """tokens [B, T] int -> (logits [B, T, V] float32, cache, aux); options as `trunk`."""
    x = embed(config, params, tokens, runtime=runtime)
    hidden, cache, aux = trunk(config, params, x, runtime=runtime, **options)
    return head(config, params, hidden), cache, aux


def init_cache(config: RwkvConfig, params: Params, batch: int, length: int = 0, dtype=jnp.float32) -> Cache:
    """The state before the first token, arrays [L, B, ...]; `length` does not matter.

    For unrolled parameters (view.py) it is a tuple of layers instead.
    """
    shift = jnp.zeros((batch, config.d_model), dtype)
    wkv = jnp.zeros((batch, config.heads, config.head_dim, config.head_dim), FLOAT)
    if config.version == 4:
        wkv = empty_state(batch, config.d_attn)
    empty = {"shift": shift, "wkv": wkv, "ffn_shift": shift}
    if stack.is_unrolled(_stacks(config, params)):
        return {STATE: (empty,) * config.n_layers}
    return {STATE: jax.tree.map(lambda a: jnp.broadcast_to(a, (config.n_layers, *a.shape)), empty)}


def layers(config: RwkvConfig) -> tuple[stack.Layer, ...]:
    """Per depth: the kind of layer, its parameter stack and its cache stack."""
    each = zip(config.kinds, groups(config.kinds), strict=True)
    return tuple(stack.Layer(kind, group, STATE) for kind, group in each)


def _check(runtime: Runtime, adapters: Params | None, taps, cache, segments) -> None:
    if runtime.attention is not None:
        raise ValueError(f"attention={runtime.attention!r}: RWKV has no attention to choose an implementation of")
    if adapting.virtual(adapters):
        raise ValueError("RWKV takes no virtual tokens (prefix or prompt), only low-rank pairs")
    if unknown := set(taps) - set(TAPS):
        raise ValueError(f"unknown taps {sorted(unknown)}; there are {TAPS}")
    if taps and runtime.layers is not None:
        raise ValueError(f"taps={taps} are not returned from a pipeline: its devices see other layers' streams pass by")
    if cache is not None and segments is not None:
        raise ValueError("packed segments and a cache cannot be combined")


def _scales(config: RwkvConfig, dtype, depth) -> tuple[Array | None, Array | None]:
    """By what the stream is multiplied while it is in layer `depth`, and at its end; None where nothing is."""
    if dtype != jnp.float16 or not config.rescale_every:
        return None, None
    steps = np.arange(config.n_layers + 2) // config.rescale_every
    return jnp.asarray(0.5**steps, FLOAT)[depth], jnp.asarray(0.5 ** np.diff(steps), jnp.float16)[depth]


def _whole(x: Array, scale: Array | None) -> Array:
    """The stream as it would be without scaling, float32 where there is some."""
    return x if scale is None else x.astype(FLOAT) / scale


def _boxed(config: RwkvConfig, key: Array) -> Params:
    keys = jax.random.split(key, 3)
    x, at = jnp.zeros((1, 1, config.d_model)), jnp.zeros((1, 1), jnp.int32)
    norm = lambda: Norm(_norm(config), (config.d_model,)).init(key, x)["params"]
    params: Any = {
        "embed": _vocabulary(config, starts.EMBED_STD).init(keys[0], at)["params"],
        "embed_norm": norm(),
        "layers": _boxed_layers(config, keys[1], x),
        "final_norm": norm(),
    }
    if not config.tie_embeddings:
        params["head"] = _vocabulary(config, starts.std(config)).init(keys[2], at)["params"]
    return params


def _boxed_layers(config: RwkvConfig, key: Array, x: Array) -> Params:
    first = jnp.zeros((1, 1, config.heads, config.head_dim))
    stream = (x, first) if config.version == 7 else x

    def one(kind: Kind, key: Array, depth: Array) -> Params:
        made: Any = Block(config, kind).init(key, stream, Rows(), None, depth)
        return made["params"]

    made: Any = {}
    depths: dict[str, list[int]] = {}
    for depth, name in enumerate(groups(config.kinds)):
        depths.setdefault(name, []).append(depth)
    for name, mine in depths.items():
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(mine))
        made[name] = jax.vmap(functools.partial(one, config.kinds[mine[0]]))(keys, jnp.asarray(mine))
    return made.get("", made)


def _stacks(config: RwkvConfig, params: Params) -> dict[str, Any]:
    one_group = groups(config.kinds)[0] == "" and "" not in params["layers"]
    return {"": params["layers"]} if one_group else params["layers"]


def _vocabulary(config: RwkvConfig, std: float = 0.0) -> Embed:
    return Embed((config.vocab_size, config.d_model), std=std)


def _norm(config: RwkvConfig) -> NormConfig:
    return NormConfig(kind="layer", eps=config.eps)


def _apply(module: nn.Module, params: Params, *args, method: str | None = None, adapters: Params | None = None) -> Any:
    return module.apply({"params": params, **({"adapters": adapters} if adapters else {})}, *args, method=method)
