"""Gemma 3: five local layers to one global, each with its own RoPE, and RMSNorm on q and k instead of soft caps."""

import dataclasses

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.checkpoints.rules import AnyRule, Rule
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig
from jaxlm.models.families import gemma, gemma2, llama
from jaxlm.models.reader import Reader
from jaxlm.models.rope import Rope

L, P, BUFFERS = llama.L, llama.P, llama.BUFFERS
RULES = (
    *gemma2.RULES,
    Rule(L + "self_attn.q_norm.weight", P + "attn/q_norm/scale"),
    Rule(L + "self_attn.k_norm.weight", P + "attn/k_norm/scale"),
)


def config(r: Reader) -> DecoderConfig:
    r.expect("attn_logit_softcapping", None)  # written as null; transformers does not apply it here
    period = r.get("sliding_window_pattern", r.get("_sliding_window_pattern", 6))
    local, far = ropes(r)
    base = gemma.base(
        r,
        mlp=llama.mlp(r, act="hidden_activation"),
        rope=far,
        windows=fields.windows(r, [(layer + 1) % period != 0 for layer in range(r["num_hidden_layers"])]),
        scale=r["query_pre_attn_scalar"] ** -0.5,
        qk_norm="head",
        post_norm=True,
        logit_softcap=r.get("final_logit_softcapping"),
    )
    kinds = (k if k.window is None else dataclasses.replace(k, rope=local) for k in base.kinds)
    return dataclasses.replace(base, kinds=tuple(kinds))


def ropes(r: Reader) -> tuple[Rope, Rope]:
    """Local and global: nested by layer type (transformers 5), or rope_local_base_freq beside rope_theta (4)."""
    both, dim = fields.scaling_part(r), fields.head_dim(r)
    near, far = r.get("rope_local_base_freq", 10_000.0), r.get("rope_theta", 1_000_000.0)
    if "full_attention" in both or "sliding_attention" in both:
        local, distant = both.part("sliding_attention"), both.part("full_attention")
        return (
            fields.scaled_rope(r, local, local.get("rope_theta", near), dim, {}),
            fields.scaled_rope(r, distant, distant.get("rope_theta", far), dim, {}),
        )
    return Rope(theta=float(near), dim=dim), fields.scaled_rope(r, both, both.get("rope_theta", far), dim, {})


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "gemma3_text", "Gemma3ForCausalLM")
    period = keys.get("attention.sliding_window_pattern", 6)
    n_layers, window = config["num_hidden_layers"], keys.get("attention.sliding_window")
    local = [window is not None and (layer + 1) % period != 0 for layer in range(n_layers)]
    own = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": gemma2.gguf_query_scalar(config, n_layers == 62),
        "sliding_window": window,
        "layer_types": ["sliding_attention" if is_local else "full_attention" for is_local in local],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "rope_parameters": {
            # Only the global layers are stretched.
            "sliding_attention": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)},
            "full_attention": config["rope_parameters"],
        },
    }
    keys.finish()
    return config | own


GGUF = (Gguf("gemma3", (*gemma2.GGUF_TENSORS, *gguf.shifted(gguf.QK_NORMS)), gguf_config),)
