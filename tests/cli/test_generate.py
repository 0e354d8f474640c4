"""`jaxlm generate` streams what `Model.generate` returns."""

import io
import math
import re

import pytest

import jaxlm


@pytest.fixture(scope="module")
def model(tiny):
    return jaxlm.load(tiny)


def test_streams_the_continuation(cli, tiny, model):
    expected = model.generate("abc", max_new_tokens=6, temperature=0)
    code, out, err = cli("generate", tiny, "abc", "--max-new-tokens", 6, "--temperature", 0)
    assert code == 0 and out == expected + "\n"
    assert re.search(r"3 prompt tokens at [\d.]+/s, 6 new at [\d.]+/s", err)


def test_chat_uses_the_template(cli, tiny, model):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "abc"}]
    expected = model.generate(chat=messages, max_new_tokens=6, temperature=0)
    args = ("abc", "--chat", "--system", "S", "--max-new-tokens", 6, "--temperature", 0)
    assert cli("generate", tiny, *args)[:2] == (0, expected + "\n")
    assert model.generate(["<system>S<user>abc<assistant>"], max_new_tokens=6, temperature=0) == [expected]


def test_stop_strings(cli, tiny, model):
    whole = model.generate("abc", max_new_tokens=12, temperature=0)
    args = ("abc", "--max-new-tokens", 12, "--temperature", 0, "--stop", "never", "--stop", whole[3:5])
    assert cli("generate", tiny, *args)[:2] == (0, whole[: whole.index(whole[3:5])] + "\n")


@pytest.mark.slow
def test_samples(cli, tiny, model):
    options = {"max_new_tokens": 6, "temperature": 1.5, "seed": 3}
    expected = model.generate("abc", samples=2, **options)
    args = [x for name, value in options.items() for x in ("--" + name.replace("_", "-"), value)]
    code, out, err = cli("generate", tiny, "abc", "--samples", 2, *args)
    assert code == 0 and out == "".join(text + "\n" for text in expected)
    assert "--- 1 of 2: 6 tokens" in err and re.search(r"10 new tokens at [\d.]+/s", err)


@pytest.mark.slow
def test_seed_and_standard_input(cli, tiny, monkeypatch):
    def run(seed: int) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
        code, out, _ = cli("generate", tiny, "-", "--max-new-tokens", 8, "--temperature", 2, "--seed", seed)
        assert code == 0
        return out

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["abc", "--temperature", math.nan], "temperature"),
        ([""], "prompt"),
        (["abc", "--system", "S"], "--chat"),
        (["abc" * 90], "256"),
        (["abc", "--max-new-tokens", "0"], "max_new_tokens"),
        (["abc", "--samples", "0"], "samples=0"),
        (["abc", "--stop", ""], "strings that are not empty"),
        (["abc", "--temperature", "1", "--top-p", "1.5"], "top_p"),
        (["abc", "--ignore-field", "rope_thetta"], "rope_thetta"),
    ],
)
def test_bad_input(cli, tiny, args, message):
    code, out, err = cli("generate", tiny, *args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
