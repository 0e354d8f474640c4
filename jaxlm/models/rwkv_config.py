"""The frozen configuration of the RWKV models, and the keys of config.json that each model_type takes.

Keys that change what is computed; every other key is inert or an error. `hidden_size`, `num_hidden_layers` and
`vocab_size` are always required.

rwkv (version 4)
    attention_hidden_size (default hidden_size), intermediate_size (4 hidden_size), layer_norm_epsilon (1e-5),
    context_length (1024), rescale_every (6), tie_word_embeddings (false)
rwkv5 (5.0, 5.1, 5.2), rwkv5_2 (5.2)
    those (context_length 4096, intermediate_size 3.5 hidden_size in whole 32s), and
    model_version: "5_0", "5_1" (a gate), "5_2" (decay and bonus by channel); default "5_2", as published for `rwkv5`
    head_size (64), head_size_divisor (8): the group norm's eps is 1e-5 head_size_divisor^2
    rwkv_bonus: "time_faaaa", or "time_first", whose tensor holds the logarithm (default in 5.0)
rwkv6
    those of rwkv5 but model_version and rwkv_bonus, and
    time_mix_extra_dim (32; 64 where hidden_size is 4096), time_decay_extra_dim (twice that): the low ranks
rwkv7
    intermediate_size (default hidden_ratio (4) hidden_size in whole 32s), norm_eps (1e-5), max_position_embeddings
    (2048), rescale_every (0), tie_word_embeddings (false), head_dim (64) or num_heads,
    decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim,
    head_size_divisor: the group norm's eps is 1e-5 head_size_divisor^2; without it head_dim norm_eps

rwkv_names (any): "blinkdl" where tensors have the names of the .pth files (emb.weight, blocks.0.att.key.weight ...);
without it the table is chosen by the names that the tensors have.
"""

import dataclasses
from collections.abc import Iterator

from jaxlm.models.config import UNLIMITED, Kind
from jaxlm.models.reader import Reader

NAMES = {"blinkdl": "blinkdl"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRanks:
    """The inner sizes of the low-rank products. mix: version 6; decay: 6 and 7; a, v, gate: 7."""

    mix: int = 0
    decay: int = 0
    a: int = 0
    v: int = 0
    gate: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RwkvConfig:
    version: float  # 4, 5.0, 5.1, 5.2, 6 or 7
    vocab_size: int
    d_model: int
    n_layers: int
    d_attn: int
    d_ff: int
    context: int  # tokens it was trained on at a time
    head_dim: int = 0  # 0 in version 4, which has no heads
    eps: float = 1e-5
    group_eps: float = 64e-5
    low_ranks: LowRanks = LowRanks()
    log_bonus: bool = False  # the bonus is stored as its logarithm
    rescale_every: int = 0  # in float16 the stream is halved after every so many layers; 0: never
    tie_embeddings: bool = False
    names: str | None = None  # the one table of names that fits; None: whichever does

    logit_scale = 1.0
    logit_softcap = None
    max_context = UNLIMITED

    def __post_init__(self):
        if self.head_dim and self.d_attn % self.head_dim:
            raise ValueError(f"heads of {self.head_dim} do not divide {self.d_attn}, the width of the time mixing")

    @property
    def heads(self) -> int:
        return self.d_attn // self.head_dim if self.head_dim else 0

    @property
    def shared_heads(self) -> int:
        """Over how many devices of the axis `tensor` the time mixing divides at most."""
        return self.heads or self.d_attn

    def facts(self) -> Iterator[tuple[str, str]]:
        """Names and words, for `jaxlm info`."""
        heads = f"{self.heads} heads of {self.head_dim}" if self.heads else f"{self.d_attn} channels of time mixing"
        yield "width", f"{self.d_model}; {heads}"
        yield "feed-forward", f"{self.d_ff}, squared ReLU"
        numbers = self.n_layers * (2 * self.d_model + (self.head_dim or 3) * self.d_attn)
        yield "state", f"{numbers:,} numbers for each sequence, whatever its length"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """All layers are alike, but for the first of version 7: it gives its values to the others."""
        mixer = f"rwkv{self.version:g}"
        first = f"{mixer}_first" if self.version == 7 else mixer
        return (Kind(mixer=first), *(Kind(mixer=mixer),) * (self.n_layers - 1))


def rwkv4(r: Reader) -> RwkvConfig:
    return RwkvConfig(version=4, d_ff=r.get("intermediate_size", 4 * r["hidden_size"]), **_base(r, context=1024))


def rwkv5(r: Reader) -> RwkvConfig:
    version = r.choice("model_version", {"5_0": 5.0, "5_1": 5.1, "5_2": 5.2}, "5_2")
    bonus = r.choice("rwkv_bonus", BONUS, "time_first" if version == 5.0 else "time_faaaa")
    return RwkvConfig(version=version, log_bonus=bonus, **_heads(r))


BONUS = {"time_faaaa": False, "time_first": True}


def rwkv5_2(r: Reader) -> RwkvConfig:
    return RwkvConfig(version=5.2, log_bonus=r.choice("rwkv_bonus", BONUS, "time_faaaa"), **_heads(r))


def rwkv6(r: Reader) -> RwkvConfig:
    mix = r.get("time_mix_extra_dim", 64 if r["hidden_size"] == 4096 else 32)
    decay = r.get("time_decay_extra_dim", 128 if r["hidden_size"] == 4096 else 64)
    return RwkvConfig(version=6, low_ranks=LowRanks(mix=mix, decay=decay), **_heads(r))


def rwkv7(r: Reader) -> RwkvConfig:
    d, eps = r["hidden_size"], r.get("norm_eps", 1e-5)
    heads = r.get("num_heads")
    head_dim = r.get("head_dim", 64 if heads is None else d // heads)
    if heads is not None and heads * head_dim != d:
        raise ValueError(f"{r.where}: num_heads={heads} of head_dim={head_dim} are not hidden_size={d}")
    d_ff = r.get("intermediate_size", -int(d * r.get("hidden_ratio", 4)) // 32 * -32)
    r.inert("hidden_ratio")  # the intermediate_size has been made from it
    divisor = r.get("head_size_divisor")
    widths = r.get("value_dim", d)
    if widths != d and list(widths) != [d] * r["num_hidden_layers"]:
        raise ValueError(f"{r.where}: value_dim={widths!r} is not supported; expected hidden_size={d} in every layer")
    for key, *allowed in (("hidden_act", "sqrelu"), ("norm_first", True), ("norm_bias", True), ("attn", None)):
        r.expect(key, *allowed)
    # How fla computes it, and where training starts.
    r.inert("attn_mode", "fuse_norm", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
    r.inert("initializer_range", "num_attention_heads")
    rank = lambda name, scale: r.get(f"{name}_low_rank_dim", _rank(scale, d, 1 if name == "gate" else head_dim / 64))
    return RwkvConfig(
        version=7,
        vocab_size=r["vocab_size"],
        d_model=d,
        n_layers=r["num_hidden_layers"],
        d_attn=d,
        d_ff=d_ff,
        context=r.get("max_position_embeddings", 2048),
        head_dim=head_dim,
        eps=eps,
        group_eps=head_dim * eps if divisor is None else 1e-5 * divisor**2,
        low_ranks=LowRanks(decay=rank("decay", 2.5), a=rank("a", 2.5), v=rank("v", 1.7), gate=rank("gate", 5)),
        rescale_every=max(0, r.get("rescale_every", 0)),
        tie_embeddings=r.get("tie_word_embeddings", False),
        names=r.choice("rwkv_names", NAMES) if "rwkv_names" in r else None,
    )


def _rank(scale: float, d: int, factor: float) -> int:
    """What fla takes for a low rank that is not written."""
    return max(32, round(scale * d**0.5 * factor / 32) * 32)


def _base(r: Reader, context: int) -> dict:
    return {
        "vocab_size": r["vocab_size"],
        "d_model": r["hidden_size"],
        "n_layers": r["num_hidden_layers"],
        "d_attn": r.get("attention_hidden_size", r["hidden_size"]),
        "context": r.get("context_length", context),
        "eps": r.get("layer_norm_epsilon", 1e-5),
        "rescale_every": max(0, r.get("rescale_every", 6)),
        "tie_embeddings": r.get("tie_word_embeddings", False),
        "names": r.choice("rwkv_names", NAMES) if "rwkv_names" in r else None,
    }


def _heads(r: Reader) -> dict:
    """Versions 5 and 6."""
    # The published files write 64 here whatever the width; head_size is what counts, there as here.
    r.inert("num_attention_heads")
    return _base(r, context=4096) | {
        "d_ff": r.get("intermediate_size", int(r["hidden_size"] * 3.5) // 32 * 32),
        "head_dim": r.get("head_size", 64),
        "group_eps": 1e-5 * r.get("head_size_divisor", 8) ** 2,
    }
