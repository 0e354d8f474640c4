"""Gemma 2: alternating local and global layers, norms on both sides of each branch, soft-capped logits."""

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
