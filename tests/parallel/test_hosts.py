"""Real processes on one machine, joined as hosts are: loading, training, checkpoints, and the death of one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import jaxlm
from jaxlm.checkpoints.load import flatten
from jaxlm.parallel import hosts
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.config import plain
from jaxlm.train.loop import Run
from jaxlm.train.setup import setup
from tests.train.test_loop import CONFIG, config, ground, rows, wait_for

__all__ = ["ground"]
SECONDS = 240  # in which processes must end
# One of several processes: loads and saves a model, then goes on with a run up to a step.
PROGRAM = """
import json, sys
from pathlib import Path
from jaxlm.parallel import hosts
out, port, processes, me, until = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
hosts.initialize(f"localhost:{port}", processes, me, heartbeat_seconds=10)
import jaxlm, numpy as np
from jaxlm.checkpoints.safetensors import SafetensorsSource
from jaxlm.train.config import read
from jaxlm.train.loop import Callback, Run
from jaxlm.train.setup import setup

class Stop(Callback):
    def on_log(self, run, step, values):
        if step == until:
            run.stop("asked to")

fill, count = SafetensorsSource._fill, 0
def counting(self, view, begin, name):
    global count
    count += view.nbytes
    fill(self, view, begin, name)
SafetensorsSource._fill = counting
with hosts.failing_together("start again"):
    if (out / "source").is_dir():
        model = jaxlm.load(out / "source", mesh="fsdp=8")
        tokens = np.arange(12).reshape(2, 6)
        logits = np.asarray(model(tokens)).tolist()
        new = model.generate(tokens, max_new_tokens=4, temperature=0).tolist()
        model.save(out / "saved")
        made = {"bytes": count, "logits": logits, "new": new, "saved": (out / "saved/model.safetensors").is_file()}
        (out / f"report-{me}.json").write_text(json.dumps(made))
    Run(setup(read(out / "run.yaml")), [Stop()]).train()
"""


def begin(out: Path, processes: int, until: int = -1) -> list[subprocess.Popen]:
    """Processes with eight devices among them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={8 // processes}")
    command = [sys.executable, "-c", PROGRAM, str(out), str(port), str(processes)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen([*command, str(i), str(until)], env=os.environ | {"XLA_FLAGS": flags}, **streams)
        for i in range(processes)
    ]


def finish(begun: list[subprocess.Popen]) -> None:
    try:
        for process in begun:
            said = process.communicate(timeout=SECONDS)[0]
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in begun:
            process.kill()


def settings(ground: Path, out: Path, **more):
    train, evaluated = (str(ground / f"{name}.jsonl") for name in ("train", "eval"))
    data = {"train": train, "eval": evaluated, "seq_len": 32, "batch_size": 8}
    given = {"data": data, "mesh": "fsdp=8", "steps": 4, "eval_every": 0, "log_every": 1, "accumulate": 1}
    return config(ground, out, **given | more)


def losses(out: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in rows(out) if name in row]


@pytest.fixture(scope="module")
def alone(ground, tmp_path_factory) -> Path:
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("alone")
    Run(setup(settings(ground, out))).train()
    return out


def assert_same_curve(out: Path, alone: Path) -> None:
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-5)
    np.testing.assert_allclose(losses(out, "eval_loss")[-1], losses(alone, "eval_loss")[-1], rtol=1e-5)


@pytest.fixture(scope="module")
def interrupted(ground, tmp_path_factory) -> Path:
    """What two processes leave after two of the run's four steps."""
    out = tmp_path_factory.mktemp("interrupted")
    jaxlm.init(CONFIG, key=jax.random.key(1)).save(out / "source")
    (out / "run.yaml").write_text(yaml.safe_dump(plain(settings(ground, out / "run"))))
    finish(begin(out, 2, until=2))
    return out


@pytest.mark.slow
def test_two_processes_load_compute_and_save_as_one(interrupted):
    model = jaxlm.load(interrupted / "source")
    reports = [json.loads((interrupted / f"report-{i}.json").read_text()) for i in range(2)]
    sizes = {path: leaf.nbytes for path, leaf in flatten(model.params).items()}
    norms = sum(size for path, size in sizes.items() if "norm" in path)  # which every device has whole
    tokens = np.arange(12).reshape(2, 6)
    for report in reports:
        assert report["bytes"] == norms + (sum(sizes.values()) - norms) / 2 and report["saved"]
        np.testing.assert_allclose(report["logits"], model(tokens), atol=2e-6)
        assert report["new"] == model.generate(tokens, max_new_tokens=4, temperature=0).tolist()
    one, two = (interrupted / name / "model.safetensors" for name in ("source", "saved"))
    assert one.read_bytes() == two.read_bytes()


def resumed(ground, interrupted, tmp_path):
    shutil.copytree(interrupted / "run", tmp_path / "run")
    return settings(ground, tmp_path / "run")


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(ground, interrupted, alone, tmp_path):
    chosen = resumed(ground, interrupted, tmp_path)
    assert len(losses(tmp_path / "run")) == 2  # written once, not by both
    assert Run(setup(chosen)).train().step == 4
    assert_same_curve(tmp_path / "run", alone)


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(ground, interrupted, alone, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(resumed(ground, interrupted, tmp_path))))
    finish(begin(tmp_path, 4))
    assert_same_curve(tmp_path / "run", alone)
    assert (tmp_path / "run/model/model.safetensors").is_file()


@pytest.mark.slow
def test_the_others_stop_when_one_is_killed(ground, tmp_path):
    chosen = settings(ground, tmp_path / "run", steps=100_000, save_every=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(chosen)))
    left, killed = begun = begin(tmp_path, 2)
    try:
        wait_for(lambda: (tmp_path / "run/checkpoints/2").is_dir(), SECONDS)
        killed.kill()
        since = time.monotonic()
        said = left.communicate(timeout=60)[0]
        assert left.returncode != 0 and "process 0 of 2 has lost another one, and stops; start again" in said, said[
            -3000:
        ]
        assert time.monotonic() - since < 30
    finally:
        for process in begun:
            process.kill()
    job = setup(settings(ground, tmp_path / "again", steps=100_000))
    saved = Checkpoints(tmp_path / "run/checkpoints")
    state, about = saved.restore(job.state)
    assert int(state.step) == saved.latest and about["steps"] == 100_000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "they go together, all three or none"),
        ({"coordinator": "localhost:1", "processes": 2, "process_id": 2}, "expected 0 to 1, there are 2 processes"),
        ({"coordinator": "localhost", "processes": 2, "process_id": 0}, "expected HOST:PORT"),
    ],
)
def test_bad_flags(given, message):
    with pytest.raises(ValueError, match=message):
        hosts.initialize(**given)


def test_processes_that_jax_cannot_join_are_not_run_apart(monkeypatch):
    hosts.initialize()  # alone: nothing happens
    assert hosts.leads() and not jax.distributed.is_initialized()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="'OMPI_COMM_WORLD_SIZE': '4'} says that there are several processes"):
        hosts.initialize()


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2"}, [0, 1, 2]),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
    ],
)
def test_one_process_of_a_machine_has_all_its_gpus(environment, gpus, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts._all_gpus() == gpus
