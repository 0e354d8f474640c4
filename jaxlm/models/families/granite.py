"""Granite: Llama with four multipliers, on the embedding, the attention scores, each branch and the logits."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig
from jaxlm.models.families import llama
from jaxlm.models.reader import Reader

rules, BUFFERS = llama.rules, llama.BUFFERS


def config(r: Reader) -> DecoderConfig:
    bias = r.get("attention_bias", False)
    return llama.base(
        r,
        attention=llama.attention(
            r,
            n_kv_heads=r.get("num_key_value_heads", r["num_attention_heads"]),
            bias=(bias, bias),
            scale=r.get("attention_multiplier", 1.0),
        ),
        mlp=llama.mlp(r, bias=r.get("mlp_bias", False)),
        rope=fields.rope(r),
        embed_scale=r.get("embedding_multiplier", 1.0),
        residual_scale=r.get("residual_multiplier", 1.0),
        logit_scale=1 / r.get("logits_scaling", 1.0),
    )


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "granite", "GraniteForCausalLM")
    keys.expect("rope.scaling.finetuned", True)  # false switches RoPE off
    own = {
        "hidden_act": "silu",
        "attention_bias": gguf.biased(file, gguf.BIASES),
        "mlp_bias": gguf.biased(file, gguf.MLP_BIASES),
        "attention_multiplier": keys.get("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": keys.get("embedding_scale", 1.0),
        "residual_multiplier": keys.get("residual_scale", 1.0),
        "logits_scaling": keys["logit_scale"],
    }
    keys.finish()
    return config | own


GGUF = (Gguf("granite", llama.GGUF_TENSORS, gguf_config, in_config=gguf.ROPE_TENSORS),)
