"""`jaxlm convert` writes what `Model.save` writes, and touches nothing on bad input."""

import json

import pytest
from safetensors.numpy import load_file

import jaxlm


def test_bit_for_bit(cli, tiny, tmp_path):
    code, out, err = cli("convert", tiny, tmp_path / "out")
    assert code == 0 and out == "" and "1 safetensors" in err
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny / name).read_bytes(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == jaxlm.load(tiny).hf_config


def test_dtype(cli, tiny, tmp_path):
    assert cli("convert", tiny, tmp_path / "out", "--dtype", "float16")[0] == 0
    assert {str(a.dtype) for a in load_file(tmp_path / "out" / "model.safetensors").values()} == {"float16"}


def test_needs_overwrite(cli, tiny, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    code, _, err = cli("convert", tiny, tmp_path)
    assert code == 2 and "--overwrite" in err
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    assert cli("convert", tiny, tmp_path, "--overwrite")[0] == 0
    assert (tmp_path / "mine.txt").read_text() == "kept" and (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["float8", "int8"])
def test_unknown_dtype(cli, tiny, tmp_path, dtype):
    code, _, err = cli("convert", tiny, tmp_path / "out", "--dtype", dtype)
    assert code == 2 and dtype in err and not (tmp_path / "out").exists()
