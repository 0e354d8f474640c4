"""OLMo 2: Llama with its norms after each branch instead of before, and RMSNorm over all heads of q and of k."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.checkpoints.rules import AnyRule, Rule
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig
from jaxlm.models.families import llama
from jaxlm.models.reader import Reader

L, P, BUFFERS = llama.L, llama.P, llama.BUFFERS
RULES = (
    *llama.without(llama.RULES, P + "attn_norm/", P + "mlp_norm/"),
    Rule(L + "post_attention_layernorm.weight", P + "attn_post_norm/scale"),
    Rule(L + "post_feedforward_layernorm.weight", P + "mlp_post_norm/scale"),
    Rule(L + "self_attn.q_norm.weight", P + "attn/q_norm/scale", "(n h) -> n h"),
    Rule(L + "self_attn.k_norm.weight", P + "attn/k_norm/scale", "(k h) -> k h"),
)


def config(r: Reader) -> DecoderConfig:
    bias, n_kv_heads = r.get("attention_bias", False), r.get("num_key_value_heads", r["num_attention_heads"])
    return llama.base(
        r,
        attention=llama.attention(r, n_kv_heads=n_kv_heads, bias=(bias, bias), qk_norm="full"),
        mlp=llama.mlp(r),
        rope=fields.rope(r),
        pre_norm=False,
        post_norm=True,
    )


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "olmo2", "Olmo2ForCausalLM")
    keys.expect("attention.sliding_window", 0)  # OLMo 3
    keys.finish()
    return config | {"hidden_act": "silu", "attention_bias": False}


GGUF_TENSORS = (
    *gguf.EMBED,
    gguf.layer("post_attention_norm.weight", "post_attention_layernorm.weight"),
    gguf.layer("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
    *gguf.ATTENTION,
    *gguf.QK_NORMS,
    *gguf.MLP,
)
GGUF = (Gguf("olmo2", GGUF_TENSORS, gguf_config),)
