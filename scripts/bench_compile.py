#!/usr/bin/env python3
"""Compile time and program size against depth: flat, because layers of one kind are one scanned body.

Prints a table and, with --json FILE, writes the figures: medians over fresh compilations of the same small model.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import jaxlm
from jaxlm.models import decoder

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def compile_once(depth: int) -> tuple[float, int]:
    """Seconds to compile the loss and its gradient at this depth, and the characters of the optimized HLO."""
    jax.clear_caches()
    model = jaxlm.init(CONFIG | {"num_hidden_layers": depth})
    tokens = jnp.zeros((1, 128), jnp.int32)
    loss = lambda p: decoder.forward(model.config, p, tokens)[0].sum()
    lowered = jax.jit(jax.value_and_grad(loss)).lower(model.params)
    start = time.perf_counter()
    compiled = lowered.compile()
    return time.perf_counter() - start, len(compiled.as_text())


def measure(depths: list[int], repeats: int) -> list[dict[str, float]]:
    """Medians; the depths take turns, so that a machine that slows down slows all of them."""
    runs = [{depth: compile_once(depth) for depth in depths} for _ in range(repeats)]
    return [
        {
            "depth": depth,
            "compile_s": statistics.median(run[depth][0] for run in runs),
            "hlo_chars": runs[0][depth][1],
        }
        for depth in depths
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--repeats", type=int, default=5, help="compilations per depth, of which the median counts")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    rows = measure(args.depths, args.repeats)
    table = Table(
        "layers", "compile s", "ratio", "HLO characters", "ratio", title=f"loss + gradient, {jax.default_backend()}"
    )
    for row in rows:
        time_ratio, size_ratio = (row[k] / rows[0][k] for k in ("compile_s", "hlo_chars"))
        table.add_row(
            str(row["depth"]),
            f"{row['compile_s']:.2f}",
            f"{time_ratio:.2f}",
            str(row["hlo_chars"]),
            f"{size_ratio:.3f}",
        )
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
