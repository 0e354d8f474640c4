"""`jaxlm prepare`."""

import json

import pytest

from jaxlm.data.cache import open_cache


@pytest.fixture
def chats(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": talk, "id": i}) + "\n" for i in range(20)))
    return path


def test_prepare(cli, tiny, chats, tmp_path):
    options = ("--tokenizer", tiny, "--format", "messages")
    code, out, err = cli("prepare", chats, tmp_path / "out", *options)
    assert code == 2 and f"{chats}:1: column 'id' not known" in err and not (tmp_path / "out").exists()
    code, out, err = cli("prepare", chats, tmp_path / "out", *options, "--ignore-column", "id")
    assert code == 0, err
    assert "20 of 20 rows" in out and "(uint16)" in out and "100 to be predicted" in out and "rows/s" in err
    assert open_cache(tmp_path / "out").header.loss_tokens == 100
    code, out, err = cli("prepare", chats, tmp_path / "out", *options, "--ignore-column", "id")
    assert code == 0 and "20 of 20 rows" in out and "is up to date" in err


def test_bad_rows(cli, tiny, chats, tmp_path):
    with chats.open("a") as file:
        file.write("{\n")
    options = ("--tokenizer", tiny, "--format", "messages", "--ignore-column", "id")
    code, _, err = cli("prepare", chats, tmp_path / "out", *options)
    assert code == 2 and f"{chats}:21: invalid JSON" in err
    code, out, _ = cli("prepare", chats, tmp_path / "out", *options, "--max-bad-rows", 0.1)
    assert code == 0 and "20 of 21 rows" in out and "1 rows, named in" in out


def test_a_config_file(cli, tiny, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    file = tmp_path / "data.yaml"
    file.write_text(f"data:\n  source: {tmp_path}/a.txt\n  documents: blank\n  eos: false\n")
    code, _, err = cli("prepare", file, tmp_path / "out")
    assert code == 2 and "'tokenizer' is missing" in err
    code, out, err = cli("prepare", file, tmp_path / "out", "--tokenizer", tiny)
    assert code == 0 and "2 of 2 rows" in out, err
    code, out, err = cli("prepare", file, tmp_path / "lines", "--tokenizer", tiny, "--documents", "file")
    assert code == 0 and "1 of 1 rows" in out, err


def test_mistakes(cli, tiny, chats, tmp_path):
    assert "pass --tokenizer" in cli("prepare", chats, tmp_path / "out")[2]
    code, _, err = cli("prepare", chats, tmp_path / "out", "--tokenizer", tiny, "--format", "mesages")
    assert code == 2 and "did you mean 'messages'" in err
    code, _, err = cli("prepare", chats, tmp_path / "out", "--tokenizer", tiny, "--column", "text")
    assert code == 2 and "expected NAME=COLUMN" in err
