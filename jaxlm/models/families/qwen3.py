"""Qwen3: Llama with an RMSNorm on each head of q and k before RoPE, and heads wider than d_model / n_heads."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.checkpoints.rules import AnyRule, Rule
from jaxlm.models import fields
from jaxlm.models.config import AttentionConfig, DecoderConfig
from jaxlm.models.families import llama, qwen2
from jaxlm.models.reader import Reader

L, P, BUFFERS = llama.L, llama.P, llama.BUFFERS
RULES = (
    *llama.RULES,
    Rule(L + "self_attn.q_norm.weight", P + "attn/q_norm/scale"),
    Rule(L + "self_attn.k_norm.weight", P + "attn/k_norm/scale"),
)


def config(r: Reader) -> DecoderConfig:
    return llama.base(r, attention=attention(r), mlp=llama.mlp(r), rope=fields.rope(r), windows=qwen2.upper_windows(r))


def attention(r: Reader) -> AttentionConfig:
    bias = r.get("attention_bias", False)
    return llama.attention(r, n_kv_heads=r["num_key_value_heads"], bias=(bias, bias), qk_norm="head")


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "qwen3", "Qwen3ForCausalLM")
    keys.finish()
    bias = gguf.biased(file, gguf.BIASES)
    return config | {"hidden_act": "silu", "attention_bias": bias, "use_sliding_window": False}


GGUF_TENSORS = (*gguf.EMBED, *gguf.NORMS, *gguf.ATTENTION, *gguf.BIASES, *gguf.QK_NORMS)
GGUF = (Gguf("qwen3", (*GGUF_TENSORS, *gguf.MLP), gguf_config),)
