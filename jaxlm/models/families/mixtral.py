"""Mixtral: Mistral with eight feed-forward experts, two a token, their weights renormalised."""

import dataclasses

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.checkpoints.rules import AnyRule, Rule
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig, MoeConfig
from jaxlm.models.families import llama
from jaxlm.models.reader import Reader

L, P, BUFFERS = llama.L, llama.P, llama.BUFFERS
E = L + "block_sparse_moe.experts.{expert}."
RULES = (
    *llama.without(llama.RULES, P + "mlp/"),
    Rule(L + "block_sparse_moe.gate.weight", P + "mlp/router/gate/w", "e d -> d e"),
    Rule(E + "w1.weight", P + "mlp/experts/gate/w", "f d -> d f"),
    Rule(E + "w2.weight", P + "mlp/experts/down/w", "d f -> f d"),
    Rule(E + "w3.weight", P + "mlp/experts/up/w", "f d -> d f"),
)


def config(r: Reader) -> DecoderConfig:
    r.expect("router_jitter_noise", 0.0)
    r.inert("output_router_logits", "router_aux_loss_coef")  # what a trainer reports and adds
    expert = llama.mlp(r)
    base = llama.base(
        r,
        attention=llama.attention(r, n_kv_heads=r["num_key_value_heads"]),
        mlp=None,
        rope=fields.rope(r, theta=1e6),
        windows=(r.get("sliding_window"),) * r["num_hidden_layers"],
        moe=MoeConfig(
            n_experts=r["num_local_experts"], top_k=r["num_experts_per_tok"], expert=expert, renormalise=True
        ),
    )
    return dataclasses.replace(base, kinds=tuple(dataclasses.replace(k, mlp="moe") for k in base.kinds))


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "mixtral", "MixtralForCausalLM", experts=True)
    counts = {"num_local_experts": keys["expert_count"], "num_experts_per_tok": keys["expert_used_count"]}
    keys.finish()
    return config | counts | {"hidden_act": "silu", "sliding_window": None}


GGUF_TENSORS = (
    *gguf.permuted((*gguf.EMBED, *gguf.NORMS, *gguf.ATTENTION)),
    gguf.layer("ffn_gate_inp.weight", "block_sparse_moe.gate.weight"),
    *gguf.experts("block_sparse_moe", gate="w1", up="w3", down="w2"),
)
GGUF = (
    Gguf(
        "llama",
        GGUF_TENSORS,
        gguf_config,
        lambda m: bool(m.get("llama.expert_count")),  # without experts: llama.py
        in_config=gguf.ROPE_TENSORS,
    ),
)
