"""What README.md says can be run, and its table of families is complete."""

import json
import re
from pathlib import Path

import pytest

from jaxlm.cli.families import RESULTS
from jaxlm.cli.families import rows as families
from jaxlm.cli.main import COMMANDS, main
from tests.models.cases import CASES, RWKV

README = (Path(__file__).parent.parent / "README.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    table = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]


@pytest.mark.slow
def test_the_example_runs(smollm2_gguf, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Paris" in printed, printed
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        f.name for f in Path("SmolLM2-bfloat16").iterdir()
    }


def test_the_commands_are_those_there_are():
    assert [row[0].strip("`").split()[1] for row in rows("On the command line")[2:]] == list(COMMANDS)


def test_the_families_are_what_the_command_prints(capsys):
    """After a change: jaxlm families --markdown"""
    main(["families", "--markdown"])
    table = [line for line in README.split("\n## Families\n")[1].splitlines() if line.startswith("|")]
    assert table == capsys.readouterr().out.splitlines()


def test_every_family_was_compared():
    """Results are recorded by JAXLM_WRITE_RESULTS=1, for every family and every case of this day."""
    cases = {case.id for case in CASES} | {f"rwkv-{version}" for version in RWKV}
    assert json.loads(RESULTS.read_text()).keys() == cases
    for row in families(RESULTS):
        assert row.logits is not None and row.logits <= 1e-5 and row.export, row
