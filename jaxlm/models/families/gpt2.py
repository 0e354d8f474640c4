"""GPT-2: learned positions, LayerNorm, tanh-GELU, q, k, v in one input-major tensor, tied head."""

from jaxlm.checkpoints import gguf_config as gguf
from jaxlm.checkpoints.gguf import Gguf, GgufFile, GgufTensor
from jaxlm.checkpoints.rules import Alias, AnyRule, Interleaved, Rule
from jaxlm.models import fields
from jaxlm.models.config import AttentionConfig, DecoderConfig, DropoutConfig, Kind, MlpConfig, NormConfig
from jaxlm.models.reader import Reader

BASE = "transformer."
L, P = "transformer.h.{layer}.", "layers/"
BUFFERS = (L + "attn.bias", L + "attn.masked_bias")
QKV = tuple(P + f"attn/{name}" for name in "qkv")
NORMS = (("transformer.ln_f", "final_norm"), (L + "ln_1", P + "attn_norm"), (L + "ln_2", P + "mlp_norm"))

RULES = (
    Rule("transformer.wte.weight", "embed/w"),
    Rule("transformer.wpe.weight", "positions/w"),
    Interleaved(L + "attn.c_attn.weight", tuple(p + "/w" for p in QKV), "d (c n h) -> c d n h"),
    Interleaved(L + "attn.c_attn.bias", tuple(p + "/b" for p in QKV), "(c n h) -> c n h"),
    Rule(L + "attn.c_proj.weight", P + "attn/o/w", "(n h) d -> n h d"),
    Rule(L + "attn.c_proj.bias", P + "attn/o/b"),
    Rule(L + "mlp.c_fc.weight", P + "mlp/up/w"),
    Rule(L + "mlp.c_fc.bias", P + "mlp/up/b"),
    Rule(L + "mlp.c_proj.weight", P + "mlp/down/w"),
    Rule(L + "mlp.c_proj.bias", P + "mlp/down/b"),
    *(Rule(f"{hf}.weight", f"{path}/scale") for hf, path in NORMS),
    *(Rule(f"{hf}.bias", f"{path}/bias") for hf, path in NORMS),
)


def config(r: Reader) -> DecoderConfig:
    r.expect("add_cross_attention", False)
    r.inert("reorder_and_upcast_attn")  # an order of operations for float16; scores are float32 here anyway
    r.inert("n_ctx", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
    r.inert("summary_first_dropout")
    n_heads, d_model = r["n_head"], r["n_embd"]
    return DecoderConfig(
        vocab_size=r["vocab_size"],
        d_model=d_model,
        context=r["n_positions"],
        kinds=(Kind(),) * r["n_layer"],
        attention=AttentionConfig(
            n_heads=n_heads,
            n_kv_heads=n_heads,
            head_dim=d_model // n_heads,
            qkv_bias=True,
            out_bias=True,
            scale=None if r.get("scale_attn_weights", True) else 1.0,
            divide_by_depth=r.get("scale_attn_by_inverse_layer_idx", False),
        ),
        mlp=MlpConfig(
            d_ff=r.get("n_inner", 4 * d_model), act=r.choice("activation_function", fields.ACTS), gated=False, bias=True
        ),
        norm=NormConfig(kind="layer", eps=r["layer_norm_epsilon"]),
        learned_positions=True,
        tie_embeddings=r.get("tie_word_embeddings", True),
        dropout=DropoutConfig(
            embed=r.get("embd_pdrop", 0.1), residual=r.get("resid_pdrop", 0.1), attention=r.get("attn_pdrop", 0.1)
        ),
        init_std=r.get("initializer_range", 0.02),
    )


def rules(config: DecoderConfig) -> tuple[AnyRule, ...]:
    if config.tie_embeddings:
        return (*RULES, Alias("lm_head.weight", "transformer.wte.weight"))
    return (*RULES, Rule("lm_head.weight", "head/w"))


def gguf_config(file: GgufFile) -> dict:
    keys = gguf.Keys(file)
    d_model, d_ff = keys["embedding_length"], keys["feed_forward_length"]
    config = {
        **gguf.identity(file, "gpt2", "GPT2LMHeadModel"),
        "n_embd": d_model,
        "n_layer": keys["block_count"],
        "n_head": keys["attention.head_count"],
        "n_positions": keys["context_length"],
        "n_inner": None if d_ff == 4 * d_model else d_ff,
        "layer_norm_epsilon": keys["attention.layer_norm_epsilon"],
        "activation_function": "gelu_new",
    }
    keys.expect("attention.head_count_kv", config["n_head"])
    keys.finish()
    return config


def both(gguf_name: str, hf: str, transpose: bool = False) -> tuple[GgufTensor, ...]:
    """A weight and its bias; `transpose`: the weight is one of transformers' input-major ones."""
    return GgufTensor(gguf_name + ".weight", hf + ".weight", transpose=transpose), GgufTensor(
        gguf_name + ".bias", hf + ".bias"
    )


GGUF_TENSORS = (
    GgufTensor("token_embd.weight", "transformer.wte.weight"),
    GgufTensor("position_embd.weight", "transformer.wpe.weight"),
    # Written by old converters, as a copy of token_embd that may be quantized otherwise.
    GgufTensor("output.weight", "lm_head.weight", optional=True),
    *both("output_norm", "transformer.ln_f"),
    *both(gguf.B + "attn_norm", L + "ln_1"),
    *both(gguf.B + "ffn_norm", L + "ln_2"),
    *both(gguf.B + "attn_qkv", L + "attn.c_attn", transpose=True),
    *both(gguf.B + "attn_output", L + "attn.c_proj", transpose=True),
    *both(gguf.B + "ffn_up", L + "mlp.c_fc", transpose=True),
    *both(gguf.B + "ffn_down", L + "mlp.c_proj", transpose=True),
)
GGUF = (Gguf("gpt2", GGUF_TENSORS, gguf_config),)
