"""Adapters from and to the peft package, on tiny models: the same logits both ways, the same tensors bit for bit, and
errors for what would change the result."""

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import jaxlm
from jaxlm.checkpoints import peft as jaxlm_peft
from jaxlm.checkpoints.adapter_config import INERT, LORA_KEYS, OFF, Lora, from_peft
from jaxlm.checkpoints.load import flatten, unflatten
from jaxlm.models import decoder
from jaxlm.train import adapters as training
from tests.models.cases import VOCAB
from tests.models.reference import well_conditioned

transformers.utils.logging.disable_progress_bar()
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = TOKENS | {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", BASE | {"head_dim": 12}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} | TOKENS,
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", BASE | {"hidden_size": 48, "sliding_window": 6}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", BASE | {"head_dim": 12}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        BASE | {"num_hidden_layers": 3, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"mlp_only_layers": [1], "head_dim": 12},
    ),
}  # fmt: skip
lora = functools.partial(peft.LoraConfig, r=3, lora_alpha=7, task_type="CAUSAL_LM")
prefix = functools.partial(peft.PrefixTuningConfig, num_virtual_tokens=3, task_type="CAUSAL_LM")
prompt = functools.partial(peft.PromptTuningConfig, num_virtual_tokens=3, task_type="CAUSAL_LM")
LLAMA_REGEX = r"model\.layers\.1\..*(gate_proj|o_proj)"
CASES = {
    "llama-lora": ("llama", lambda: lora(target_modules=["q_proj", "v_proj"], lora_dropout=0.1)),
    "llama-patterns": (
        "llama",
        lambda: lora(
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 5, r"layers\.1\.self_attn\.q_proj": 2},
            alpha_pattern={r"layers.0.*q_proj": 11},
        ),
    ),
    "llama-regex": ("llama", lambda: lora(target_modules=LLAMA_REGEX, use_dora=True)),
    "llama-layers": (
        "llama",
        lambda: lora(
            target_modules=["k_proj", "up_proj"],
            layers_to_transform=[0, 1],
            exclude_modules=["layers.1.mlp.up_proj"],
            use_rslora=True,
        ),
    ),
    "llama-dora": ("llama", lambda: lora(target_modules="all-linear", use_dora=True)),
    "llama-prefix": ("llama", prefix),
    "llama-prompt": ("llama", prompt),
    "gpt2-lora": ("gpt2", lambda: lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "gpt2-dora": ("gpt2", lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
    "gpt2-prefix": ("gpt2", prefix),
    "gpt2-prompt": ("gpt2", prompt),
    "phi3-lora": ("phi3", lambda: lora(target_modules=["qkv_proj", "gate_up_proj", "o_proj"])),
    "phi3-dora": ("phi3", lambda: lora(target_modules="all-linear", use_dora=True, use_rslora=True)),
    "phi3-prefix": ("phi3", prefix),
    "gemma-prompt": ("gemma", prompt),
    "qwen3_moe-lora": ("qwen3_moe", lambda: lora(target_modules=["v_proj", "o_proj"])),
    "qwen3_moe-prefix": ("qwen3_moe", prefix),
}  # fmt: skip


@functools.cache
def base(name: str):
    """(directory, our model, what owns the directory): a checkpoint with every weight drawn."""
    config, model, kwargs = MODELS[name]
    keep = tempfile.TemporaryDirectory(prefix=f"jaxlm-peft-{name}-")
    directory = Path(keep.name)
    torch.manual_seed(3)
    made = getattr(transformers, model)(getattr(transformers, config)(**kwargs))
    neutral = 0.0 if name == "gemma" else 1.0
    with torch.no_grad():
        for key, p in made.named_parameters():
            p.copy_(torch.randn(p.shape) * 0.2 + (neutral if p.ndim == 1 and key.endswith("weight") else 0))
    made.save_pretrained(directory)
    return directory, jaxlm.load(directory), keep


def torch_model(name: str):
    directory = base(name)[0]
    kwargs = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs).eval()


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = model.double().eval()(torch.tensor(tokens)).logits
    return logits[:, -tokens.shape[1] :].numpy()  # without those of a prompt


def make(name: str, config, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writes an adapter with every number drawn, and gives some tokens and their logits, in float64."""
    torch.manual_seed(5)
    model = peft.get_peft_model(torch_model(name), config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(p + 0.2 * torch.randn(p.shape) if "magnitude" in key else 0.2 * torch.randn(p.shape))
    model.save_pretrained(directory)
    tokens = well_conditioned(model.eval(), np.random.default_rng(7))
    return tokens, their_logits(model, tokens)


def close(got, want, tolerance=2e-6):
    assert np.abs(np.asarray(got) - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft(case, tmp_path):
    """Theirs in ours; what we write back has the same tensors, and gives peft the same logits."""
    name, config = CASES[case]
    tokens, want = make(name, config(), tmp_path / "theirs")
    directory, model, _ = base(name)
    adapted = model.with_adapters(tmp_path / "theirs")
    assert np.abs(want - np.asarray(model(tokens))).max() > 0.05 * np.abs(want).max(), "the adapter does nothing"
    close(adapted(tokens), want)
    adapted.save_adapters(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key in theirs:
        assert theirs[key].dtype == ours[key].dtype and np.array_equal(theirs[key], ours[key]), key
    loaded = peft.PeftModel.from_pretrained(torch_model(name), str(tmp_path / "ours"))
    np.testing.assert_array_equal(their_logits(loaded, tokens), want)
    stored = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(directory)


@pytest.mark.parametrize("case", ["llama-dora", "phi3-lora"])
def test_gradients_are_those_of_peft(case, tmp_path):
    """Of a sum of squares of the logits: DoRA's norm is a constant to them, a fused pair has one gradient."""
    name, config = CASES[case]
    tokens, _ = make(name, config(), tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(torch_model(name), str(tmp_path / "theirs"), is_trainable=True).double()
    loaded.eval()(torch.tensor(tokens)).logits.square().sum().backward()
    adapted = base(name)[1].with_adapters(tmp_path / "theirs")
    loss = lambda tree: jnp.square(decoder.forward(adapted.config, adapted.params, tokens, adapters=tree)[0]).sum()
    gradients = jax.jit(jax.grad(loss))(adapted.adapters.tree)
    table = training.modules_of(adapted.family, adapted.config)
    jaxlm_peft.write(tmp_path / "ours", dataclasses.replace(adapted.adapters, tree=gradients), table)
    ours = load_file(tmp_path / "ours/adapter_model.safetensors")
    theirs = {key.replace(".default", "").removesuffix(".weight"): p.grad for key, p in loaded.named_parameters()}
    assert len(ours) == sum(grad is not None for grad in theirs.values())
    for key, got in ours.items():
        want = theirs[key.removesuffix(".weight")].numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())


OURS = {
    "lora": ("llama", Lora(rank=3, alpha=5, dropout=0.1, rank_pattern=(("v_proj", 2),), targets=("v_proj", "up_proj"))),
    "dora": ("phi3", Lora(rank=2, dora=True, targets=("qkv_proj", "down_proj"))),
    "layers": ("gpt2", Lora(rank=2, rslora=True, layers=(1,))),
    "prefix": ("llama", training.Prefix(tokens=4)),
    "prompt": ("gpt2", training.Prompt(tokens=4, init="vocabulary")),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_in_peft(case, tmp_path):
    name, config = OURS[case]
    directory, model, _ = base(name)
    tree = training.init(config, model.family, model.config, model.params, jax.random.key(0))
    flat = flatten(tree)
    for path in filter(training.is_trainable, list(flat)):  # cosines are as good as random numbers, and repeat
        flat[path] = flat[path] + 0.2 * np.cos(np.arange(flat[path].size)).reshape(flat[path].shape)
    adapted = model.with_adapters(unflatten(flat), config)
    adapted.save_adapters(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(torch_model(name), str(tmp_path / "ours"))
    tokens = well_conditioned(loaded.eval(), np.random.default_rng(7))
    close(adapted(tokens), their_logits(loaded, tokens))
    again = model.with_adapters(tmp_path / "ours")
    np.testing.assert_array_equal(again(tokens), adapted(tokens))
    assert again.adapters.base == str(directory)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A LoRA of llama on q_proj."""
    make("llama", lora(target_modules=["q_proj"]), directory := tmp_path_factory.mktemp("plain"))
    return directory


@pytest.fixture
def written(plain, tmp_path):
    """written(key=value): a copy of it, with changes to its adapter_config.json."""
    return functools.partial(_written, plain, tmp_path)


def _written(plain, tmp_path, **changes) -> Path:
    shutil.copytree(plain, tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias='all' is not supported; supported: 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"use_rs_lora": True}, "unknown key 'use_rs_lora' = True, did you mean 'use_rslora'; ignore_fields"),
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; supported: LORA, PREFIX_TUNING, PROMPT_TUNING"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"target_parameters": ["x"]}, r"target_parameters=\['x'\] is not supported"),
        ({"layers_pattern": "blocks"}, "layers_pattern='blocks' is not supported"),
        ({"target_modules": ["q_prj"]}, "no module is named 'q_prj', did you mean 'q_proj'"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens: adapters are for the linear layers"),
        ({"target_modules": ".*layernorm"}, "input_layernorm: it is no linear layer"),
        ({"target_modules": "nothing.*"}, "matches no module"),
        ({"layers_to_transform": [2]}, r"layers has 2, expected 0..1"),
        ({"r": 2}, r"lora_A.weight has shape \[3, 32\], expected \[2, 32\]"),
        ({"use_dora": True}, "missing base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"layers_to_transform": [0]}, "unexpected base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"),
        ({"r": 0}, "rank=0: expected a whole number >= 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_strict(changes, message, written):
    with pytest.raises(ValueError, match=message):
        base("llama")[1].with_adapters(written(**changes))


def test_unknown_keys_may_be_passed_over(written):
    path = written(colour="blue")
    model = base("llama")[1]
    with pytest.raises(ValueError, match="unknown key 'colour'"):
        model.with_adapters(path)
    assert model.with_adapters(path, ignore_fields=["colour"]).adapters.config.rank == 3


def test_every_key_of_peft_is_known():
    """A new release with a new key fails here, not at a user's."""
    for cls in (peft.LoraConfig, peft.PrefixTuningConfig, peft.PromptTuningConfig):
        more = {"r": 2, "target_modules": ["q"], "num_virtual_tokens": 2, "bias": "none", "lora_bias": False}
        stored = cls().to_dict() | {"num_virtual_tokens": 2, "target_modules": ["q_proj"]}
        stored = {key: value for key, value in stored.items() if key in cls().to_dict()}
        assert from_peft(stored, "here"), more
    assert not (set(OFF) & set(INERT)) and not (set(LORA_KEYS) & {*OFF, *INERT})


def test_all_wrong_tensors_are_one_error(written):
    path = written()
    tensors = load_file(path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    tensors["stray"] = np.zeros(2, np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="2 tensors are wrong") as error:
        base("llama")[1].with_adapters(path)
    assert "missing" in str(error.value) and "unexpected stray [2]" in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json; it holds nothing"):
        base("llama")[1].with_adapters(tmp_path)


def test_headless_names_and_half_precision(written, tmp_path):
    """An adapter of a headless model lacks the base's prefix; bfloat16 tensors come back as they are."""
    path, model, tokens = written(), base("llama")[1], np.arange(3, 12)[None]
    want = model.with_adapters(path)(tokens)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace("model.model.", "model."): value for key, value in tensors.items()}, file)
    np.testing.assert_array_equal(model.with_adapters(path)(tokens), want)
    half = {key: value.astype("bfloat16") for key, value in tensors.items()}
    save_file(half, file)
    model.with_adapters(path).save_adapters(tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert all(again[key].tobytes() == half[key].tobytes() for key in half)


def test_a_classification_head_is_read_and_written(written, tmp_path):
    path = written(modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    tensors = load_file(path / "adapter_model.safetensors") | {"base_model.model.score.weight": np.ones((2, 32), "f")}
    save_file(tensors, path / "adapter_model.safetensors")
    model = base("llama")[1]
    table = training.modules_of(model.family, model.config)
    adapters = jaxlm_peft.read(path, table)
    assert list(adapters.heads) == ["score.weight"] and adapters.task_type == "SEQ_CLS"
    jaxlm_peft.write(tmp_path / "again", adapters, table)
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert again.keys() == tensors.keys() and all(np.array_equal(again[k], tensors[k]) for k in tensors)
    with pytest.raises(ValueError, match=r"a task's head \(score.weight\), which this model lacks"):
        model.with_adapters(path)
