#!/usr/bin/env python3
"""Attention in chunks beside the reference: time and memory, forward and with its gradient, and one token over a cache.

Runs alternate; figures are medians, and the ratio is of times measured side by side. Memory is what the compiled
program needs beside its arguments and results (`memory_analysis().temp_size_in_bytes`). The reference materialises
every logit: 8192 tokens and 2 heads want 3 GB of it.
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxlm.kernels.attention import attention
from jaxlm.kernels.bigbird import bigbird, random_blocks
from jaxlm.kernels.masks import CAUSAL, EVERYTHING, window


def seconds(run) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(functions: dict, arguments, repeats: int) -> dict:
    """name -> (median seconds, temporary bytes) of each function on the same arguments, taking turns."""
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    runs = {name: functools.partial(f, *arguments) for name, f in compiled.items()}
    for run in runs.values():
        seconds(run)
    times: dict = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    memory = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}
    return {name: (statistics.median(times[name]), memory[name]) for name in runs}


def masks(length: int, heads: int) -> dict:
    every = {"causal": CAUSAL, "full": EVERYTHING, "window(1024)": window(1024)}
    if length % 64 == 0 and length >= 1024:
        random = random_blocks(length, heads=heads, seed=0, max_length=max(4096, length))
        every["BigBird"] = bigbird(length, random)
    return every


def training(args) -> list[dict]:
    """Every mask and length, forward alone and with the gradient."""
    rows = []
    for length in args.lengths:
        keys = jax.random.split(jax.random.key(0), 4)
        heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
        shapes = [(args.batch, length, n, args.dim) for n in heads]
        q, k, v, w = (jax.random.normal(key, shape, args.dtype) for key, shape in zip(keys, shapes, strict=True))
        for name, mask in masks(length, args.heads).items():
            if name not in args.masks:
                continue

            for what, f in (("forward", forward), ("with gradient", both)):
                functions = {i: functools.partial(f, i, mask) for i in ("reference", "xla")}
                found = measure(functions, (q, k, v, w), args.repeats)
                rows.append(row(f"{name}, {what}", length, found, "xla"))
    return rows


def forward(impl, mask, q, k, v, w):
    return attention(q, k, v, mask, impl=impl)


def both(impl, mask, q, k, v, w):
    out, back = jax.vjp(lambda *qkv: attention(*qkv, mask, impl=impl), q, k, v)
    return out, back(w)


def decoding(args) -> list[dict]:
    """One query over a cache that is full, and one that is filled to a quarter."""
    rows = []
    for length in args.caches:
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = [(args.batch, 1, args.heads, args.dim), *[(args.batch, length, args.kv_heads, args.dim)] * 2]
        q, k, v = (jax.random.normal(key, shape, args.dtype) for key, shape in zip(keys, shapes, strict=True))
        slots = jnp.arange(length)[None]
        for filled in (length, length // 4):
            positions = (jnp.full((1, 1), filled - 1), jnp.where(slots < filled, slots, -1))

            def one(impl, q, k, v, q_pos, k_pos):
                return attention(q, k, v, CAUSAL, q_pos=q_pos, k_pos=k_pos, impl=impl)

            functions = {i: functools.partial(one, i) for i in ("reference", "decode")}
            found = measure(functions, (q, k, v, *positions), max(15, args.repeats))
            rows.append(row(f"{filled} tokens", length, found, "decode"))
    return rows


def row(what: str, length: int, found: dict, name: str) -> dict:
    (reference, memory), (ours, less) = found["reference"], found[name]
    return {
        "what": what,
        "length": length,
        "reference_ms": reference * 1e3,
        f"{name}_ms": ours * 1e3,
        "time_ratio": ours / reference,
        "reference_mib": memory / 2**20,
        f"{name}_mib": less / 2**20,
        "memory_ratio": less / memory,
    }


def show(console: Console, rows: list[dict], name: str, title: str) -> None:
    table = Table("", "length", "reference ms", f"{name} ms", "ratio", "reference MiB", "MiB", "ratio", title=title)
    for r in rows:
        times = (f"{r['reference_ms']:.1f}", f"{r[f'{name}_ms']:.1f}", f"{r['time_ratio']:.2f}")
        memory = (f"{r['reference_mib']:.1f}", f"{r[f'{name}_mib']:.1f}", f"{r['memory_ratio']:.3f}")
        table.add_row(r["what"], str(r["length"]), *times, *memory)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192])
    parser.add_argument("--caches", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--masks", nargs="+", default=["causal", "window(1024)", "BigBird"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    console, found = Console(width=120), {}
    sizes = f"{args.batch} x {args.heads}/{args.kv_heads} heads x {args.dim}, {args.dtype}, {jax.default_backend()}"
    if args.lengths:
        found["training"] = training(args)
        show(console, found["training"], "xla", f"Chunks, {sizes}")
    if args.caches:
        found["decoding"] = decoding(args)
        show(console, found["decoding"], "decode", f"One token over a cache, {sizes}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"arguments": vars(args), **found}, file, indent=2)


if __name__ == "__main__":
    main()
