"""scripts/gpu_check.py, run small on the CPU: everything but the GPU's own figures."""

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import gpu_check
        import gpu_contenders

        yield gpu_check, gpu_contenders
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module", autouse=True)
def restored():
    """A dry run turns XLA's optimizations off."""
    before = jax.config.read("jax_disable_most_optimizations")
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def dry(scripts, tmp_path_factory):
    """Exit status, report and Markdown of a dry run."""
    files = [tmp_path_factory.mktemp("gpu_check") / name for name in ("report.json", "report.md")]
    status = scripts[0].main(["--small", "--json", str(files[0]), "--markdown", str(files[1])])
    return status, json.loads(files[0].read_text()), files[1].read_text()


@pytest.mark.slow
def test_a_dry_run_passes_and_leaves_nobody_out(scripts, dry):
    status, report, _ = dry
    _, contenders = scripts
    want = {(case.name, name) for case in contenders.cases(True) for name in contenders.contenders(True)}
    assert status == 0
    assert {(row["case"], row["contender"]) for row in report["rows"]} == want
    assert {case.name for case in contenders.cases(True)} < {case.name for case in contenders.cases(False)}
    assert report["device"] == "cpu" and report["versions"]["jax"] and "--small" in report["command"]
    for row in report["rows"]:
        assert row["status"] in ("ok", "refused"), row
        assert bool(row["why"]) == (row["status"] == "refused")
        if row["status"] == "ok":
            assert row["forward_ms"] > 0 and row["forward_tflops"] > 0
            flex_on_cpu, decode = row["contender"] == "torch flex", row["case"].startswith("decode")
            assert set(row["errors"]) == ({"out"} if flex_on_cpu or decode else {"out", "dq", "dk", "dv"})
            assert 0 < max(row["errors"].values()) < 2e-2


@pytest.mark.slow
def test_jaxlm_computes_every_case_of_the_dry_run(dry):
    """With its portable implementations; what needs a GPU says so."""
    for row in dry[1]["rows"]:
        if row["contender"] in ("jaxlm reference", "jaxlm xla"):
            assert row["status"] == "ok", row
        if row["contender"] in ("jaxlm cudnn", "jax cudnn") and "softcap" not in row["case"]:
            assert row["why"] == "needs an NVIDIA GPU, the platform is 'cpu'"


@pytest.mark.slow
def test_the_table_names_all_rows(dry):
    _, report, text = dry
    lines = text.splitlines()
    assert lines[0].startswith("`python scripts/gpu_check.py --small") and "jax " in lines[0]
    assert len(lines) == 4 + len(report["rows"])
    assert all(line.count("|") == 8 for line in lines[2:])


def test_the_check_bites(scripts, monkeypatch, capsys, tmp_path):
    """A contender that leaves out one key of one query is wrong; one that raises has failed; both are told."""
    gpu_check, contenders = scripts
    import jax.numpy as jnp

    from jaxlm.kernels.attention import attention
    from jaxlm.kernels.masks import CAUSAL, Mask

    class Hole(Mask):
        def __call__(self, q, k):
            return CAUSAL(q, k) & ~((q == 40) & (k == 39))

    def breaks(data):
        raise RuntimeError("no such kernel\nand a long story")

    def grows(data):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    f = lambda q, k, v, _: attention(q, k, v, Hole(), impl="reference")
    everyone = {"jaxlm hole": lambda data: contenders.in_jax(f, data, None), "torch broken": breaks}
    monkeypatch.setattr(gpu_check, "contenders", lambda small: everyone)
    path = tmp_path / "report.json"
    assert gpu_check.main(["--small", "--cases", "gqa*", "--json", str(path)]) == 1
    hole, broken = json.loads(path.read_text())["rows"]
    assert hole["status"] == "wrong" and "out is off by" in hole["why"] and hole["errors"]["out"] > 2e-2
    assert (broken["status"], broken["why"]) == ("failed", "RuntimeError: no such kernel")
    printed = capsys.readouterr().out
    assert "jaxlm hole wrong: out is off by" in printed and "torch broken failed: RuntimeError" in printed
    for name, run, status in (
        ("jaxlm broken", breaks, 1), ("jaxlm xla", grows, 1), ("jaxlm reference", grows, 0), ("torch flex", grows, 0)
    ):  # fmt: skip
        monkeypatch.setattr(gpu_check, "contenders", lambda small, one={name: run}: one)
        assert gpu_check.main(["--small", "--cases", "gqa*"]) == status
    assert "torch flex too large: RuntimeError: RESOURCE_EXHAUSTED" in capsys.readouterr().out

    data = contenders.make(contenders.cases(True)[0], jnp.dtype("float32"))
    out = gpu_check.exact(data)["out"]
    assert gpu_check.anchor(data, out) < gpu_check.ANCHOR < gpu_check.anchor(data, out * 1.001)


def test_an_error_is_that_of_the_worst_row(scripts):
    gpu_check, contenders = scripts
    data = contenders.make(contenders.cases(True)[0], np.dtype("float32"))
    want = gpu_check.exact(data)
    sizes = gpu_check.row_sizes(data, want)
    for name, x in want.items():
        got = x.copy()
        assert gpu_check.row_error(got, x, sizes[name]) == 0
        got[1, 7, 2] *= 1.5
        assert 0.25 < gpu_check.row_error(got, x, sizes[name]) < 0.51
        got[0, 0, 0, 0] = np.nan
        assert gpu_check.row_error(got, x, sizes[name]) == math.inf


def test_work_is_counted_by_the_convention(scripts):
    _, contenders = scripts
    by_name = {case.name: case for case in contenders.cases(True)}
    pairs = lambda name: contenders.make(by_name[name], np.dtype("float32")).pairs
    full, causal, wide = by_name["hd128-full-4k"], by_name["gqa-4k"], by_name["window-16k"]
    assert pairs("hd128-full-4k") == full.batch * full.heads * full.t**2
    assert pairs("gqa-4k") == causal.batch * causal.heads * causal.t**2 // 2
    assert pairs("window-16k") == wide.batch * wide.heads * (16 * wide.t - 16 * 15 // 2)


def test_the_command_helps(scripts, capsys):
    gpu_check, _ = scripts
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--help"])
    told = capsys.readouterr().out
    assert stop.value.code == 0 and "--small" in told and "FlexAttention" in told
    assert gpu_check.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "hd256-causal-16k" in listed and "torch sdpa" in listed
    assert gpu_check.main(["--cases", "no-such-case"]) == 2
    assert gpu_check.main([]) == 2
    assert "No GPU: jax runs on cpu. --small" in capsys.readouterr().out
