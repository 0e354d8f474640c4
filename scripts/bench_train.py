#!/usr/bin/env python3
"""A full training step beside transformers + torch on the same CPU threads: tokens per second and peak memory.

Both sides train the same float32 checkpoint on the same tokens with AdamW, decay, clipping and the same losses. Each
runs in a process of its own, which this one lets take turns step by step, so that neither's threads or memory disturb
the other. Figures are medians; memory is the peak above what the process had after its imports. The share of the
product peak is the step's FLOPs (6 a parameter and token, attention left out) over a measured large product.

Then packed rows against padded and bucketed ones, with four layers of the same shape and a long-tailed distribution of
lengths (log-normal, its median an eighth of a row): tokens that are learnt, per second.
"""

import argparse
import json
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

COMMON = """
import json, resource, sys, time
import numpy as np
path, batch, length, steps, layers, remat = sys.argv[1], *map(int, sys.argv[2:6]), sys.argv[6]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
rss = lambda: int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0]) * 1024
data = np.random.default_rng(0).integers(10, 40000, (steps, batch, length))
targets = np.concatenate([data[:, :, 1:], np.full((steps, batch, 1), -100)], -1)
LR, DECAY = 1e-4, 0.1
def serve(run):
    for i in range(steps):
        sys.stdin.readline()
        start = time.perf_counter()
        loss = run(i)
        spent = time.perf_counter() - start
        print(json.dumps({"seconds": spent, "loss": loss, "peak": peak() - idle}), flush=True)
"""
OURS = """
import dataclasses, jax, jaxlm, jaxlm.api, jaxlm.checkpoints.safetensors, optax
from pathlib import Path
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import init_state, make_train_step
idle = rss()
if layers:
    model = jaxlm.init(json.loads(Path(path, "config.json").read_text()) | {"num_hidden_layers": layers})
else:
    model = jaxlm.load(path)
settings = Optimizer(rate=LR, decay=DECAY, schedule=Schedule(name="constant", steps=10**6))
optimizer = settings.make()
runtime = dataclasses.replace(model.runtime, remat=remat)
loss = causal_lm(Objective(backbone=model.family.backbone, config=model.config, runtime=runtime))
parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
state = init_state({"params": model.params}, optimizer, jax.random.key(0))
del model
step = make_train_step(loss, optimizer, settings)
def run(batch):
    global state
    state, metrics = step(state, batch)
    return float(metrics["loss"])
"""
STEPS = """
print(json.dumps(parameters), flush=True)
serve(lambda i: run({"tokens": data[i].astype(np.int32), "targets": targets[i].astype(np.int32)}))
"""
ROWS = """
import tempfile
from jaxlm.data.cache import CacheWriter, open_cache
from jaxlm.data.formats import Example, FormatConfig
from jaxlm.data.pipeline import Batches
random = np.random.default_rng(1)
sizes = np.clip(np.exp(random.normal(np.log(length / 8), 1, 2000)), 2, length).astype(int)
folder = Path(tempfile.mkdtemp())
with CacheWriter(folder, 2**16) as writer:
    writer.add([Example(random.integers(10, 40000, n), np.ones(n, bool)) for n in sizes])
    about = {"source": "random", "fingerprint": "", "vocab_size": 2**16}
    writer.finish(tokenizer=about, format=FormatConfig(), sources=(), rows={}, data={})
cache = open_cache(folder)
modes = {"pack": {}, "pad": {}, "bucket": {"buckets": (length // 4, length // 2, length)}}
rows = {mode: Batches(cache, batch, length, mode=mode, **more) for mode, more in modes.items()}
lengths = {mode: {rows[mode][i]["tokens"].shape[1]: i for i in range(60)} for mode in modes}
[run(rows[mode][i]) for mode in modes for i in lengths[mode].values()]  # compiles
for repeat in range(steps - 2):
    for mode in modes:
        batches = [rows[mode][6 * repeat + i] for i in range(6)]
        start = time.perf_counter()
        [run(batch) for batch in batches]
        spent = time.perf_counter() - start
        learnt = sum(int((batch["targets"] != -100).sum()) for batch in batches)
        print(json.dumps({"mode": mode, "learnt_per_s": learnt / spent, "filled": rows[mode].efficiency}), flush=True)
"""
THEIRS = """
import torch, transformers
from transformers import AutoModelForCausalLM
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
idle = rss()
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
model.config.use_cache = False
model.train()
decayed = [p for p in model.parameters() if p.ndim > 1]
rest = [p for p in model.parameters() if p.ndim <= 1]
optimizer = torch.optim.AdamW([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], lr=LR, weight_decay=DECAY)
def run(i):
    tokens = torch.tensor(data[i])
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
serve(run)
"""
PEAK = """
import time, jax, jax.numpy as jnp
w = jnp.ones((2048, 2048)); f = jax.jit(lambda a: a @ a); f(w).block_until_ready()
best = 1e9
for _ in range(10):
    s = time.perf_counter(); f(w).block_until_ready(); best = min(best, time.perf_counter() - s)
print(2 * 2048**3 / best / 1e9)
"""


def start(program: str, *args) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMON + program, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(side: subprocess.Popen) -> dict:
    assert side.stdin and side.stdout
    side.stdin.write("\n")
    side.stdin.flush()
    return json.loads(side.stdout.readline())


def beside_torch(args: argparse.Namespace) -> dict:
    """Full steps of both sides, turn by turn."""
    given = (args.source, args.batch, args.length, steps := args.repeats + 2, 0, args.remat)  # two steps to warm up
    sides = [start(program, *given) for program in (OURS + STEPS, THEIRS)]
    assert sides[0].stdout
    parameters = json.loads(sides[0].stdout.readline())
    runs = [[ask(side) for side in sides] for _ in range(steps)]
    for side in sides:
        side.wait()
    gflops = float(subprocess.run([sys.executable, "-c", PEAK], stdout=subprocess.PIPE, text=True, check=True).stdout)
    tokens = args.batch * args.length
    speed = [tokens / statistics.median(run["seconds"] for run in side[2:]) for side in zip(*runs, strict=True)]
    return {
        "tokens_per_s": speed,
        "peak_gb": [max(run["peak"] for run in side) / 1e9 for side in zip(*runs, strict=True)],
        "loss_differs": max(abs(a["loss"] - b["loss"]) for a, b in runs),
        "product_gflops": gflops,
        "share_of_products": [6 * parameters * v / 1e9 / gflops for v in speed],
    }


def packing(args: argparse.Namespace) -> dict:
    """{mode: (tokens learnt per second, share of the rows that is filled)}."""
    side = start(OURS + ROWS, args.source, args.batch, args.length, args.repeats + 2, 4, args.remat)
    assert side.stdout
    found = [json.loads(line) for line in side.stdout]
    of = lambda mode: [row for row in found if row["mode"] == mode]
    speed = lambda mode: statistics.median(row["learnt_per_s"] for row in of(mode))
    return {mode: (speed(mode), of(mode)[0]["filled"]) for mode in ("pack", "pad", "bucket")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a directory of safetensors")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--remat", default="dots", help="what jaxlm keeps for the backward pass: none, dots, full")
    parser.add_argument("--only", choices=("steps", "packing"))
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    console, found = Console(), {}
    if args.only != "packing":
        step = found["step"] = beside_torch(args)
        table = Table("", "jaxlm", "torch", "ratio", title=f"full step, batch {args.batch} x {args.length}")
        for name, form in (("tokens_per_s", ".1f"), ("peak_gb", ".2f"), ("share_of_products", ".2f")):
            ours, theirs = step[name]
            table.add_row(name.replace("_", " "), f"{ours:{form}}", f"{theirs:{form}}", f"{ours / theirs:.2f}")
        console.print(table)
        console.print(
            f"losses differ by at most {step['loss_differs']:.1e}; a large product reaches "
            f"{step['product_gflops']:.0f} GFLOP/s"
        )
    if args.only != "steps":
        rows = found["packing"] = packing(args)
        table = Table("rows", "learnt/s", "filled", "of padded", title="tokens that are learnt")
        for mode, (speed, filled) in rows.items():
            table.add_row(mode, f"{speed:.1f}", f"{filled:.3f}", f"{speed / rows['pad'][0]:.2f}")
        console.print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
