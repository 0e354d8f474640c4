#!/usr/bin/env python3
"""RWKV-7 beside the `rwkv` package (torch, its own TorchScript) on the same CPU threads: prefill and decode tokens/s.

Both sides run the same random float32 weights of the 0.1B shape (12 layers of 768, 65,536 tokens), batch 1, greedily.
Runs alternate; figures are medians. Then memory: resident bytes and milliseconds a token of short and long texts, of
that model and of a tiny one; neither may grow with the length. Needs the test extra.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxlm

TINY = {
    "model_type": "rwkv7", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1000,
    "head_dim": 64, "head_size_divisor": 8, "decay_low_rank_dim": 16, "a_low_rank_dim": 16, "v_low_rank_dim": 16,
    "gate_low_rank_dim": 16, "rwkv_names": "blinkdl",
}  # fmt: skip
SMALL = TINY | {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 65536,
    "decay_low_rank_dim": 64, "a_low_rank_dim": 64, "v_low_rank_dim": 32, "gate_low_rank_dim": 128,
}  # fmt: skip


def seconds(run) -> float:
    time.sleep(0.2)  # torch's worker threads spin for a while after their last work, beside whoever comes next
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def resident() -> int:
    with open("/proc/self/status") as file:
        return int(file.read().split("VmRSS:")[1].split()[0]) * 1024


def ours(model, tokens: list[int], new: int):
    return model.generate(np.asarray([tokens]), max_new_tokens=new, temperature=0, repetition_penalty=1, eos=())[0]


def theirs(model, tokens: list[int], new: int) -> list[int]:
    logits, state = model.forward(tokens, None)
    made = [int(logits.argmax())]
    while len(made) < new:
        logits, state = model.forward([made[-1]], state)
        made.append(int(logits.argmax()))
    return made


def package(model):
    """The same weights in the `rwkv` package, which reads .pth files and is told by the environment how to run."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    import torch
    from rwkv.model import RWKV  # type: ignore[import-not-found]
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as directory:
        model.save(f"{directory}/model")
        torch.save(load_file(f"{directory}/model/model.safetensors"), f"{directory}/model.pth")
        return RWKV(f"{directory}/model", "cpu fp32")


def speeds(model, reference, prompt: int, new: int, repeats: int) -> dict[str, float]:
    """Tokens per second of both; decode is the time of all new tokens less that of one."""
    tokens = np.random.default_rng(0).integers(1, model.config.vocab_size, prompt).tolist()
    sides = {"jaxlm": (ours, model), "rwkv": (theirs, reference)}
    times = {(side, n): [] for side in sides for n in (1, new)}
    if (found := [list(run(subject, tokens, 8)) for run, subject in sides.values()])[0] != found[1]:
        raise SystemExit(f"the two sides do not continue alike: {found}")
    for i in range(repeats + 2):
        for side, n in times:
            run, subject = sides[side]
            spent = seconds(lambda run=run, subject=subject, n=n: run(subject, tokens, n))
            times[side, n] += [spent] if i > 1 else []  # TorchScript compiles for good at the second call
    out = {}
    for side in sides:
        one, all_ = (statistics.median(times[side, n]) for n in (1, new))
        out |= {f"{side}_prefill": prompt / one, f"{side}_decode": (new - 1) / (all_ - one)}
    return out


def lengths(model, counts: tuple[int, ...]) -> list[dict[str, float]]:
    """Of texts of these lengths: milliseconds a token, and MB resident."""
    rows = []
    for count in counts:
        ours(model, [1], count)
        spent = seconds(lambda count=count: ours(model, [1], count))
        rows.append({"tokens": count, "ms": spent / count * 1e3, "mb": resident() / 1e6})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs=2, default=(200, 2000), help="of the 0.1B model")
    parser.add_argument("--tiny-lengths", type=int, nargs=2, default=(5000, 50000), help="of the tiny one")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    model, console = jaxlm.init(SMALL), Console()
    found = {"lengths": lengths(model, tuple(args.lengths))}
    found["tiny_lengths"] = lengths(jaxlm.init(TINY), tuple(args.tiny_lengths))
    found["speeds"] = rates = speeds(model, package(model), args.prompt, args.new, args.repeats)
    million = sum(leaf.size for leaf in jax.tree.leaves(model.params)) / 1e6
    table = Table("", "jaxlm tokens/s", "rwkv tokens/s", "ratio", title=f"RWKV-7, {million:.0f}M, {args.prompt} tokens")
    for phase in ("prefill", "decode"):
        a, b = rates[f"jaxlm_{phase}"], rates[f"rwkv_{phase}"]
        table.add_row(phase, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}")
    console.print(table)
    table = Table("model", "tokens", "ms a token", "resident MB", title="generation's memory")
    for name, rows in (("0.1B", found["lengths"]), ("tiny", found["tiny_lengths"])):
        for row in rows:
            table.add_row(name, f"{row['tokens']:,}", f"{row['ms']:.2f}", f"{row['mb']:.0f}")
    console.print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
