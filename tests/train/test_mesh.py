"""Whole runs over a mesh: the settings reach the model, and what does not fit together is refused before they begin."""

import json

import numpy as np
import pytest

from jaxlm.parallel.pipeline import Pipeline
from jaxlm.train.loop import Run
from jaxlm.train.setup import setup
from tests.train.test_loop import CONFIG, config, ground, rows  # noqa: F401 (a fixture)


def losses(ground, out, **settings):  # noqa: F811
    plain = CONFIG | {"attention_dropout": 0.0, "num_hidden_layers": 4}
    (ground / "plain.json").write_text(json.dumps(plain))
    data = {"train": str(ground / "train.jsonl"), "eval": str(ground / "eval.jsonl"), "seq_len": 32, "batch_size": 4}
    given = {"model": str(ground / "plain.json"), "steps": 3, "log_every": 1, "eval_every": 3, "accumulate": 1}
    job = setup(config(ground, out, **(given | {"data": data} | settings)))
    pipelined = "pipe" in settings.get("mesh", "")
    assert job.model.runtime.layers == (Pipeline(2, repeats=2) if pipelined else None)
    Run(job).train()
    return [row.get("loss", row.get("eval_loss")) for row in rows(out)]


@pytest.mark.slow
def test_a_run_over_pipe_sequence_and_fsdp(ground, tmp_path):  # noqa: F811
    alone = losses(ground, tmp_path / "alone")
    spread = losses(ground, tmp_path / "spread", mesh="pipe=2,sequence=2,fsdp=2", microbatches=2, pipe_repeats=2)
    np.testing.assert_allclose(spread, alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mesh": "sequence=8", "eval_every": 0, "data": {"train": "train.jsonl", "seq_len": 36}},
            "36 tokens do not split over sequence=8",
        ),
        ({"mesh": "pipe=8"}, "2 layers do not split over pipe=8"),
        ({"mesh": "fsdp=8", "microbatches": 4}, "microbatches=4 are a pipeline's"),
        ({"mesh": "fsdp=8", "pipe_repeats": 2}, "pipe_repeats=2 are a pipeline's"),
        ({"mesh": "pipe=2,fsdp=4", "pipe_repeats": 2}, "2 layers do not split over pipe=2 with pipe_repeats=2"),
        ({"pipe_repeats": 0}, "pipe_repeats=0: expected at least 1"),
        ({"expert_capacity": -1.0}, "expert_capacity=-1.0: expected 0 or more"),
    ],
)
def test_refusals(settings, message, ground, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        setup(config(ground, tmp_path, **settings))
