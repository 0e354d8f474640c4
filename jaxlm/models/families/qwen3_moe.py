"""Qwen3-MoE: Qwen3 with many small experts on every `decoder_sparse_step`-th layer, dense layers between."""

import dataclasses

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile
from jaxlm.checkpoints.rules import AnyRule, Rule
from jaxlm.models import fields
from jaxlm.models.config import DecoderConfig, MoeConfig
from jaxlm.models.families import llama, qwen3
from jaxlm.models.reader import Reader

L, P, BUFFERS = llama.L, llama.P, llama.BUFFERS
E = L + "mlp.experts.{expert}."
RULES = (
    *qwen3.RULES,
    Rule(L + "mlp.gate.weight", P + "mlp/router/gate/w", "e d -> d e"),
    Rule(E + "gate_proj.weight", P + "mlp/experts/gate/w", "f d -> d f"),
    Rule(E + "up_proj.weight", P + "mlp/experts/up/w", "f d -> d f"),
    Rule(E + "down_proj.weight", P + "mlp/experts/down/w", "d f -> f d"),
)


def config(r: Reader) -> DecoderConfig:
    r.inert("output_router_logits", "router_aux_loss_coef")  # what a trainer reports and adds
    r.inert("max_window_layers")  # a window, when switched on, is on every layer here
    n_layers, window = r["num_hidden_layers"], r.get("sliding_window")
    base = llama.base(
        r,
        attention=qwen3.attention(r),
        mlp=llama.mlp(r),
        rope=fields.rope(r),
        windows=(window if r.get("use_sliding_window", False) else None,) * n_layers,
        moe=MoeConfig(
            n_experts=r["num_experts" if "num_experts" in r else "num_local_experts"],
            top_k=r["num_experts_per_tok"],
            expert=dataclasses.replace(llama.mlp(r), d_ff=r["moe_intermediate_size"]),
            renormalise=r.get("norm_topk_prob", False),
        ),
    )
    step, dense = r.get("decoder_sparse_step", 1), r.get("mlp_only_layers", ())
    moe = [layer not in dense and (layer + 1) % step == 0 for layer in range(n_layers)]
    kinds = (dataclasses.replace(k, mlp="moe" if m else "dense") for k, m in zip(base.kinds, moe, strict=True))
    return dataclasses.replace(base, kinds=tuple(kinds))


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    return (*RULES, llama.head(config))


def gguf_config(file: GgufFile) -> dict:
    config, keys = gguf.decoder(file, "qwen3_moe", "Qwen3MoeForCausalLM", experts=True)
    top_k = keys["expert_used_count"]
    moe = {
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": keys.get("expert_feed_forward_length", config["intermediate_size"] // top_k),
        # llama.cpp always renormalises, and knows no dense layers.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    keys.finish()
    bias = gguf.biased(file, gguf.BIASES)
    return config | moe | {"hidden_act": "silu", "attention_bias": bias, "use_sliding_window": False}


GGUF_TENSORS = (
    *qwen3.GGUF_TENSORS,
    gguf.layer("ffn_gate_inp.weight", "mlp.gate.weight"),
    *gguf.experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)
GGUF = (Gguf("qwen3moe", GGUF_TENSORS, gguf_config),)
