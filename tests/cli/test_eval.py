"""`jaxlm eval`: the perplexity of a file, and the way to lm-evaluation-harness."""

import json
import sys
import types

import pytest

import jaxlm
from jaxlm import harness

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 5


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_json_and_table_say_what_python_says(cli, tiny, book):
    want = jaxlm.load(tiny).perplexity(TEXT, window=64, stride=48)
    args = ("eval", tiny, "--text", book, "--window", 64, "--stride", 48)
    code, out, err = cli(*args, "--json")
    found = json.loads(out)
    assert code == 0 and err == ""
    assert found["perplexity"] == pytest.approx(want.value) and found["nats_per_token"] == pytest.approx(want.nll)
    assert found["tokens"] == want.tokens == len(TEXT) - 1 and found["windows"] == 8
    assert found["tokens_per_second"] > 0 and found["seconds"] > 0
    code, out, _ = cli(*args)
    assert code == 0 and f"{want.nll:.4f}" in out and "tokens per second" in out


def test_a_single_window(cli, tiny, book):
    code, out, _ = cli("eval", tiny, "--text", book, "--window", 256, "--json")
    assert code == 0 and json.loads(out)["windows"] == 2
    book.write_text("short")
    code, out, _ = cli("eval", tiny, "--text", book, "--json")
    assert code == 0 and json.loads(out)["windows"] == 1 and json.loads(out)["tokens"] == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "expected either --text FILE or --tasks"),
        (["--text", "a", "--tasks", "b"], "expected either --text FILE or --tasks"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--tasks", "hellaswag"], "pip install lm_eval"),
    ],
)
def test_bad_input(cli, tiny, monkeypatch, args, message):
    monkeypatch.setattr(harness, "installed", lambda: False)
    code, out, err = cli("eval", tiny, *args)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (b"", (), "is empty"),
        (b"\xff\xfe\x00", (), "is not UTF-8"),
        (b"a", (), "the text has one token"),
        (b"abc", ("--window", 257), "window=257: expected 2 to 256"),
        (b"abc", ("--window", 8, "--stride", 9), "stride=9: expected less than the window of 8"),
    ],
)
def test_bad_files_and_windows(cli, tiny, book, content, args, message):
    book.write_bytes(content)
    code, out, err = cli("eval", tiny, "--text", book, *args)
    assert code == 2 and out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_tasks_go_to_the_harness(cli, tiny, monkeypatch):
    """A stand-in for lm_eval that asks the adapter one question."""
    asked = {}

    def simple_evaluate(model, tasks, **options):
        asked.update(options, tasks=tasks, batch_size=model.batch_size)
        request = types.SimpleNamespace(args=("abc", "de"))
        ((logprob, greedy),) = model.loglikelihood([request])
        scores = {"alias": "t", "acc,none": float(greedy), "logprob,none": logprob, "acc_stderr,none": "N/A"}
        return {"results": {"task_a": scores}}

    LM = type("LM", (), {"__init__": lambda self: setattr(self, "cache_hook", None)})
    modules = {"lm_eval": {"simple_evaluate": simple_evaluate}, "lm_eval.api": {}, "lm_eval.api.model": {"LM": LM}}
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(harness, "installed", lambda: True)
    args = ("--tasks", "task_a,task_b", "--limit", 3, "--num-fewshot", 2, "--batch-size", 5)
    code, out, _ = cli("eval", tiny, *args, "--json")
    assert code == 0
    assert asked == {"tasks": ["task_a", "task_b"], "limit": 3, "num_fewshot": 2, "batch_size": 5}
    model = jaxlm.load(tiny)
    want = float(model.logprobs([[*map(int, model.tokenizer("abcde")["input_ids"])]])[0, 2:].sum())
    assert json.loads(out)["task_a"] == {"acc": 0.0, "logprob": pytest.approx(want, rel=1e-4), "acc_stderr": "N/A"}
    code, out, _ = cli("eval", tiny, *args)
    assert code == 0 and "task_a" in out and f"{want:.4f}"[:6] in out
    assert cli("eval", tiny, "--tasks", ",")[0] == 2
    adapter = harness.lm(model)
    assert isinstance(adapter, LM) and hasattr(adapter, "cache_hook")
