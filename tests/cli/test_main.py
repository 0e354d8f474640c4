"""Help, versions and mistakes: what every command answers before any model is loaded."""

import pytest

import jaxlm
from jaxlm.cli import main as cli_main
from jaxlm.cli.console import count, size


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_names_every_command(cli, flag):
    code, out, err = cli(flag)
    assert code == 0 and err == ""
    assert all(f"  {name}" in out for name in cli_main.COMMANDS)


@pytest.mark.parametrize("command", cli_main.COMMANDS)
def test_command_help_has_an_example(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert f"usage: jaxlm {command}" in out and f"Example: jaxlm {command}" in out
    assert {"families": "usage", "train": "CONFIG"}.get(command, "SOURCE") in out
    assert "None" not in out  # a default of ours, not for people


def test_version(cli):
    assert cli("--version") == (0, f"jaxlm {jaxlm.__version__}\n", "")


def test_no_arguments_is_a_mistake(cli):
    code, out, err = cli()
    assert code == 2 and out == "" and "usage: jaxlm" in err


def test_unknown_command(cli):
    assert cli("inform") == (2, "", f"error: no command 'inform': expected one of {', '.join(cli_main.COMMANDS)}\n")


def test_missing_argument(cli):
    code, out, err = cli("info")
    assert code == 2 and out == "" and "SOURCE" in err


@pytest.mark.parametrize("command", [name for name in cli_main.COMMANDS if name != "families"])
def test_missing_checkpoint(cli, command, tmp_path):
    (tmp_path / "text").write_text("text")
    more = {
        "generate": ["hello"],
        "convert": [tmp_path / "out"],
        "prepare": [tmp_path / "out", "--tokenizer", tmp_path / "nowhere"],
        "eval": ["--text", tmp_path / "text"],
        "plan": ["--topology", "v5e:2x2"],
    }.get(command, [])
    code, out, err = cli(command, tmp_path / "nowhere", *more)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and str(tmp_path / "nowhere") in err.replace("\n", "") and err.count("\n") == 1


def test_debug_shows_the_traceback(cli, tmp_path):
    with pytest.raises((ValueError, OSError), match="nowhere"):
        cli("info", tmp_path / "nowhere", "--debug")


def test_our_own_mistakes_keep_their_traceback(cli, monkeypatch):
    def broken(*_):
        raise KeyError("ours")

    monkeypatch.setattr(cli_main, "run", broken)
    with pytest.raises(KeyError):
        cli("info", "x")


def test_interrupt(cli, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main, "run", interrupted)
    assert cli("info", "x") == (130, "", "\n")


def test_numbers():
    assert [count(n) for n in (0, 999, 1000, 134_515_008, 8_030_261_248)] == ["0", "999", "1 K", "134.5 M", "8.03 B"]
    assert [size(n) for n in (12, 98_362_432, 999_960)] == ["12 B", "98.36 MB", "1 MB"]
