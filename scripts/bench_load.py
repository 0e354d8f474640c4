#!/usr/bin/env python3
"""Loading beside transformers: from a cold process to the first logits, and the peak of memory.

Each measurement is a process of its own that loads a checkpoint, runs one token and reports seconds (imports left out,
tokenizer included for .gguf) and its peak RSS above what it had after the imports. jaxlm's compilations come from a
persistent cache that a first, discarded run fills. Figures are medians. Needs torch, and accelerate for .gguf files.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.table import Table

OURS = """
import jax, jaxlm, jaxlm.api, jaxlm.checkpoints.gguf, jaxlm.checkpoints.safetensors, transformers, tokenizers
def run(path):
    model = jaxlm.load(path)
    if path.endswith(".gguf"): model.tokenizer
    model([[1]]).block_until_ready()
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.weights._params))
"""
THEIRS = """
import os, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
transformers.logging.set_verbosity_error()
def run(path):
    gguf = path.endswith(".gguf")
    where = (os.path.dirname(path), {"gguf_file": os.path.basename(path)}) if gguf else (path, {})
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    if gguf: AutoTokenizer.from_pretrained(where[0], **where[1])
    with torch.no_grad(): model(torch.tensor([[1]]))
    return sum(p.nbytes for p in model.parameters())
"""
REPORT = """
import json, resource, sys, time
status = open("/proc/self/status").read()
idle = int(status.split("VmRSS:")[1].split()[0]) * 1024
start = time.perf_counter()
size = run(sys.argv[1])
spent = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": spent, "peak": peak - idle, "parameters": size}))
"""


def once(program: str, path: str, cache: str) -> dict:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TQDM_DISABLE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program + REPORT, path], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="checkpoint directories or .gguf files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    table = Table(
        "checkpoint", "jaxlm s", "transformers s", "ratio", "jaxlm peak MB", "limit MB", title="load + one token"
    )
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for path in args.sources:
            once(OURS, path, cache)
            pairs = [(once(OURS, path, cache), once(THEIRS, path, cache)) for _ in range(args.repeats)]
            mine, other = (statistics.median(run["seconds"] for run in side) for side in zip(*pairs, strict=True))
            peak = statistics.median(run["peak"] for run, _ in pairs) / 1e6
            limit = 1.15 * pairs[0][0]["parameters"] / 1e6 + 150
            rows.append(
                {
                    "source": os.path.basename(path),
                    "jaxlm_s": mine,
                    "transformers_s": other,
                    "peak_mb": peak,
                    "limit_mb": limit,
                }
            )
            table.add_row(
                os.path.basename(path),
                f"{mine:.2f}",
                f"{other:.2f}",
                f"{mine / other:.2f}",
                f"{peak:.0f}",
                f"{limit:.0f}",
            )
    Console().print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
