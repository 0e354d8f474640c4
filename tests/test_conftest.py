"""The rules of conftest.py hold: unexpected skips fail where asked, and tests that need torch are told apart."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = """
import pytest

def test_skips():
    pytest.skip("because")

@pytest.mark.xfail(strict=True)
def test_fails_as_expected():
    assert False
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strict", "tests", "code", "said"),
    [
        (False, TESTS, 0, "1 skipped, 1 xfailed"),
        (True, TESTS, 1, "1 failed, 1 xfailed"),
        (True, 'import pytest\npytest.skip("because", allow_module_level=True)', 2, "because"),
    ],
)
def test_strict_skips(tmp_path, monkeypatch, strict, tests, code, said):
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(tests)
    monkeypatch.setenv("JAXLM_STRICT_SKIPS", "1")
    if not strict:
        monkeypatch.delenv("JAXLM_STRICT_SKIPS")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == code and said in run.stdout, run.stdout


def test_modules_that_import_torch(request):
    conftest = request.config.pluginmanager.get_plugin(str(HERE / "conftest.py"))
    assert conftest.imports_torch(HERE / "models" / "test_parity.py")
    assert not conftest.imports_torch(HERE / "cli" / "test_verify.py")
