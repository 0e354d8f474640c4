"""Gemma: GeGLU, wide heads, norms that scale by 1 + w, embeddings times sqrt(d_model), tied head."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig, NormConfig
from jaxlm.models.families import llama
from jaxlm.models.reader import Reader

rules, BUFFERS = llama.rules, llama.BUFFERS


def config(r: Reader) -> DecoderConfig:
    # The published files say "gelu" in hidden_act and mean the tanh form; hidden_activation, where written, wins.
    legacy = r.choice("hidden_act", fields.ACTS | {"gelu": "gelu_tanh"}, "gelu_pytorch_tanh")
    act = r.choice("hidden_activation", fields.ACTS) if "hidden_activation" in r else legacy
    return base(r, mlp=llama.MlpConfig(d_ff=r["intermediate_size"], act=act), rope=fields.rope(r))


def base(r: Reader, *, mlp, rope, scale: float | None = None, softcap: float | None = None, qk_norm=None, **more):
    """What the three Gemmas share."""
    r.expect("use_bidirectional_attention", None, False)
    r.get("hidden_activation")
    bias = r.get("attention_bias", False)
    return llama.base(
        r,
        attention=llama.attention(
            r, n_kv_heads=r["num_key_value_heads"], bias=(bias, bias), scale=scale, softcap=softcap, qk_norm=qk_norm
        ),
        mlp=mlp,
        rope=rope,
        tie=True,
        norm=NormConfig(kind="rms1p", eps=r["rms_norm_eps"]),
        embed_scale=r["hidden_size"] ** 0.5,
        **more,
    )


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "gemma", "GemmaForCausalLM")
    keys.finish()
    return config | {"hidden_act": "gelu_pytorch_tanh"}


GGUF_TENSORS = gguf.shifted((*gguf.EMBED, *gguf.NORMS, *gguf.ATTENTION, *gguf.MLP))
GGUF = (Gguf("gemma", GGUF_TENSORS, gguf_config),)
