"""`jaxlm plan`: what it prints, by formulas, and what it refuses."""

import pytest

from tests.cli.test_info import row


def test_an_estimate(cli, tiny):
    code, out, err = cli("plan", tiny / "config.json", "--topology", "h200:8", "--seq", "128", "--estimate")
    assert (code, err) == (0, "")
    assert row(out, "devices") == "8 x h200, mesh fsdp=8"
    assert row(out, "answer").startswith("fits") and "nothing was compiled" in row(out, "answer")
    assert "all-gather" in out and "reduce-scatter" in out and "offloaded" in out


def test_gpus_are_estimated_and_said_so(cli, tiny):
    code, out, err = cli("plan", tiny, "--topology", "h100:1", "--mesh", "data=1", "--serve", "--seq", "64")
    assert code == 0 and "only TPUs can be compiled for" in err
    assert "prefill" in out and "decode step" in out and "cache" in out


def test_what_does_not_fit_exits_with_1(cli, tiny):
    code, out, _ = cli("plan", tiny, "--topology", "a100:1", "--batch", "1000000", "--seq", "4096", "--estimate")
    assert code == 1 and "DOES NOT FIT" in out


@pytest.mark.slow
def test_auto_proposes_and_shows_progress(cli, tiny):
    args = ("plan", tiny, "--topology", "v5e:2x2", "--auto", "--estimate", "--seq", "64")
    code, out, err = cli(*args)
    assert code == 0 and out.startswith("--mesh ") and "--remat none" in out and "trying 1 of at most 6" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topology", "v5e:2x2", "--train", "--serve"), "--train and --serve: expected one of them"),
        (("--topology", "v9:2x2"), "unknown chip 'v9'"),
        (("--topology", "h100:8", "--mesh", "fsdp=4", "--estimate"), "is for 4 devices; there are 8"),
        (("--topology", "v5e:2x2", "--serve", "--auto"), "--auto chooses how to train"),
        (("--topology", "h100:8", "--batch", "6", "--estimate"), "6 rows do not divide over 8 devices"),
        (
            ("--topology", "v5e:2x2", "--pipe-repeats", "2"),
            "--pipe-repeats: of a pipeline that trains on TPUs, over pipe",
        ),
        (("--topology", "h100:8", "--mesh", "pipe=8", "--microbatches", "8"), "--microbatches, --pipe-repeats: of a"),
    ],
)
def test_refusals(cli, tiny, args, message):
    code, _, err = cli("plan", tiny, *args)
    assert code == 2 and message in err


def test_a_missing_config(cli, tmp_path):
    code, _, err = cli("plan", tmp_path / "config.json", "--topology", "v5e:2x2")
    assert code == 2 and "no such config.json" in err
