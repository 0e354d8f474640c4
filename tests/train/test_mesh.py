"""Whole runs over a mesh: the settings reach the model, and what does not fit together is refused before they begin."""

import json

import numpy as np
import pytest

from jaxlm.train.loop import Run
from jaxlm.train.setup import setup
from tests.train.test_loop import CONFIG, config, ground, rows  # noqa: F401 (a fixture)


def losses(ground, out, **settings):  # noqa: F811
    (ground / "plain.json").write_text(json.dumps(CONFIG | {"attention_dropout": 0.0}))
    data = {"train": str(ground / "train.jsonl"), "eval": str(ground / "eval.jsonl"), "seq_len": 32, "batch_size": 4}
    given = {"model": str(ground / "plain.json"), "steps": 3, "log_every": 1, "eval_every": 3, "accumulate": 1}
    Run(setup(config(ground, out, **(given | {"data": data} | settings)))).train()
    return [row.get("loss", row.get("eval_loss")) for row in rows(out)]


@pytest.mark.slow
def test_a_run_over_pipe_sequence_and_fsdp(ground, tmp_path):  # noqa: F811
    alone = losses(ground, tmp_path / "alone")
    spread = losses(ground, tmp_path / "spread", mesh="pipe=2,sequence=2,fsdp=2", microbatches=2)
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
        ({"expert_capacity": -1.0}, "expert_capacity=-1.0: expected 0 or more"),
    ],
)
def test_refusals(settings, message, ground, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        setup(config(ground, tmp_path, **settings))
