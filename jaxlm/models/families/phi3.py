"""Phi-3: Llama with q, k, v in one stored tensor and gate, up in another, partial RoPE, LongRoPE."""

from jaxlm.checkpoints.rules import AnyRule, Concat
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig, DropoutConfig
from jaxlm.models.families import llama
from jaxlm.models.reader import Reader

L, P, BUFFERS = llama.L, llama.P, llama.BUFFERS
RULES = (
    *llama.without(llama.RULES, P + "attn/q", P + "attn/k", P + "attn/v", P + "mlp/gate", P + "mlp/up"),
    Concat(
        L + "self_attn.qkv_proj.weight",
        (
            (P + "attn/q/w", "(n h) d -> d n h"),
            (P + "attn/k/w", "(k h) d -> d k h"),
            (P + "attn/v/w", "(k h) d -> d k h"),
        ),
    ),
    Concat(L + "mlp.gate_up_proj.weight", ((P + "mlp/gate/w", "f d -> d f"), (P + "mlp/up/w", "f d -> d f"))),
)


def config(r: Reader) -> DecoderConfig:
    r.expect("attention_bias", False)
    r.get("original_max_position_embeddings")
    return llama.base(
        r,
        attention=llama.attention(r, n_kv_heads=r.get("num_key_value_heads", r["num_attention_heads"])),
        mlp=llama.mlp(r),
        rope=fields.rope(r, aliases={"su": "longrope", "yarn": "longrope"}),  # earlier names of the same rule
        windows=(r.get("sliding_window"),) * r["num_hidden_layers"],
        dropout=DropoutConfig(
            embed=r.get("embd_pdrop", 0.0), residual=r.get("resid_pdrop", 0.0), attention=r.get("attention_dropout", 0.0)
        ),
    )


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))
