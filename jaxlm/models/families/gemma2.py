"""Gemma 2: alternating local and global layers, norms on both sides of each branch, soft-capped logits."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.checkpoints.rules import AnyRule, Rule
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig
from jaxlm.models.families import gemma, llama
from jaxlm.models.reader import Reader

L, P, BUFFERS = llama.L, llama.P, llama.BUFFERS
RULES = (
    *llama.without(llama.RULES, P + "mlp_norm/"),
    Rule(L + "post_attention_layernorm.weight", P + "attn_post_norm/scale"),
    Rule(L + "pre_feedforward_layernorm.weight", P + "mlp_norm/scale"),
    Rule(L + "post_feedforward_layernorm.weight", P + "mlp_post_norm/scale"),
)


def config(r: Reader) -> DecoderConfig:
    r.inert("hidden_act")  # hidden_activation is the one in use
    r.inert("cache_implementation", "sliding_window_size")
    return gemma.base(
        r,
        mlp=llama.mlp(r, act="hidden_activation"),
        rope=fields.rope(r),
        windows=fields.windows(r, [layer % 2 == 0 for layer in range(r["num_hidden_layers"])]),
        scale=r["query_pre_attn_scalar"] ** -0.5,
        softcap=r.get("attn_logit_softcapping"),
        post_norm=True,
        logit_softcap=r.get("final_logit_softcapping"),
    )


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "gemma2", "Gemma2ForCausalLM")
    keys.expect("attention.sliding_window_pattern", 2)
    n_layers = config["num_hidden_layers"]
    own = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": gguf_query_scalar(config, n_layers == 46),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(n_layers)],
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0),
    }
    keys.finish()
    return config | own


def gguf_query_scalar(config: dict, is_27b: bool) -> int:
    """query_pre_attn_scalar, which the file does not say; llama.cpp, too, tells the 27B models by their depth."""
    return config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]


GGUF_NORMS = gguf.shifted(
    (
        gguf.layer("attn_norm.weight", "input_layernorm.weight"),
        gguf.layer("post_attention_norm.weight", "post_attention_layernorm.weight"),
        gguf.layer("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
        gguf.layer("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
    )
)
GGUF_TENSORS = (*gguf.shifted(gguf.EMBED), *GGUF_NORMS, *gguf.ATTENTION, *gguf.MLP)
GGUF = (Gguf("gemma2", GGUF_TENSORS, gguf_config),)
