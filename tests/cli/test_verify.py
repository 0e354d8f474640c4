"""`jaxlm verify` against torch: it agrees with a right model and points at the layer of a wrong one."""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.cli import verify


def wrong_copy(tiny, to, name: str, factor: float):
    """A copy of the checkpoint in which one tensor is scaled."""
    shutil.copytree(tiny, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = tensors[name] * np.float32(factor)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.torch
def test_matches(cli, tiny):
    code, out, _ = cli("verify", tiny, "--tokens", 100, "--new-tokens", 12)
    assert code == 0, out
    assert "100 of English text" in out and "100 of 100" in out and "none of 3" in out and "12 of 12 equal" in out
    assert "does not match" not in out


@pytest.mark.torch
def test_random_tokens_without_a_tokenizer(cli, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    code, out, _ = cli("verify", tmp_path / "bare", "--tokens", 50, "--new-tokens", 0)
    assert code == 0 and "drawn at random" in out


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.1.self_attn.q_proj.weight", "layer 1"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2"),
        ("lm_head.weight", "final norm or head"),
    ],
)
def test_names_the_first_diverging_layer(cli, tiny, tmp_path, monkeypatch, name, place):
    right = verify.reference
    wrong = wrong_copy(tiny, tmp_path / "wrong", name, 1.001)
    monkeypatch.setattr(verify, "reference", lambda _: right(wrong))
    code, out, _ = cli("verify", tiny, "--tokens", 40, "--new-tokens", 4)
    assert code == 1 and "does not match" in out
    assert place in out.split("first diverging layer")[1].split("\n")[0]


@pytest.mark.torch
def test_greedy_text_alone_fails(cli, tiny, monkeypatch):
    right = verify.run_reference

    def one_token_off(*args):
        logits, streams, greedy, margins = right(*args)
        greedy[2] += 1
        return logits, streams, greedy, margins

    monkeypatch.setattr(verify, "run_reference", one_token_off)
    code, out, _ = cli("verify", tiny, "--tokens", 40, "--new-tokens", 4)
    assert code == 1 and "2 of 4 equal, then the reference prefers its token by" in out


@pytest.mark.parametrize("absent", ["torch", "accelerate"])
def test_says_what_to_install(cli, tiny, smollm2_gguf, monkeypatch, absent):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == absent else found(name, *a))
    for source in (tiny, smollm2_gguf) if absent == "torch" else (smollm2_gguf,):
        code, out, err = cli("verify", source)
        assert (code, out) == (2, "") and "pip install" in err and absent in err and err.count("\n") == 1


def command(*args: object) -> str:
    """The output of `jaxlm ...` in a process of its own, compiled with XLA's own settings, unlike in these tests."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run([sys.executable, "-m", "jaxlm", *map(str, args)], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.torch
def test_smollm2(smollm2_gguf):
    """The GGUF file itself, beside transformers' GGUF loader."""
    out = command("verify", smollm2_gguf, "--tokens", 512, "--new-tokens", 64)
    assert "512 of 512" in out and "64 of 64 equal" in out, out


@pytest.mark.slow
@pytest.mark.torch
def test_gemma3_converted(gemma3_gguf, tmp_path):
    """A safetensors export of the GGUF file (whose own loading takes transformers a minute); longer than the window."""
    command("convert", gemma3_gguf, tmp_path / "gemma")
    out = command("verify", tmp_path / "gemma", "--tokens", 540, "--new-tokens", 64)
    assert "540 of 540" in out and "64 of 64 equal" in out, out


@pytest.mark.torch
@pytest.mark.parametrize("args", [["--tokens", 250, "--new-tokens", 7], ["--tokens", 0], ["--new-tokens", -1]])
def test_bad_counts(cli, tiny, args):
    code, out, err = cli("verify", tiny, *args)
    assert (code, out) == (2, "") and err.startswith("error: ") and "--tokens" in err
