"""Mistral: Llama with a sliding window on every layer."""

from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig
from jaxlm.models.families import llama
from jaxlm.models.reader import Reader

rules, BUFFERS = llama.rules, llama.BUFFERS


def config(r: Reader) -> DecoderConfig:
    return llama.base(
        r,
        attention=llama.attention(r, n_kv_heads=r["num_key_value_heads"]),
        mlp=llama.mlp(r),
        rope=fields.rope(r),
        windows=(r.get("sliding_window"),) * r["num_hidden_layers"],
    )


GGUF = ()  # llama.cpp's files of Mistral say "llama": see llama.py
