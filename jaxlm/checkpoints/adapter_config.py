"""What an adapter is: one frozen dataclass for each method, and its adapter_config.json as the peft package writes it.

Reading is strict: a key that would change the result and that we do not compute is an error, and so is an unknown one.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Names = str | tuple[str, ...]
ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A low-rank pair beside each targeted weight: y = W x + scale * b a x, with scale = alpha / rank.

    targets and exclude: names of modules as transformers has them, "q_proj" or "model.layers.0.self_attn.q_proj", each
    of which must exist; or one regular expression that matches whole names; or "all-linear". layers: of these layers
    alone, with names or "all-linear". A pattern (regular expression of a name's end, value) goes before rank or alpha.
    """

    rank: int = 8
    alpha: float = 8
    rslora: bool = False  # scale = alpha / sqrt(rank): arXiv 2312.03732
    dora: bool = False  # a direction and a learned magnitude of each output: arXiv 2402.09353
    dropout: float = 0.0  # of the pair's inputs
    targets: Names = ALL_LINEAR
    exclude: Names = ()
    layers: tuple[int, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        for rank in (self.rank, *dict(self.rank_pattern).values()):
            _whole("rank", rank)
        for alpha in (self.alpha, *dict(self.alpha_pattern).values()):
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ValueError(f"alpha={alpha!r}: expected a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: expected a rate from 0 to below 1")
        if not self.targets:
            raise ValueError("targets is empty: name modules such as 'q_proj', or 'all-linear'")
        if self.layers and isinstance(self.targets, str) and not self.is_all_linear:
            raise ValueError(f"layers={self.layers} needs targets by name, not the regular expression {self.targets!r}")

    @property
    def is_all_linear(self) -> bool:
        return isinstance(self.targets, str) and self.targets.lower() == ALL_LINEAR

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        return _by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
    """Keys and values of virtual tokens in every layer (arXiv 2101.00190, without the network that makes them)."""

    tokens: int
    init: str = "normal"  # or "zero"

    def __post_init__(self):
        _whole("tokens", self.tokens)
        _one_of("init", self.init, ("normal", "zero"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Embeddings of virtual tokens before the first (arXiv 2104.08691)."""

    tokens: int
    init: str = "normal"  # or "vocabulary": the embeddings of tokens drawn at random

    def __post_init__(self):
        _whole("tokens", self.tokens)
        _one_of("init", self.init, ("normal", "vocabulary"))


AdapterConfig = Lora | Prefix | Prompt
TYPES = {"LORA": Lora, "PREFIX_TUNING": Prefix, "PROMPT_TUNING": Prompt}

# Keys that never change what a loaded adapter computes: where it came from, how it was initialised or trained.
INERT = (
    "auto_mapping", "peft_version", "task_type", "inference_mode", "revision", "base_model_name_or_path",
    "megatron_core", "runtime_config", "qalora_group_size", "eva_config", "fan_in_fan_out", "ensure_weight_tying",
    "encoder_hidden_size", "prefix_projection", "init_weights", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path", "tokenizer_kwargs", "num_attention_heads", "num_layers", "token_dim",
)  # fmt: skip
# Other methods and variants, by the values that leave them off.
OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "num_transformer_submodules": (None, 1),
    # Of the others some change the base model's weights before they add the pair.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    **dict.fromkeys(
        (
            "alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "layer_replication",
            "loftq_config", "lora_ga_config", "megatron_config", "monteclora_config", "target_parameters",
            "trainable_token_indices", "use_bdlora", "velora_config",
        ),
        (None, False, {}, []),
    ),
}  # fmt: skip
LORA_KEYS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
)  # fmt: skip
HEADS = ("classifier", "score", "qa_outputs")  # of the tasks that have one; peft lists them whether they exist or not


def from_peft(stored: Mapping[str, Any], where: str, ignore_fields: Sequence[str] = ()) -> AdapterConfig:
    """The config in an adapter_config.json; ValueError for what it does not say, or says and we do not compute."""
    stored = {key: value for key, value in stored.items() if key not in ignore_fields}
    kind = stored.get("peft_type")
    if kind not in TYPES:
        raise ValueError(f"{where}: peft_type {kind!r} is not supported; supported: {', '.join(TYPES)}")
    own = LORA_KEYS if kind == "LORA" else ("num_virtual_tokens",)
    known = {*own, *INERT, *OFF, "peft_type", "modules_to_save"}
    for key, value in stored.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ValueError(
                f"{where}: unknown key {key!r} = {value!r}{f', did you mean {near[0]!r}' if near else ''}; "
                "ignore_fields passes over it"
            )
        if key in OFF and value not in OFF[key]:
            raise ValueError(f"{where}: {key}={value!r} is not supported; supported: {_listed(OFF[key])}")
    if unknown := [name for name in stored.get("modules_to_save") or () if name not in HEADS]:
        raise ValueError(f"{where}: modules_to_save={unknown}: of whole modules only {_listed(HEADS)} are supported")
    need = lambda key: stored[key] if key in stored else _missing(where, key)
    if kind != "LORA":
        return TYPES[kind](tokens=need("num_virtual_tokens"))
    layers = stored.get("layers_to_transform")
    if (pattern := stored.get("layers_pattern")) not in (None, "", [], "layers", "h", ["layers"], ["h"]):
        raise ValueError(f"{where}: layers_pattern={pattern!r} is not supported; supported: 'layers', 'h'")
    return Lora(
        rank=need("r"),
        alpha=need("lora_alpha"),
        rslora=stored.get("use_rslora", False),
        dora=stored.get("use_dora", False),
        dropout=stored.get("lora_dropout", 0.0),
        targets=_names(need("target_modules")),
        exclude=_names(stored.get("exclude_modules") or ()),
        layers=(layers,) if isinstance(layers, int) else tuple(layers or ()),
        rank_pattern=tuple((stored.get("rank_pattern") or {}).items()),
        alpha_pattern=tuple((stored.get("alpha_pattern") or {}).items()),
    )


def to_peft(config: AdapterConfig, *, base: str | None, task_type: str | None, more: Mapping[str, Any]) -> dict:
    """An adapter_config.json; `more`: what only the model knows."""
    kind = next(name for name, cls in TYPES.items() if isinstance(config, cls))
    shared = {"peft_type": kind, "task_type": task_type, "base_model_name_or_path": base, "inference_mode": True}
    if not isinstance(config, Lora):
        return shared | {"num_virtual_tokens": config.tokens, "num_transformer_submodules": 1} | dict(more)
    listed = lambda names: names if isinstance(names, str) else list(names)
    own = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "target_modules": listed(config.targets),
        "exclude_modules": listed(config.exclude) or None,
        "layers_to_transform": list(config.layers) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
    }
    return shared | own | dict(more)


def _names(value: Any) -> Names:
    return value if isinstance(value, str) else tuple(value)


def _by_pattern(patterns: Sequence[tuple[str, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the name matches, at a dot."""
    return next((value for key, value in patterns if re.match(rf"(.*\.)?({key})$", module)), default)


def _missing(where: str, key: str):
    raise ValueError(f"{where}: the key {key!r} is missing")


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values))


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number >= 1")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not supported; supported: {_listed(allowed)}")
