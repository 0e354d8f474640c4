"""`jaxlm generate` streams what `Model.generate` returns."""

import io
import math

import pytest

import jaxlm


@pytest.fixture(scope="module")
def model(tiny):
    return jaxlm.load(tiny)


def test_streams_the_continuation(cli, tiny, model):
    expected = model.generate("abc", max_new_tokens=6, temperature=0)
    code, out, err = cli("generate", tiny, "abc", "--max-new-tokens", 6, "--temperature", 0)
    assert code == 0 and out == expected + "\n"
    assert " tokens in " in err


def test_chat_uses_the_template(cli, tiny, model):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "abc"}]
    expected = model.generate(chat=messages, max_new_tokens=6, temperature=0)
    args = ("abc", "--chat", "--system", "S", "--max-new-tokens", 6, "--temperature", 0)
    assert cli("generate", tiny, *args)[:2] == (0, expected + "\n")
    assert model.generate(["<system>S<user>abc<assistant>"], max_new_tokens=6, temperature=0) == [expected]


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
        (["abc", "--temperature", "1", "--top-p", "1.5"], "top_p"),
        (["abc", "--ignore-field", "rope_thetta"], "rope_thetta"),
    ],
)
def test_bad_input(cli, tiny, args, message):
    code, out, err = cli("generate", tiny, *args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
