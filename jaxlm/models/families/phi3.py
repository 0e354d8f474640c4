"""Phi-3: Llama with q, k, v in one stored tensor and gate, up in another, partial RoPE, LongRoPE."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
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
            embed=r.get("embd_pdrop", 0.0),
            residual=r.get("resid_pdrop", 0.0),
            attention=r.get("attention_dropout", 0.0),
        ),
    )


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))


# By (layers, context), for files of before July 2024, which do not write the window.
GGUF_WINDOWS = {(32, 4096): 2047, (40, 4096): 2047, (32, 131_072): 262_144, (40, 131_072): 131_072}


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "phi3", "Phi3ForCausalLM", partial=True)
    context = config["max_position_embeddings"]
    original = keys.get("rope.scaling.original_context_length", context)
    window = keys.get("attention.sliding_window", GGUF_WINDOWS.get((config["num_hidden_layers"], context)))
    if window is None:
        raise ValueError(f"{file.path}: the metadata has no 'phi3.attention.sliding_window'")
    keys.finish()
    # 0 is llama.cpp's way to write null (Phi-4).
    return config | {
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "sliding_window": window or None,
    }


GGUF_TENSORS = (
    *gguf.EMBED,
    *gguf.NORMS,
    gguf.layer("attn_qkv.weight", "self_attn.qkv_proj.weight"),
    gguf.layer("attn_output.weight", "self_attn.o_proj.weight"),
    gguf.layer("ffn_up.weight", "mlp.gate_up_proj.weight"),
    gguf.layer("ffn_down.weight", "mlp.down_proj.weight"),
)
GGUF = (Gguf("phi3", GGUF_TENSORS, gguf_config, in_config=gguf.ROPE_FACTORS),)
