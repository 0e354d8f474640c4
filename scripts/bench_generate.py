#!/usr/bin/env python3
"""Generation beside transformers + torch on the same CPU threads: prefill and decode tokens per second, batch 1 and 8.

Both sides run the same checkpoint in float32, greedy, with a 64-token prompt and 64 new tokens, and compute the same
logits (those of the last prompt position). Runs alternate; figures are medians. The share of the memory's limit is the
bytes of weights a step reads times steps per second, over a measured large read. Needs the test extra and accelerate
for a .gguf file.
"""

import argparse
import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxlm


def seconds(run) -> float:
    time.sleep(0.2)  # torch's worker threads spin for a while after their last work, beside whoever comes next
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bandwidth() -> float:
    """GB/s of a large float32 read: the better of a sum and a matrix-vector product over 1 GiB."""
    w = jnp.ones((16384, 16384), jnp.float32)
    x = jnp.ones((1, 16384), jnp.float32)
    reads = [jax.jit(jnp.sum), jax.jit(lambda w: x @ w)]
    best = min(min(seconds(lambda f=f: f(w).block_until_ready()) for _ in range(7)) for f in reads)
    return w.nbytes / best / 1e9


def ours(model, tokens, new: int):
    return lambda: model.generate(tokens, max_new_tokens=new, temperature=0, repetition_penalty=1, eos=())


def theirs(reference, tokens, new: int):
    import torch

    ids = torch.asarray(np.asarray(tokens, np.int64))
    options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    return lambda: reference.generate(ids, attention_mask=torch.ones_like(ids), **options)


def measure(model, reference, batch: int, prompt: int, new: int, repeats: int) -> dict:
    """Medians of alternating runs; decode is the time of all new tokens less that of one."""
    tokens = np.random.default_rng(0).integers(10, model.config.vocab_size - 10, (batch, prompt))
    runs = {
        (side, n): make(subject, tokens, n)
        for side, make, subject in (("jaxlm", ours, model), ("torch", theirs, reference))
        for n in (1, new)
    }
    for run in runs.values():
        run()  # compiles and warms up
    times: dict = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            times[key].append(seconds(run))
    row = {"batch": batch}
    for side in ("jaxlm", "torch"):
        one, all_ = (statistics.median(times[side, n]) for n in (1, new))
        row |= {f"{side}_prefill": batch * prompt / one, f"{side}_decode": batch * (new - 1) / (all_ - one)}
    return row


def load_reference(source: str, model):
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        model.save(f"{directory}/model", dtype="float32")
        made = transformers.AutoModelForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.float32)
        return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkpoint directory or .gguf file")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    import torch

    model = jaxlm.load(args.source)
    reference = load_reference(args.source, model)
    n_params = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    limit = bandwidth()
    rows = [measure(model, reference, b, args.prompt, args.new, args.repeats) for b in args.batches]
    title = f"{args.prompt} prompt + {args.new} new tokens, {jax.default_backend()}, {torch.get_num_threads()} threads"
    table = Table("batch", "", "jaxlm tokens/s", "torch tokens/s", "ratio", "of the memory limit", title=title)
    for row in rows:
        row["share"] = row["jaxlm_decode"] / row["batch"] * n_params * 4 / 1e9 / limit
        for phase in ("prefill", "decode"):
            a, b = row[f"jaxlm_{phase}"], row[f"torch_{phase}"]
            row[f"{phase}_ratio"] = a / b
            share = f"{row['share']:.0%}" if phase == "decode" else ""
            table.add_row(str(row["batch"]), phase, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}", share)
    console = Console()
    console.print(table)
    size, work = n_params * 4 / 1e9, 2 * n_params / 1e9
    console.print(f"a token reads {size:.3f} GB and takes {work:.3f} GFLOP; a large read: {limit:.1f} GB/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"rows": rows, "parameters": n_params, "bandwidth_gb_s": limit}, file, indent=2)


if __name__ == "__main__":
    main()
