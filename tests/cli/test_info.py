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


def test_mesh(cli, tiny):
    """64 devices, of which there is none; 2 key-value heads do not divide over 4."""
    code, out, err = cli("info", tiny, "--mesh", "fsdp=16,tensor=4")
    assert (code, err) == (0, "")
    line = row(out, "layers/attn/q/w")
    assert line.split()[:8] == ["float32", "3", "x", "32", "x", "4", "x", "8"] and "-, fsdp, tensor, -" in line
    assert line.split()[-4:] == ["12.29", "KB", "192", "B"]
    assert "whole" in row(out, "final_norm/scale") and row(out, "final_norm/scale").endswith("128 B     128 B")
    assert row(out, "devices") == "64"
    whole = [line.split(maxsplit=3)[3].strip() for line in out.splitlines() if line.startswith("does not divide")]
    assert whole == ["layers/attn/k/w: kv_heads=2 over 4", "layers/attn/v/w: kv_heads=2 over 4"]


def test_mesh_as_json(cli, tiny):
    code, out, _ = cli("info", tiny, "--mesh", "fsdp=8", "--dtype", "bfloat16", "--json")
    found = json.loads(out)
    mesh, parameters = found["mesh"], found["mesh"]["parameters"]
    assert code == 0 and found["context"] == "256 tokens" and (mesh["devices"], mesh["whole"]) == (8, [])
    assert parameters["embed/w"] == {
        "dtype": "bfloat16", "shape": [288, 32], "spec": [[], ["fsdp"]], "bytes": 18432, "bytes_per_device": 2304,
    }  # fmt: skip
    assert mesh["bytes"] == 2 * 41696 and mesh["bytes_per_device"] == 2 * (224 + (41696 - 224) // 8)  # norms are whole


def test_json_lists_tensors(cli, tiny):
    found = json.loads(cli("info", tiny, "--params", "--json")[1])
    assert found["tensors"]["lm_head.weight"]["shape"] == [288, 32] and "mesh" not in found


def test_mesh_of_gguf(cli, smollm2_gguf):
    """Dequantized to float32 unless a dtype is given, as `load` does; the heads do not divide, the vocabulary does."""
    _, out, _ = cli("info", smollm2_gguf, "--mesh", "tensor=8", "--dtype", "bfloat16")
    assert row(out, "all parameters").startswith("269 MB") and "embed/w: vocab" not in out
    assert "layers/attn/q/w: heads=9 over 8" in out


def test_bad_mesh(cli, tiny):
    assert "did you mean 'fsdp'" in cli("info", tiny, "--mesh", "fdsp=4")[2]
    assert "needs --mesh" in cli("info", tiny, "--dtype", "bfloat16")[2]
