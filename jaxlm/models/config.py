"""The frozen, hashable configuration of the decoder backbone. No field is named after a family."""

import dataclasses
from collections.abc import Iterator

from jaxlm.models.rope import Rope

UNLIMITED = 2**31 - 1  # the max_context of a model whose cache takes no more room for more tokens; positions are int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    kind: str = "rms"  # rms; rms1p, whose scale is stored as w - 1; layer, with mean and bias
    eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: str | None = None  # "head": over each head; "full": over all heads together
    scale: float | None = None  # None: head_dim ** -0.5
    softcap: float | None = None
    divide_by_depth: bool = False  # scale / (layer + 1)

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} attention heads cannot share {self.n_kv_heads} key-value heads evenly")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
    d_ff: int
    act: str = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    n_experts: int
    top_k: int
    expert: MlpConfig
    renormalise: bool  # the top-k weights sum to 1
    shared: MlpConfig | None = None  # an expert that every token passes
    shared_gate: bool = False  # ... weighted by a sigmoid of the token

    def __post_init__(self):
        if self.top_k > self.n_experts:
            raise ValueError(f"{self.top_k} experts a token (num_experts_per_tok), but there are only {self.n_experts}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """Rates, applied when `trunk` or `embed` is given an rng."""

    embed: float = 0.0
    residual: float = 0.0
    attention: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What one layer is. Equal kinds share a traced block."""

    mixer: str = "attention"
    mlp: str = "dense"  # or "moe"
    window: int | None = None  # keys a query sees, itself included; None for all
    rope: Rope | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    vocab_size: int
    d_model: int
    context: int  # positions the checkpoint states (max_position_embeddings)
    kinds: tuple[Kind, ...]  # one per layer
    attention: AttentionConfig
    mlp: MlpConfig | None
    moe: MoeConfig | None = None
    norm: NormConfig = NormConfig()
    pre_norm: bool = True  # f(norm(x))
    post_norm: bool = False  # norm(f(x)) before the residual sum
    learned_positions: bool = False  # a table of `context` rows instead of rope
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    dropout: DropoutConfig = DropoutConfig()
    init_std: float = 0.02

    @property
    def shared_heads(self) -> int:
        """Over how many devices of the axis `tensor` the heads divide at most."""
        return self.attention.n_kv_heads

    def facts(self) -> Iterator[tuple[str, str]]:
        """Names and words, of what not every backbone has."""
        a = self.attention
        yield "width", f"{self.d_model}; {a.n_heads} heads of {a.head_dim}, {a.n_kv_heads} for keys and values"
        if self.mlp is not None:
            yield "feed-forward", f"{self.mlp.d_ff}{', gated' if self.mlp.gated else ''}, {self.mlp.act}"
        if self.moe is not None:
            yield "experts", f"{self.moe.n_experts} of {self.moe.expert.d_ff}, {self.moe.top_k} for each token"

    @property
    def max_context(self) -> int:
        """Positions that may be used: what the checkpoint states, or what its RoPE scaling stretches that to."""
        ropes = {kind.rope for kind in self.kinds if kind.rope is not None}
        stretched = (int(r.factor * r.original_context) for r in ropes if r.scaling in ("linear", "dynamic", "yarn"))
        return max(self.context, *stretched, 0)


def groups(kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """Per layer, the name of its parameter stack: "" when all layers have the same parameters."""
    structures = list(dict.fromkeys((k.mixer, k.mlp) for k in kinds))
    if len(structures) == 1:
        return ("",) * len(kinds)
    if len({mixer for mixer, _ in structures}) == 1:
        return tuple(k.mlp for k in kinds)
    if len({mlp for _, mlp in structures}) == 1:
        return tuple(k.mixer for k in kinds)
    return tuple(f"{k.mixer}_{k.mlp}" for k in kinds)


def states(kinds: tuple[Kind, ...]) -> tuple[str, ...]:
    """Per layer, the name of the stack that its cache lives in; layers of one window share one."""
    return tuple(k.mixer if k.window is None else f"{k.mixer}_window_{k.window}" for k in kinds)
