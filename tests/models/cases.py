"""The checkpoints that the parity tests are run on: tiny, and harsh in every setting that real ones differ in.

No case has the usual theta, a window that the sequence fits into, or as many key-value heads as query heads unless that
is its point. `kwargs` are transformers 5's; `spelling=4` rewrites the saved config.json as transformers 4 wrote it.
"""

import dataclasses
import functools
from typing import Any

LENGTH = 24  # tokens in a test sequence: longer than every window and than the contexts that RoPE scalings start from
VOCAB = 101
RWKV = ("4", "5.0", "5.1", "5.2", "6", "7")  # versions, whose cases rwkv_reference.py makes


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    id: str
    config: str  # transformers' class
    model: str
    kwargs: dict[str, Any]
    spelling: int = 5
    rope_key: str = "rope_type"  # spelling 4: the name of the type in rope_scaling; oldest files say "type"
    stored: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # more keys of config.json, as published files have
    dropped: tuple[str, ...] = ()  # keys of config.json that old files lack
    shard: str = "1GB"  # the largest file
    rope_only: bool = False  # differs from another case in its frequencies alone
    tolerance: float = 2e-6  # of logits, relative to the largest
    reason: str = ""  # why the tolerance is not 2e-6

    @property
    def is_moe(self) -> bool:
        return "num_experts_per_tok" in self.kwargs


def rope(theta: float, kind: str = "default", **more) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


# Eps is large so that a wrong one shows; theta is small so that every frequency turns within the sequence.
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-3,
    "rope_parameters": rope(317.0),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _family(config: str, model: str, **base):
    def case(id: str, *, spelling: int = 5, **more) -> Case:
        names = {f.name for f in dataclasses.fields(Case)}
        options = {name: more.pop(name) for name in list(more) if name in names}
        return Case(id, config, model, _BASE | base | more, spelling, **options)

    return case


_llama = _family("LlamaConfig", "LlamaForCausalLM", head_dim=12)
_mistral = _family("MistralConfig", "MistralForCausalLM", head_dim=12, sliding_window=5)
_mixtral = _family(
    "MixtralConfig",
    "MixtralForCausalLM",
    num_hidden_layers=2,
    num_local_experts=5,
    num_experts_per_tok=2,
    sliding_window=6,
)
_qwen2 = _family("Qwen2Config", "Qwen2ForCausalLM")
_qwen3 = _family("Qwen3Config", "Qwen3ForCausalLM", head_dim=12)
_qwen3_moe = _family(
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    head_dim=12,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    norm_topk_prob=True,
)
_gemma = _family("GemmaConfig", "GemmaForCausalLM", head_dim=12, num_key_value_heads=1)
_gemma2 = _family(
    "Gemma2Config",
    "Gemma2ForCausalLM",
    head_dim=12,
    num_hidden_layers=5,
    sliding_window=5,
    query_pre_attn_scalar=20,
    attn_logit_softcapping=4.0,
    final_logit_softcapping=9.0,
)
_gemma3 = _family(
    "Gemma3TextConfig",
    "Gemma3ForCausalLM",
    head_dim=12,
    num_hidden_layers=8,
    sliding_window=5,
    query_pre_attn_scalar=20,
    rope_parameters={"sliding_attention": rope(97.0), "full_attention": rope(1733.0)},
)
_phi3 = _family("Phi3Config", "Phi3ForCausalLM", hidden_size=48, original_max_position_embeddings=64)
_granite = _family(
    "GraniteConfig",
    "GraniteForCausalLM",
    embedding_multiplier=3.0,
    residual_multiplier=0.4,
    attention_multiplier=0.23,
    logits_scaling=2.5,
)
_olmo2 = _family("Olmo2Config", "Olmo2ForCausalLM")


def _gpt2(id: str, **more) -> Case:
    kwargs = {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "layer_norm_epsilon": 3e-3,
    }
    options = {name: more.pop(name) for name in list(more) if name in ("dropped", "stored", "spelling", "shard")}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return Case(id, "GPT2Config", "GPT2LMHeadModel", kwargs | ids | more, **options)


_FACTORS = {"short_factor": [1.0, 1.3, 1.1, 2.0, 1.6, 1.2], "long_factor": [1.0, 1.9, 3.5, 5.0, 7.7, 9.0]}
_PHI3_FACTORS = {"short_factor": [1.0, 1.3, 1.7], "long_factor": [1.2, 2.9, 6.5]}
_LLAMA3 = {"factor": 6.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

_LOCAL_LOCAL_GLOBAL = ["sliding_attention", "sliding_attention", "full_attention"]

FAMILIES = [
    _llama("llama", shard="30KB"),
    _llama("llama-biases-tied-gelu-4.x", spelling=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
           hidden_act="gelu", stored={"pretraining_tp": 1, "_name_or_path": "x", "auto_map": {"AutoConfig": "y"}}),
    _llama("llama-1", spelling=4, head_dim=None, num_key_value_heads=4, rope_parameters=rope(10000.0),
           dropped=("rope_theta", "rope_scaling", "head_dim", "num_key_value_heads", "attention_bias", "mlp_bias",
                    "attention_dropout", "pretraining_tp")),
    _mistral("mistral", num_hidden_layers=5),
    _mistral("mistral-full-4.x", spelling=4, sliding_window=None, tie_word_embeddings=True),
    _mixtral("mixtral", shard="30KB"),
    _mixtral("mixtral-full-4.x", spelling=4, sliding_window=None, num_experts_per_tok=3, tie_word_embeddings=True),
    _qwen2("qwen2", num_hidden_layers=5, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    _qwen2("qwen2-tied-4.x", spelling=4, tie_word_embeddings=True, dropped=("layer_types",),
           stored={"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1}),
    _qwen2("qwen2-window-4.x", spelling=4, use_sliding_window=True, sliding_window=6,
           max_window_layers=2, dropped=("layer_types",)),
    _qwen3("qwen3", tie_word_embeddings=True, attention_bias=True),
    _qwen3("qwen3-windows-4.x", spelling=4, num_hidden_layers=5, use_sliding_window=True, sliding_window=5,
           max_window_layers=0, layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]),
    _qwen3_moe("qwen3_moe-step-2", num_hidden_layers=5, decoder_sparse_step=2, shard="60KB"),
    _qwen3_moe("qwen3_moe-mlp-only-4.x", spelling=4, num_hidden_layers=6, mlp_only_layers=[0, 3], norm_topk_prob=False,
               attention_bias=True, num_experts_per_tok=3, tie_word_embeddings=True),
    _qwen3_moe("qwen3_moe-window", num_hidden_layers=2, use_sliding_window=True, sliding_window=5),
    _gemma("gemma"),
    _gemma("gemma-legacy-4.x", spelling=4, attention_bias=True, num_key_value_heads=2,
           stored={"hidden_act": "gelu", "hidden_activation": None}),
    _gemma2("gemma2"),
    _gemma2("gemma2-uncapped-4.x", spelling=4, attn_logit_softcapping=None, final_logit_softcapping=None,
            num_hidden_layers=4, attention_bias=True, dropped=("layer_types",),
            stored={"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}),
    _gemma3("gemma3_text"),
    _gemma3("gemma3_text-periods", layer_types=_LOCAL_LOCAL_GLOBAL * 2 + _LOCAL_LOCAL_GLOBAL[:2]),
    _gemma3("gemma3_text-scaled-4.x", spelling=4, stored={"sliding_window_pattern": 6}, dropped=("layer_types",),
            rope_parameters={"sliding_attention": rope(97.0), "full_attention": rope(1733.0, "linear", factor=8.0)}),
    _gemma3("gemma3_text-pattern", num_hidden_layers=5, attention_bias=True, tie_word_embeddings=False,
            layer_types=["full_attention", *_LOCAL_LOCAL_GLOBAL, "sliding_attention"]),
    _phi3("phi3", sliding_window=6, tie_word_embeddings=True),
    _phi3("phi3-longrope-long", num_hidden_layers=2, sliding_window=5, original_max_position_embeddings=16,
          rope_parameters=rope(317.0, "longrope", partial_rotary_factor=0.5, original_max_position_embeddings=16,
                               **_PHI3_FACTORS)),
    _phi3("phi3-longrope-short-4.x", num_hidden_layers=2, spelling=4, rope_key="type",
          original_max_position_embeddings=32,
          rope_parameters=rope(317.0, "longrope", partial_rotary_factor=0.5, original_max_position_embeddings=32,
                               **_PHI3_FACTORS),
          stored={"attention_bias": False, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}}),
    _granite("granite", attention_bias=True, mlp_bias=True),
    _granite("granite-tied-4.x", spelling=4, tie_word_embeddings=True),
    _olmo2("olmo2"),
    _olmo2("olmo2-biases-tied-4.x", spelling=4, attention_bias=True, tie_word_embeddings=True),
    _gpt2("gpt2"),
    _gpt2("gpt2-variant", scale_attn_by_inverse_layer_idx=True, n_inner=40, activation_function="gelu",
          tie_word_embeddings=False),
    _gpt2("gpt2-unscaled-4.x", spelling=4, scale_attn_weights=False, activation_function="relu"),
]  # fmt: skip

_llama, _qwen2, _qwen3 = (
    functools.partial(family, num_hidden_layers=2, rope_only=True) for family in (_llama, _qwen2, _qwen3)
)

ROPES = [
    _llama("rope-linear", rope_parameters=rope(317.0, "linear", factor=2.5)),
    _llama("rope-linear-4.x", spelling=4, rope_key="type", rope_parameters=rope(317.0, "linear", factor=2.5)),
    _llama("rope-dynamic", max_position_embeddings=16, rope_parameters=rope(317.0, "dynamic", factor=3.0)),
    _llama("rope-dynamic-short-4.x", spelling=4, rope_key="type", rope_parameters=rope(317.0, "dynamic", factor=3.0)),
    _llama("rope-yarn", rope_parameters=rope(317.0, "yarn", **_YARN)),
    _llama("rope-yarn-untruncated", rope_parameters=rope(317.0, "yarn", **_YARN, truncate=False, beta_fast=2.0,
                                                         beta_slow=0.3)),
    _llama("rope-yarn-mscale", rope_parameters=rope(317.0, "yarn", **_YARN, mscale=1.3, mscale_all_dim=0.6)),
    _llama("rope-yarn-factor-betas", rope_parameters=rope(317.0, "yarn", **_YARN, attention_factor=0.83, beta_fast=7.0,
                                                          beta_slow=0.5)),
    _qwen2("rope-yarn-4.x", spelling=4, rope_key="type", rope_parameters=rope(317.0, "yarn", **_YARN)),
    _qwen3("rope-yarn-no-original-4.x", spelling=4, max_position_embeddings=20,
           rope_parameters=rope(317.0, "yarn", factor=4.0, original_max_position_embeddings=20),
           stored={"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    _llama("rope-llama3", rope_parameters=rope(317.0, "llama3", **_LLAMA3)),
    _llama("rope-llama3-4.x", spelling=4, rope_parameters=rope(317.0, "llama3", **_LLAMA3)),
    _llama("rope-longrope-long", rope_parameters=rope(317.0, "longrope", factor=4.0, **_FACTORS,
                                                      original_max_position_embeddings=16)),
    _llama("rope-longrope-short-4.x", spelling=4, rope_parameters=rope(
        317.0, "longrope", attention_factor=0.9, factor=2.0, **_FACTORS, original_max_position_embeddings=32)),
    _phi3("rope-partial", rope_only=True, rope_parameters=rope(317.0, partial_rotary_factor=0.5)),
    _phi3("rope-su-4.x", rope_only=True, spelling=4, original_max_position_embeddings=16, num_hidden_layers=2,
          rope_parameters=rope(317.0, "longrope", partial_rotary_factor=0.5, original_max_position_embeddings=16,
                               **_PHI3_FACTORS),
          stored={"rope_scaling": {"type": "su", "original_max_position_embeddings": 16, **_PHI3_FACTORS}}),
    _gemma3("rope-two-kinds", rope_only=True, num_hidden_layers=3,
            layer_types=[*_LOCAL_LOCAL_GLOBAL[1:], "sliding_attention"],
            rope_parameters={"sliding_attention": rope(97.0, "linear", factor=1.7),
                             "full_attention": rope(1733.0, "llama3", **_LLAMA3)}),
]  # fmt: skip

CASES = FAMILIES + ROPES
ARCHITECTURES = list({case.config: case for case in reversed(FAMILIES)}.values())[::-1]  # the first case of each
