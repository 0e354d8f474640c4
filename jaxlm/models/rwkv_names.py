"""The names of RWKV's tensors: those of the published .pth files, and those that ports to transformers and candle gave.

All tell of the same tensors, but for version 7 in flash-linear-attention, which stores products of low rank as linear
layers. What a table has beyond the leaves of a version fills nothing.
"""

from collections.abc import Callable

from jaxlm.checkpoints.rules import Alias, AnyRule, Interleaved, Rule
from jaxlm.models.rwkv_config import RwkvConfig

Table = Callable[[RwkvConfig], tuple[AnyRule, ...]]
P = "layers/"
ROW = "() () d -> d"  # [1, 1, D]
LETTERS = {"k": "key", "v": "value", "r": "receptance", "g": "gate", "x": "x", "w": "w"}


def blinkdl(config: RwkvConfig) -> tuple[AnyRule, ...]:
    """RWKV-LM's own: emb.weight, blocks.0.att.key.weight, blocks.0.ffn.time_mix_k ..."""
    block = "blocks.{layer}."
    names = _common("emb.weight", "blocks.0.ln0", block + "ln1", block + "ln2", "ln_out", "head.weight", config)
    att, ffn = block + "att.", block + "ffn."
    if config.version == 7:
        mixes = [Rule(f"{att}x_{name}", f"{P}attn/mix_{name}", ROW) for name in "rwkvag"]
        low = []
        for name in "wavg":
            low += [
                Rule(f"{att}{name}1", f"{P}attn/{name}_in/w"),
                Rule(f"{att}{name}2", f"{P}attn/{name}_out/w", "e (n h) -> e n h"),
                Rule(f"{att}{name}0", f"{P}attn/{name}_bias", "() () (n h) -> n h", keep_f32=name == "w"),
            ]
        rows = [Rule(f"{att}{name}", f"{P}attn/{name}", "() () (n h) -> n h") for name in ("k_k", "k_a")]
        linear = (("receptance", "r"), ("key", "k"), ("value", "v"), ("output", "output"))
        own = (*mixes, *low, *rows, Rule(att + "r_k", P + "attn/r_k"), *_linear(att, config, linear))
        return (*names, *own, *_group_norm(att + "ln_x"), Rule(ffn + "x_k", P + "mlp/mix_k", ROW), *_channel(ffn))
    kind = "maa" if config.version == 6 else "mix"
    letter = {name: name for name in LETTERS}
    return (*names, *_time(att, config, kind, letter), *_channel(ffn), *_mixes(ffn, "mlp", kind, letter, "kr"))


def hf(config: RwkvConfig) -> tuple[AnyRule, ...]:
    """transformers' (version 4) and those of the models on the hub (5 and 6): rwkv.blocks.0.attention.key.weight ..."""
    letter = {name: name for name in LETTERS} if config.version == 6 else LETTERS
    return _ported(config, "maa" if config.version == 6 else "mix", letter)


def candle(config: RwkvConfig) -> tuple[AnyRule, ...]:
    """Version 6 as candle reads it: those of version 5, time_mix_key in the place of time_maa_k."""
    return _ported(config, "mix", LETTERS)


def fla(config: RwkvConfig) -> tuple[AnyRule, ...]:
    """Version 7 in flash-linear-attention: model.layers.0.attn.r_proj.weight ..."""
    attn = "model.layers.{layer}.attn."
    return (*_fla(config), *(Rule(f"{attn}x_{name}", f"{P}attn/mix_{name}", ROW) for name in "rwkvag"))


def fla_joined(config: RwkvConfig) -> tuple[AnyRule, ...]:
    """As `fla`, by its first release: the blends of a layer in one tensor."""
    paths = tuple(f"{P}attn/mix_{name}" for name in "rwkvag")
    return (*_fla(config), Interleaved("model.layers.{layer}.attn.x_x", paths, "c d -> c d"))


def _fla(config: RwkvConfig) -> tuple[AnyRule, ...]:
    layer, first = "model.layers.{layer}.", "model.layers.0."
    norms = first + "pre_norm", layer + "attn_norm", layer + "ffn_norm"
    names = _common("model.embeddings.weight", *norms, "model.norm", "lm_head.weight", config)
    attn, low = layer + "attn.", []
    for name in "wavg":
        low += [
            Rule(f"{attn}{name}_lora.lora.0.weight", f"{P}attn/{name}_in/w", "e d -> d e"),
            Rule(f"{attn}{name}_lora.lora.2.weight", f"{P}attn/{name}_out/w", "(n h) e -> e n h"),
            Rule(f"{attn}{name}_lora.lora.2.bias", f"{P}attn/{name}_bias", "(n h) -> n h", keep_f32=name == "w"),
        ]
    rows = [Rule(f"{attn}{name}", f"{P}attn/{name}", "(n h) -> n h") for name in ("k_k", "k_a")]
    linear = (("r_proj", "r"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "output"))
    own = (*low, *rows, Rule(attn + "r_k", P + "attn/r_k"), *_linear(attn, config, linear))
    return (
        *names, *own, *_group_norm(attn + "g_norm"), Rule(layer + "ffn.x_k", P + "mlp/mix_k"), *_channel(layer + "ffn.")
    )  # fmt: skip


def _ported(config: RwkvConfig, kind: str, letter: dict[str, str]) -> tuple[AnyRule, ...]:
    block = "rwkv.blocks.{layer}."
    norms = "rwkv.blocks.0.pre_ln", block + "ln1", block + "ln2"
    names = _common("rwkv.embeddings.weight", *norms, "rwkv.ln_out", "head.weight", config)
    att, ffn = block + "attention.", block + "feed_forward."
    return (*names, *_time(att, config, kind, letter), *_channel(ffn), *_mixes(ffn, "mlp", kind, letter, "kr"))


def _common(table, before, attn, mlp, after, head, config: RwkvConfig) -> tuple[AnyRule, ...]:
    norms = {before: "embed_norm", attn: P + "attn_norm", mlp: P + "mlp_norm", after: "final_norm"}
    pair = lambda stored, path: (Rule(stored + ".weight", path + "/scale"), Rule(stored + ".bias", path + "/bias"))
    tied = Alias(head, table) if config.tie_embeddings else Rule(head, "head/w")
    return (Rule(table, "embed/w"), tied, *(rule for names in norms.items() for rule in pair(*names)))


def _time(att: str, config: RwkvConfig, kind: str, letter: dict[str, str]) -> tuple[AnyRule, ...]:
    """The time mixing of versions 4 to 6."""
    matrix = {4: None, 5.0: None, 5.1: None, 5.2: None, 6: "() () (n h) -> n h"}[config.version]
    bonus = "time_first" if config.version == 4 or config.log_bonus else "time_faaaa"
    linear = tuple((name, name) for name in ("key", "value", "receptance", "gate", "output"))
    return (
        *_mixes(att, "attn", kind, letter, "kvrgxw" if config.version == 6 else "kvrg"),
        Rule(f"{att}time_{kind}_w1", P + "attn/mix_in", "d (s e) -> d s e"),
        Rule(f"{att}time_{kind}_w2", P + "attn/mix_out"),
        Rule(att + "time_decay", P + "attn/decay", matrix, keep_f32=True),
        Rule(att + "time_decay_w1", P + "attn/decay_in"),
        Rule(att + "time_decay_w2", P + "attn/decay_out", "e (n h) -> e n h"),
        Rule(att + bonus, P + "attn/bonus", keep_f32=True),
        *_linear(att, config, linear),
        *_group_norm(att + "ln_x"),
    )


def _mixes(prefix: str, part: str, kind: str, letter: dict[str, str], names: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{prefix}time_{kind}_{letter[name]}", f"{P}{part}/mix_{name}", ROW) for name in names)


def _linear(att: str, config: RwkvConfig, names: tuple[tuple[str, str], ...]) -> tuple[Rule, ...]:
    """The matrices of the time mixing, [out, in] as stored."""
    into, out = ("(n h) d -> d n h", "d (n h) -> n h d") if config.head_dim else ("c d -> d c", "d c -> c d")
    return tuple(Rule(f"{att}{a}.weight", f"{P}attn/{b}/w", out if b == "output" else into) for a, b in names)


def _group_norm(name: str) -> tuple[Rule, ...]:
    return (
        Rule(name + ".weight", P + "attn/norm_scale", "(n h) -> n h"),
        Rule(name + ".bias", P + "attn/norm_bias", "(n h) -> n h"),
    )


def _channel(ffn: str) -> tuple[Rule, ...]:
    return (
        Rule(ffn + "key.weight", P + "mlp/key/w", "f d -> d f"),
        Rule(ffn + "value.weight", P + "mlp/value/w", "d f -> f d"),
        Rule(ffn + "receptance.weight", P + "mlp/receptance/w", "e d -> d e"),
    )
