"""`jaxlm families`: the table, and the results it is made from."""

import json

import pytest

from jaxlm.cli import families
from jaxlm.models import registry


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "parity.json"
    cases = {
        "llama": {"family": "llama", "logits": 3e-7, "export": True},
        "llama-old": {"family": "llama", "logits": 4e-7, "export": True},
        "gpt2": {"family": "gpt2", "logits": 1e-7, "export": False},
    }
    path.write_text(json.dumps(cases))
    return path


def test_a_family_is_as_good_as_its_worst_case(results):
    made = {row.name: row for row in families.rows(results)}
    assert list(made) == [name for name in registry.names() if not name.startswith("toy")]
    assert made["llama"].cells()[3:] == ("4.0e-07", "yes", "yes")
    assert made["gpt2"].cells()[3:5] == ("1.0e-07", "no")
    assert made["mistral"].cells()[3:] == ("-", "-", "no")
    assert made["llama"].summary.startswith("Llama: ") and made["llama"].lines > 20


def test_table_and_markdown(cli, results):
    code, out, _ = cli("families", "--results", results)
    assert code == 0 and "4.0e-07" in out and "Llama: pre-norm" in out
    code, out, _ = cli("families", "--results", results, "--markdown")
    assert code == 0 and out.startswith("| model_type | what it is |") and "| llama | Llama: " in out


def test_bad_results(cli, tmp_path):
    code, out, err = cli("families", "--results", tmp_path / "nowhere")
    assert code == 2 and out == "" and "no such file of results" in err
    (tmp_path / "bad").write_text('{"llama": 3}')
    code, out, err = cli("families", "--results", tmp_path / "bad")
    assert code == 2 and out == "" and "is not what the parity tests write" in err
