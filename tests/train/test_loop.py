"""Whole runs: learning, evaluation, exact resumption, SIGTERM and SIGKILL, what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import jaxlm
from jaxlm.cli.main import main
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.config import TrainConfig, parse, plain, read
from jaxlm.train.loop import Callback, Run
from jaxlm.train.metrics import Jsonl
from jaxlm.train.setup import setup
from tests.data.tiny import tokenizer

CONFIG = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": True, "attention_dropout": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A config to begin from, a tokenizer, and two files of text."""
    at = tmp_path_factory.mktemp("ground")
    (at / "config.json").write_text(json.dumps(CONFIG))
    tokenizer().save_pretrained(at / "tokenizer")
    lines = [json.dumps({"text": f"{i} and {i + 1} are {2 * i + 1}. " * (1 + i % 5)}) for i in range(80)]
    (at / "train.jsonl").write_text("\n".join(lines[:70]))
    (at / "eval.jsonl").write_text("\n".join(lines[70:]))
    return at


def config(ground: Path, out: Path, **settings) -> TrainConfig:
    given = {
        "model": str(ground / "config.json"), "tokenizer": str(ground / "tokenizer"), "out": str(out), "steps": 12,
        "data": {"train": str(ground / "train.jsonl"), "eval": str(ground / "eval.jsonl"), "seq_len": 32,
                 "batch_size": 4},
        "optim": {"rate": 1e-2, "warmup": 0.2, "schedule": "cosine"}, "log_every": 4, "eval_every": 6, "accumulate": 2,
    }  # fmt: skip
    return parse(TrainConfig, given | settings, "test")


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(directory: Path) -> dict:
    return jax.tree.map(np.asarray, jaxlm.load(directory).params)


def test_running_out_of_memory_points_to_the_plan(ground, tmp_path):
    run = Run(setup(config(ground, tmp_path / "run", precision="bfloat16")))

    def fake(state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 18G of 15G hbm. Exceeded hbm ...")

    run.step_function = fake
    with pytest.raises(MemoryError, match=r"Used 18G of 15G.*parameters .* GB.*jaxlm plan .*--batch 4 --seq 32 "):
        run.train()
    assert [sink._file.closed for sink in run._sinks if isinstance(sink, Jsonl)] == [True]
    run.step_function = lambda state, batch: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        run.train()


def test_a_run_learns_and_leaves_a_model(ground, tmp_path):
    result = Run(setup(config(ground, tmp_path / "run"))).train()
    logged = [row for row in rows(tmp_path / "run") if "loss" in row]
    evaluated = [row for row in rows(tmp_path / "run") if "eval_loss" in row]
    assert result.ended == "done" and [row["step"] for row in logged] == [4, 8, 12]
    assert logged[-1]["loss"] < 0.75 * logged[0]["loss"]
    assert [row["step"] for row in evaluated] == [6, 12] and evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert result.best_step == 12 and (tmp_path / "run/loss.png").stat().st_size > 5000
    model = jaxlm.load(result.model)
    assert model.generate("1 and 2", max_new_tokens=4, temperature=0) and len(os.listdir(tmp_path / "run/tensorboard"))
    # The exported model has the loss that the run reported.
    job = setup(config(ground, tmp_path / "again", model=str(result.model)))
    run = Run(job)
    run._sinks = []
    run._evaluate(job.state, 0)
    np.testing.assert_allclose(run.memory.eval_loss, evaluated[1]["eval_loss"], rtol=1e-6)


class StopAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_log(self, run, step, values):
        if step >= self.step:
            run.stop("a callback")


def test_resumed_equals_uninterrupted_bit_for_bit(ground, tmp_path):
    """Mid-epoch, with accumulation and dropout; the last steps are made by another Run."""
    whole = Run(setup(config(ground, tmp_path / "whole"))).train()
    stopped = Run(setup(config(ground, tmp_path / "parts")), [StopAt(4)]).train()
    assert stopped.ended == "a callback" and stopped.step == 4
    resumed = Run(setup(config(ground, tmp_path / "parts"))).train()
    assert resumed.step == 12
    for a, b in zip(*(jax.tree.leaves(weights(r.model)) for r in (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("loss", "learning_rate", "targets"):
        assert [r[name] for r in rows(tmp_path / "whole") if name in r][-1] == [
            r[name] for r in rows(tmp_path / "parts") if name in r
        ][-1]


@pytest.mark.slow
def test_sigterm_in_the_last_evaluation_loses_nothing(ground, tmp_path):
    """Between two logs, with a trace running; the next run makes the evaluation and ends as if nothing had been."""
    more = {"steps": 6, "eval_every": 0, "profile": [2, 3]}
    whole = Run(setup(config(ground, tmp_path / "whole", **more))).train()
    run = Run(setup(config(ground, tmp_path / "parts", **more)), [StopAt(4)])
    run.job.config.__dict__["log_every"] = 2  # ends at step 4, in a window of the other run's
    assert run.train().step == 4
    (tmp_path / "parts/metrics.jsonl").open("a").write('{"step": 9, "loss"')  # a kill while a line was written
    run = Run(setup(config(ground, tmp_path / "parts", **more)))
    evaluate, calls = run.eval_function, []

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        calls.append(signal.getsignal(signal.SIGTERM))
        return evaluate(*args)

    run.eval_function = interrupted
    result = run.train()
    assert (result.ended, result.step, result.model, len(calls)) == ("SIGTERM", 6, None, 1)
    assert run.checkpoints.steps[-1] == 6
    last = Run(setup(config(ground, tmp_path / "parts", **more))).train()
    assert (last.ended, last.best_step, last.eval_loss) == ("done", 6, whole.eval_loss)
    for a, b in zip(*(jax.tree.leaves(weights(r.model)) for r in (whole, last)), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("targets", "eval_loss"):
        assert [r[name] for r in rows(tmp_path / "parts") if name in r][-1] == [
            r[name] for r in rows(tmp_path / "whole") if name in r
        ][-1]
    steps = [(r["step"], "loss" in r) for r in rows(tmp_path / "parts")]
    assert len(steps) == len(set(steps)) and (tmp_path / "parts/profile").is_dir()


def test_other_data_under_the_same_name_is_refused(ground, tmp_path):
    lines = (ground / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "train.jsonl"), "seq_len": 32, "batch_size": 4}
    chosen = config(ground, tmp_path / "run", data=data, steps=3, eval_every=0)
    run = Run(setup(chosen))
    run._why = "a callback"
    run.train()
    shutil.rmtree(tmp_path / "run/data-train")
    (tmp_path / "train.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(ValueError, match=r"holds a run over other data, .*: data.data="):
        Run(setup(chosen)).train()


def test_a_resumed_run_holds_its_state_once(ground, tmp_path):
    Run(setup(config(ground, tmp_path, steps=2, eval_every=0, log_every=2)), [StopAt(1)]).train()
    run = Run(setup(config(ground, tmp_path, steps=2, eval_every=0, log_every=2)))
    before = sum(a.nbytes for a in jax.live_arrays())
    state, step = run._begin()
    del state
    assert step == 2 and sum(a.nbytes for a in jax.live_arrays()) < before


def test_patience_ends_a_run_for_good(ground, tmp_path):
    chosen = config(ground, tmp_path, patience=2, eval_every=1, min_delta=100.0, export="best")
    result = Run(setup(chosen)).train()
    assert (result.ended, result.step, result.best_step) == ("patience", 3, 1)
    # The model is that of the best checkpoint, not of the last.
    run = Run(setup(chosen))
    best, _ = run.checkpoints.restore(run.job.state, 1)
    for a, b in zip(jax.tree.leaves(weights(result.model)), jax.tree.leaves(best.trainable["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    again = run.train()
    assert (again.ended, again.step) == ("patience", 3)


@pytest.mark.slow
def test_the_rate_falls_on_a_plateau(ground, tmp_path):
    optim = {"rate": 1e-2, "schedule": "reduce_on_plateau", "plateau_patience": 0, "plateau_factor": 0.5}
    chosen = config(ground, tmp_path, optim=optim, eval_every=1, log_every=1, steps=4, min_delta=100.0)
    Run(setup(chosen)).train()
    rates = [row["learning_rate"] for row in rows(tmp_path) if "learning_rate" in row]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 0.5e-2, 0.25e-2], rtol=1e-6)


def test_rotation_keeps_the_newest_and_the_best(ground, tmp_path):
    job = setup(config(ground, tmp_path / "run"))
    import dataclasses

    kept = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.2)):
        kept.save(dataclasses.replace(job.state, step=jax.numpy.int32(step)), {"step": step}, loss)
        kept.wait()
    assert kept.steps == [2, 4, 5] and kept.best == 2 and kept.latest == 5
    _, about = kept.restore(job.state, 2)
    assert about == {"step": 2}


PROGRAM = """
import sys
from jaxlm.train.config import read
from jaxlm.train.loop import Run
from jaxlm.train.setup import setup
print(Run(setup(read(sys.argv[1]))).train().ended, flush=True)
"""


def begin(settings: TrainConfig, file: Path, program: str = PROGRAM) -> subprocess.Popen:
    file.write_text(yaml.safe_dump(plain(settings)))
    return subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True)


def wait_for(what, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_saves_and_exits(ground, tmp_path):
    long = config(ground, tmp_path / "run", steps=100_000, eval_every=0, log_every=1)
    process = begin(long, tmp_path / "run.yaml")
    log = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") > 2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0].strip() == "SIGTERM"
    saved = Checkpoints(tmp_path / "run/checkpoints")
    assert saved.latest == rows(tmp_path / "run")[-1]["step"]


KILLS = """
import dataclasses, os, random, signal, sys, time, jax, jax.numpy as jnp
from pathlib import Path
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import init_state

def save_on(out):
    made = Optimizer(schedule=Schedule(name="constant", steps=1)).make()
    state = init_state({"params": {"w": jnp.zeros((64, 1024))}}, made, jax.random.key(0))
    saved = Checkpoints(Path(sys.argv[1]))
    step = saved.latest or 0
    if step:
        state, _ = saved.restore(state)
        assert (state.trainable["params"]["w"] == step).all(), "not what was saved"
    while True:
        step += 1
        w = jnp.full((64, 1024), float(step))
        saved.save(dataclasses.replace(state, step=jnp.int32(step), trainable={"params": {"w": w}}), {"step": step})
        saved.wait()
        out.write(f"{step}\\n".encode())

last, draw = 0, random.Random(0)
for _ in range(20):  # jax has begun nothing yet, so that a fork is as good as a new process, and much sooner there
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        try:
            save_on(os.fdopen(theirs, "wb", 0))
        finally:
            os._exit(1)
    os.close(theirs)
    lines = os.fdopen(ours, "rb", 0)
    first = lines.readline()
    assert first, f"the checkpoint of step {last} or later could not be restored"
    assert int(first) > last
    time.sleep(draw.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    last = max([int(first), *map(int, lines.read().split())])
    os.waitpid(child, 0)
assert last > 20
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_checkpoint(tmp_path):
    """SIGKILL at 20 random points: whatever was reported as saved restores, whole, in the next process."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimm": {}}, "unknown setting 'optimm', did you mean 'optim'"),
        ({"optim": {"rat": 1}}, "optim: unknown setting 'rat', did you mean 'rate'"),
        ({"steps": "many"}, "steps='many': expected int, found str"),
        ({"optim": {"rate": "1e-3x"}}, "optim: rate='1e-3x': expected float"),
        ({"precision": "bf16"}, "precision='bf16': expected one of float32"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"steps": 0, "epochs": 0}, "expected one of them above 0"),
        ({"patience": 1, "eval_every": 0}, "patience needs data.eval and eval_every"),
        ({"data": {"seq_len": 8}}, "data: train must be given"),
        ({"trainable": {"a": 1}}, "expected a list"),
        ({"keep": 0}, "keep=0: expected at least 1"),
        ({"profile": [0, 2]}, "expected the first and the last step, from 1"),
        ({"export": "newest"}, "export='newest': expected last, or with data.eval best"),
        ({"adapter": {"kind": "lora"}, "optim": {"name": "muon"}}, "muon is for the matrices of layers"),
        ({"optim": {"plateau_factor": 0.5}}, "optim.plateau_factor is for schedule reduce_on_plateau, not linear"),
        ({"data": {"train": "x"}}, "eval_every=6 needs data.eval"),
    ],
)
def test_bad_settings(ground, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config(ground, tmp_path, **change)


def test_settings_come_back_from_yaml(ground, tmp_path):
    made = config(ground, tmp_path, profile=[2, 3], optim={"rates": {"params/embed": 0.5}})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(made)))
    assert read(tmp_path / "run.yaml") == made
    changed = read(tmp_path / "run.yaml", ["optim.rate=3e-4", "data.seq_len=16"])
    assert changed.optim.rate == 3e-4 and changed.data.seq_len == 16
    with pytest.raises(ValueError, match="'steps': expected NAME=VALUE"):
        read(tmp_path / "run.yaml", ["steps"])


def test_another_run_in_the_directory_is_refused(ground, tmp_path):
    Run(setup(config(ground, tmp_path, steps=1, eval_every=0)))
    with pytest.raises(ValueError, match="holds a run with other settings, which would not go on: seed: 0 -> 1"):
        Run(setup(config(ground, tmp_path, steps=1, eval_every=0, seed=1)))
    with pytest.raises(ValueError, match="holds a run already"):
        Run(setup(config(ground, tmp_path, steps=1, eval_every=0, resume=False)))


def test_the_command(ground, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(plain(config(ground, tmp_path / "run", steps=2))))
    assert main(["train", str(tmp_path / "run.yaml"), "log_every=1", "--dry-run"]) == 0
    assert "8 rows (2 x 4), 256 tokens" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "run.yaml"), "log_every=1"]) == 0
    assert "done" in capsys.readouterr().out and (tmp_path / "run/model/model.safetensors").is_file()
    assert main(["train", str(tmp_path / "run.yaml"), "optim.rat=1"]) == 2
    assert "did you mean 'rate'" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter", [{"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}, {"kind": "prompt", "tokens": 3}]
)
def test_an_adapter_learns_alone(ground, tmp_path, adapter):
    base = Run(setup(config(ground, tmp_path / "base", steps=2, eval_every=0))).train().model
    before = weights(base)
    chosen = config(ground, tmp_path / "run", model=str(base), adapter=adapter, optim={"rate": 5e-2})
    job = setup(chosen)
    assert 0 < job.trainable < 2000
    result = Run(job).train()
    evaluated = [row["eval_loss"] for row in rows(tmp_path / "run") if "eval_loss" in row]
    assert evaluated[-1] < evaluated[0]
    model = jaxlm.load(base)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(weights(base)), strict=True):
        np.testing.assert_array_equal(a, b)
    adapted = model.with_adapters(tmp_path / "run/adapter")
    tokens = np.arange(10)[None]
    assert np.abs(adapted(tokens) - model(tokens)).max() > 1e-3
    if adapter["kind"] == "lora":
        np.testing.assert_allclose(jaxlm.load(result.model)(tokens), adapted(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"kind": "lorra"}, "kind='lorra', expected one of lora, prefix, prompt"),
        ({"kind": "lora", "rnk": 4}, "adapter: unknown setting 'rnk', did you mean 'rank'"),
        ({"kind": "lora", "targets": ["q_prj"]}, "q_prj"),
    ],
)
def test_bad_adapters(ground, tmp_path, adapter, message):
    with pytest.raises(ValueError, match=message):
        setup(config(ground, tmp_path, adapter=adapter))


@pytest.mark.slow
def test_resumed_on_another_mesh_and_converted(ground, tmp_path):
    """The state comes back bit for bit on other devices, the losses go on, and a checkpoint is a model to read."""
    some = {"eval_every": 0, "log_every": 1, "steps": 4, "accumulate": 1}
    data = {"train": str(ground / "train.jsonl"), "seq_len": 32, "batch_size": 8}
    chosen = lambda out, mesh: config(ground, tmp_path / out, data=data, mesh=mesh, **some)
    Run(setup(chosen("whole", "fsdp=8"))).train()
    stopped = Run(setup(chosen("parts", "fsdp=8")), [StopAt(2)]).train()
    assert stopped.step == 2
    saved = Checkpoints(tmp_path / "parts/checkpoints")
    states = [saved.restore(setup(chosen(f"none-{mesh}", mesh)).state)[0] for mesh in ("fsdp=8", "data=4,fsdp=2", None)]
    for other in states[1:]:
        for a, b in zip(jax.tree.leaves(states[0]), jax.tree.leaves(other), strict=True):
            a, b = (jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
            np.testing.assert_array_equal(a, b)
    resumed = Run(setup(chosen("parts", "data=4,fsdp=2"))).train()
    curves = [[row["loss"] for row in rows(tmp_path / out)] for out in ("whole", "parts")]
    np.testing.assert_allclose(*curves, rtol=1e-6)

    assert main(["convert", str(tmp_path / "parts"), str(tmp_path / "converted")]) == 0
    assert main(["convert", str(tmp_path / "parts/checkpoints/2"), str(tmp_path / "earlier")]) == 0
    for a, b in zip(*(jax.tree.leaves(weights(d)) for d in (tmp_path / "converted", resumed.model)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(weights(tmp_path / "earlier")), jax.tree.leaves(states[0].trainable), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "converted/tokenizer.json").is_file()
    assert json.loads((tmp_path / "converted/config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_a_run_that_trained_a_part_is_converted_with_the_rest(ground, tmp_path, capsys):
    jaxlm.init(CONFIG, key=jax.random.key(1)).save(tmp_path / "base")
    some = {"model": str(tmp_path / "base"), "steps": 1, "eval_every": 0, "accumulate": 1, "log_every": 1}
    result = Run(setup(config(ground, tmp_path / "run", trainable=["params/layers/mlp"], **some))).train()
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "converted")]) == 0
    for a, b in zip(*(jax.tree.leaves(weights(d)) for d in (tmp_path / "converted", result.model)), strict=True):
        np.testing.assert_array_equal(a, b)
    Run(setup(config(ground, tmp_path / "lora", adapter={"kind": "lora", "rank": 2}, **some))).train()
    assert main(["convert", str(tmp_path / "lora"), str(tmp_path / "no")]) == 2
    assert "trained an adapter" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    shutil.copyfile(tmp_path / "run/config.yaml", tmp_path / "empty/config.yaml")
    assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "no")]) == 2
    assert "without a complete checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_changes_where_its_state_lies(ground, tmp_path):
    """Begun with everything in host memory at ZeRO stage 2, gone on with at stage 0, beside a run on one device."""
    data = {"train": str(ground / "train.jsonl"), "eval": str(ground / "eval.jsonl"), "seq_len": 32, "batch_size": 8}
    alone = Run(setup(config(ground, tmp_path / "alone", data=data))).train()
    spread = {"data": data, "mesh": "data=8"}
    first = config(ground, tmp_path / "spread", **spread, zero=2, offload=["optimizer", "params"])
    job = setup(first)
    on_each = dict(job.plan())["on each"]
    assert on_each == "parameters 0.11 MB in host memory, gradients 0.01 MB, optimizer 0.03 MB in host memory (zero 2)"
    assert Run(job, [StopAt(4)]).train().step == 4
    result = Run(setup(config(ground, tmp_path / "spread", **spread))).train()
    assert result.step == 12
    np.testing.assert_allclose([result.loss, result.eval_loss], [alone.loss, alone.eval_loss], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(weights(r.model)) for r in (alone, result)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
