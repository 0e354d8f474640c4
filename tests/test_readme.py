"""What README.md says can be run, and its table of families is complete."""

import re
from pathlib import Path

import pytest

from jaxlm.cli.main import COMMANDS
from jaxlm.models import registry
from tests.models.cases import CASES

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
    assert [row[0].split()[1] for row in rows("On the command line")[2:]] == list(COMMANDS)


def test_every_family_has_its_row():
    table = {row[0]: row[1:] for row in rows("Families")[2:]}
    families = [name for name in registry.names() if not name.startswith("toy")]  # the tests add one of their own
    assert list(table) == families
    for name, (logits, export, gguf) in table.items():
        assert logits == export == "yes" and name in {case.id.split("-")[0] for case in CASES}
        assert (gguf == "yes") == bool(registry.family(name).gguf), name
