#!/usr/bin/env python3
"""A full training step beside transformers + torch on the same CPU threads: tokens per second and peak memory.

Both sides train the same float32 checkpoint on the same tokens with AdamW, decay, clipping and the same losses. Each
runs in a process of its own, which this one lets take turns step by step, so that neither's threads or memory disturb
the other. Figures are medians; memory is the peak above what the process had after its imports. The share of the
product peak is the step's FLOPs (6 a parameter and token, attention left out) over a measured large product.
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
path, batch, length, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
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
import jax, jaxlm, jaxlm.api, jaxlm.checkpoints.safetensors, optax
from jaxlm.train.objectives import Objective, causal_lm
from jaxlm.train.optimizer import Optimizer
from jaxlm.train.schedules import Schedule
from jaxlm.train.step import init_state, make_train_step
idle = rss()
model = jaxlm.load(path)
settings = Optimizer(rate=LR, decay=DECAY, schedule=Schedule(name="constant", steps=10**6))
optimizer = settings.make()
loss = causal_lm(Objective(backbone=model.family.backbone, config=model.config, runtime=model.runtime))
state = init_state({"params": model.params}, optimizer, jax.random.key(0))
del model
step = make_train_step(loss, optimizer, settings)
def run(i):
    global state
    state, metrics = step(state, {"tokens": data[i].astype(np.int32), "targets": targets[i].astype(np.int32)})
    return float(metrics["loss"])
serve(run)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a directory of safetensors")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    steps = args.repeats + 2  # two to compile and warm up
    sides = [start(program, args.source, args.batch, args.length, steps) for program in (OURS, THEIRS)]
    runs = [[ask(side) for side in sides] for _ in range(steps)]
    for side in sides:
        side.wait()
    gflops = float(subprocess.run([sys.executable, "-c", PEAK], stdout=subprocess.PIPE, text=True, check=True).stdout)
    differ = max(abs(a["loss"] - b["loss"]) for a, b in runs)
    tokens = args.batch * args.length
    speed = [tokens / statistics.median(run["seconds"] for run in side[2:]) for side in zip(*runs, strict=True)]
    memory = [max(run["peak"] for run in side) / 1e9 for side in zip(*runs, strict=True)]
    table = Table("", "jaxlm", "torch", "ratio", title=f"full step, batch {args.batch} x {args.length}")
    table.add_row("tokens/s", *(f"{v:.1f}" for v in speed), f"{speed[0] / speed[1]:.2f}")
    table.add_row("peak memory GB", *(f"{v:.2f}" for v in memory), f"{memory[0] / memory[1]:.2f}")
    console = Console()
    console.print(table)
    console.print(f"losses differ by at most {differ:.1e}; a large product reaches {gflops:.0f} GFLOP/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"tokens_per_s": speed, "peak_gb": memory, "gflops": gflops, "loss_differs": differ}, file)


if __name__ == "__main__":
    main()
