"""Llama: pre-norm RMSNorm, SwiGLU, grouped-query attention, RoPE of every scaling."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.checkpoints.rules import Alias, AnyRule, Rule
from jaxlm.models import fields
from jaxlm.models.config import AttentionConfig, DecoderConfig, DropoutConfig, Kind, MlpConfig, NormConfig
from jaxlm.models.reader import Reader
from jaxlm.models.rope import Rope

BUFFERS = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def config(r: Reader) -> DecoderConfig:
    r.get("pretraining_tp")  # a split of the same products over devices; transformers 5 ignores it too
    bias = r.get("attention_bias", False)
    return base(
        r,
        attention=attention(r, n_kv_heads=r.get("num_key_value_heads", r["num_attention_heads"]), bias=(bias, bias)),
        mlp=mlp(r, bias=r.get("mlp_bias", False)),
        rope=fields.rope(r),
    )


def base(
    r: Reader, *, attention: AttentionConfig, mlp: MlpConfig | None, rope: Rope, windows=(), tie: bool = False, **more
) -> DecoderConfig:
    """The fields that every relative spells alike; `tie` is the default for files that do not write it."""
    n_layers = r["num_hidden_layers"]
    given = {
        "vocab_size": r["vocab_size"],
        "d_model": r["hidden_size"],
        "context": r["max_position_embeddings"],
        "kinds": tuple(Kind(window=w, rope=rope) for w in windows or (None,) * n_layers),
        "attention": attention,
        "mlp": mlp,
        "norm": NormConfig(eps=r["rms_norm_eps"]),
        "tie_embeddings": r.get("tie_word_embeddings", tie),
        "dropout": DropoutConfig(attention=r.get("attention_dropout", 0.0)),
        "init_std": r.get("initializer_range", 0.02),
    }
    return DecoderConfig(**(given | more))


def attention(r: Reader, *, n_kv_heads: int, bias: tuple[bool, bool] = (False, False), **more) -> AttentionConfig:
    return AttentionConfig(
        n_heads=r["num_attention_heads"],
        n_kv_heads=n_kv_heads,
        head_dim=fields.head_dim(r),
        qkv_bias=bias[0],
        out_bias=bias[1],
        **more,
    )


def mlp(r: Reader, *, act: str = "hidden_act", bias: bool = False) -> MlpConfig:
    return MlpConfig(d_ff=r["intermediate_size"], act=r.choice(act, fields.ACTS), bias=bias)


L, P = "model.layers.{layer}.", "layers/"

RULES = (
    Rule("model.embed_tokens.weight", "embed/w"),
    Rule("model.norm.weight", "final_norm/scale"),
    Rule(L + "input_layernorm.weight", P + "attn_norm/scale"),
    Rule(L + "self_attn.q_proj.weight", P + "attn/q/w", "(n h) d -> d n h"),
    Rule(L + "self_attn.k_proj.weight", P + "attn/k/w", "(k h) d -> d k h"),
    Rule(L + "self_attn.v_proj.weight", P + "attn/v/w", "(k h) d -> d k h"),
    Rule(L + "self_attn.o_proj.weight", P + "attn/o/w", "d (n h) -> n h d"),
    Rule(L + "self_attn.q_proj.bias", P + "attn/q/b", "(n h) -> n h"),
    Rule(L + "self_attn.k_proj.bias", P + "attn/k/b", "(k h) -> k h"),
    Rule(L + "self_attn.v_proj.bias", P + "attn/v/b", "(k h) -> k h"),
    Rule(L + "self_attn.o_proj.bias", P + "attn/o/b"),
    Rule(L + "post_attention_layernorm.weight", P + "mlp_norm/scale"),
    Rule(L + "mlp.gate_proj.weight", P + "mlp/gate/w", "f d -> d f"),
    Rule(L + "mlp.up_proj.weight", P + "mlp/up/w", "f d -> d f"),
    Rule(L + "mlp.down_proj.weight", P + "mlp/down/w", "d f -> f d"),
    Rule(L + "mlp.gate_proj.bias", P + "mlp/gate/b"),
    Rule(L + "mlp.up_proj.bias", P + "mlp/up/b"),
    Rule(L + "mlp.down_proj.bias", P + "mlp/down/b"),
)


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, head(config))


def head(config: DecoderConfig) -> AnyRule:
    if config.tie_embeddings:
        return Alias("lm_head.weight", "model.embed_tokens.weight")
    return Rule("lm_head.weight", "head/w")


def without(rules: tuple[AnyRule, ...], *paths: str) -> tuple[AnyRule, ...]:
    """The rules, less those for leaves under these paths."""
    return tuple(r for r in rules if not (isinstance(r, Rule) and r.path.startswith(paths)))


def gguf_config(file: GgufFile, model_type: str = "llama", architecture: str = "LlamaForCausalLM") -> dict:
    config, keys = gguf.decoder(file, model_type, architecture)
    keys.finish()
    biases = {"attention_bias": gguf.biased(file, gguf.BIASES), "mlp_bias": gguf.biased(file, gguf.MLP_BIASES)}
    return config | biases | {"hidden_act": "silu"}


# llama.cpp says "llama" for Llama, Mistral and Mixtral. With experts it is a Mixtral, else a Llama: it does not keep
# Mistral's sliding window (which only the first Mistral 7B has), and without one the two are the same computation.
GGUF_TENSORS = gguf.permuted((*gguf.EMBED, *gguf.NORMS, *gguf.ATTENTION, *gguf.BIASES, *gguf.MLP, *gguf.MLP_BIASES))
GGUF = (
    Gguf("llama", GGUF_TENSORS, gguf_config, lambda m: not m.get("llama.expert_count"), in_config=gguf.ROPE_TENSORS),
)
