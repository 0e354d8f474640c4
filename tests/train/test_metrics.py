"""Where a run's numbers go, and what a share of the device's peak means."""

import json
import sys
import types

import pytest

from jaxlm.train.metrics import REPORTS, flops_per_token, plot, sinks, utilization


def test_flops_are_those_of_palm():
    """Appendix B: a parameter that multiplies costs 6, attention 12 L H Q T a token; Llama-2-7B at 4096 tokens."""
    parameters, embedding = 6_738_415_616, 32000 * 4096
    assert flops_per_token(parameters, embedding, 32, 4096, 4096) == 6 * 6_607_343_616 + 12 * 32 * 4096 * 4096


def test_shares_of_the_peak():
    found = utilization(1000.0, 459e9, "none", "TPU v5p", 2)
    assert found == {"mfu": 0.5, "hfu": 0.5}
    assert utilization(1000.0, 459e9, "full", "TPU v5", 1)["hfu"] == pytest.approx(4 / 3)
    # The longest name counts: "TPU v5 lite" is no v5p.
    assert utilization(1000.0, 197e9, "none", "TPU v5 lite", 1)["mfu"] == 1
    assert utilization(1000.0, 1e9, "none", "cpu", 1) == {}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_get_name_settings_and_numbers(name, tmp_path, monkeypatch):
    """Against the calls that both packages share; neither is needed."""
    called = []
    module = types.ModuleType(name)
    for call in ("init", "log", "finish"):
        setattr(module, call, lambda *args, call=call, **kwargs: called.append((call, args, kwargs)))
    module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, name, module)
    (sink,) = sinks([name], tmp_path / "first", {"steps": 3})
    sink.write(7, {"loss": 1.5})
    sink.close()
    assert called == [
        ("init", (), {"project": "jaxlm", "name": "first", "config": {"steps": 3}}),
        ("log", ({"loss": 1.5},), {"step": 7}),
        ("finish", (), {}),
    ]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_said(name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"report '{name}' needs a package that is not installed: pip install {name}"):
        sinks([name], tmp_path, {})


def test_an_unknown_report_is_said(tmp_path):
    with pytest.raises(ValueError, match=rf"report 'csv': expected some of {', '.join(REPORTS)}"):
        sinks(["csv"], tmp_path, {})


def test_lines_are_there_at_once_and_the_plot_is_a_picture(tmp_path):
    (sink,) = sinks(["jsonl"], tmp_path, {})
    sink.write(1, {"loss": 2.0})
    sink.write(2, {"eval_loss": 1.0})
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (first["step"], first["loss"], second["eval_loss"]) == (1, 2.0, 1.0)
    plot(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
