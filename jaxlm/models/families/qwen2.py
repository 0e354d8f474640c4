"""Qwen2: Llama with biased q, k and v; a sliding window on the layers above `max_window_layers` when switched on."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig
from jaxlm.models.families import llama
from jaxlm.models.reader import Reader

rules, BUFFERS = llama.rules, llama.BUFFERS


def config(r: Reader) -> DecoderConfig:
    return llama.base(
        r,
        attention=llama.attention(r, n_kv_heads=r["num_key_value_heads"], bias=(True, False)),
        mlp=llama.mlp(r),
        rope=fields.rope(r),
        windows=upper_windows(r),
    )


def upper_windows(r: Reader) -> tuple[int | None, ...]:
    """Windows on layers max_window_layers and up; none at all without use_sliding_window."""
    n_layers, first = r["num_hidden_layers"], r.get("max_window_layers", 28)
    if r.get("use_sliding_window", False):
        return fields.windows(r, [layer >= first for layer in range(n_layers)])
    windows = fields.windows(r, [False] * n_layers)
    if any(windows):
        raise ValueError(f"{r.where}: layer_types has sliding_attention, but use_sliding_window is false")
    return windows


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "qwen2", "Qwen2ForCausalLM")
    keys.finish()
    return config | {"hidden_act": "silu", "use_sliding_window": False}


GGUF_BIASES = gguf.required(gguf.BIASES[:3])  # of q, k and v
GGUF = (Gguf("qwen2", (*gguf.EMBED, *gguf.NORMS, *gguf.ATTENTION, *GGUF_BIASES, *gguf.MLP), gguf_config),)
