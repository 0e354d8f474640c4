"""`jaxlm info` describes a checkpoint from its config and headers alone."""

import json
import shutil

import pytest

from jaxlm.checkpoints.gguf import GgufFile
from jaxlm.checkpoints.safetensors import SafetensorsSource
from jaxlm.cli.info import kinds, tokenizer
from jaxlm.models.config import Kind
from jaxlm.models.rope import Rope


@pytest.fixture(autouse=True)
def reading_weights_fails(monkeypatch):
    def refuse(*_):
        raise AssertionError("info read a weight")

    monkeypatch.setattr(SafetensorsSource, "read", refuse)
    monkeypatch.setattr(GgufFile, "lines", refuse)


def row(out: str, name: str) -> str:
    """The rest of the line that starts with a name."""
    return next(line[len(name) :].strip() for line in out.splitlines() if line.startswith(name))


def test_directory(cli, tiny):
    code, out, err = cli("info", tiny)
    assert (code, err) == (0, "")
    assert row(out, "architecture").startswith("llama")
    assert row(out, "layers") == "3: 3 x attention, rope theta 20,000"
    assert row(out, "context") == "256 tokens"
    assert row(out, "vocabulary") == "288 tokens, untied head"
    assert row(out, "width") == "32; 4 heads of 8, 2 for keys and values"
    assert row(out, "parameters") == "41,696"
    assert row(out, "tokenizer").endswith("256 tokens, chat template")
    assert row(out, "float32").split() == ["30", "41.7", "K", "166.8", "KB"]
    assert "lm_head" not in out


def test_params(cli, tiny):
    _, out, _ = cli("info", tiny, "--params")
    assert row(out, "model.layers.2.post_attention_layernorm.weight").split() == ["float32", "32", "128", "B"]
    assert row(out, "lm_head.weight").split()[:4] == ["float32", "288", "x", "32"]


def test_gguf(cli, smollm2_gguf):
    code, out, err = cli("info", smollm2_gguf, "--params")
    assert (code, err) == (0, "")
    assert row(out, "layers") == "30: 30 x attention, rope theta 100,000"
    assert row(out, "vocabulary") == "49,152 tokens, tied head"
    assert row(out, "parameters") == "134,515,008"
    assert row(out, "tokenizer") == "BPE, 49,152 tokens, chat template"
    assert row(out, "blk.29.attn_q.weight").startswith("Q4_1")


def test_unlike_layers():
    near = Kind(window=512, rope=Rope(theta=1e4, dim=8))
    far = Kind(mlp="moe", rope=Rope(theta=1e6, dim=8, scaling="yarn"))
    assert kinds((near, near, far)) == (
        "2 x attention, window 512, rope theta 10,000; 1 x attention, experts, rope theta 1,000,000 (yarn)"
    )


def test_tokenizers(tmp_path):
    assert tokenizer(tmp_path) == "none"
    vocab = {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"content": "<s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocab))
    assert tokenizer(tmp_path) == "tokenizer.json, Unigram, 3 tokens"
    settings = {"tokenizer_class": "LlamaTokenizerFast", "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert tokenizer(tmp_path) == "LlamaTokenizerFast, Unigram, 3 tokens, chat template"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"window_sighs": 3}, "window_sighs=3"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "spiral"),
    ],
)
def test_bad_config(cli, tiny, tmp_path, change, message):
    shutil.copytree(tiny, tmp_path / "bad")
    config = json.loads((tiny / "config.json").read_text()) | change
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    code, out, err = cli("info", tmp_path / "bad")
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_ignore_field(cli, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "odd")
    config = json.loads((tiny / "config.json").read_text()) | {"one": 1, "two": 2}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    assert cli("info", tmp_path / "odd", "--ignore-field", "one", "--ignore-field", "two")[0] == 0
    assert "two=2" in cli("info", tmp_path / "odd", "--ignore-field", "one")[2]


def test_truncated_file(cli, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    code, out, err = cli("info", tmp_path / "cut")
    assert (code, out) == (2, "") and "model.safetensors" in err
