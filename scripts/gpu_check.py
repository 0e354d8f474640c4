#!/usr/bin/env python3
"""Checks and times every implementation of attention on a GPU, forward and backward, in one run on normal random data.

Each case is computed by every implementation of jaxlm, by jax.nn.dot_product_attention with cuDNN and with XLA, and, if
torch is installed with CUDA, by its scaled_dot_product_attention and FlexAttention. Who does not compute a case is
listed with the reason.

Check: outputs and gradients against jaxlm's reference in float32, head by head, which is itself compared with NumPy in
float64 at a few rows. An error is the largest over rows (a query or key of one head) of |x - reference| / |reference|,
norms over the head dim, the latter at least its median.

Time: the median of several samples, each of as many calls as fill --sample-ms, after warming up. Backward is the time
of output and gradients together less the forward's. TFLOP/s count 2 x pairs x (D + Dv) forward and 2.5 times that
backward; pairs are all of T x S, half of them if causal, and the visible ones under any other mask.

Exits with 1 if anyone is wrong or an implementation of jaxlm fails.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import gc
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share of the same GPU

import jax
import jax.numpy as jnp
import numpy as np
from gpu_contenders import Case, Data, Refused, cases, contenders, make
from rich.console import Console
from rich.table import Table

from jaxlm.kernels.attention import attention
from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.explain import explain_attention

# Largest error of a row that passes, output and gradients. Rounding alone gives a third of these.
TOLERANCE = {"bfloat16": (2e-2, 4e-2), "float16": (3e-3, 6e-3), "float32": (2e-5, 5e-5)}
ANCHOR = 2e-5  # the float32 reference against float64
BASELINE = "jax cudnn"


@dataclasses.dataclass
class Row:
    case: str
    contender: str
    status: str = "ok"  # or wrong, refused, failed
    why: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    compile_s: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    gb_per_s: float | None = None  # decode: keys and values read


def exact(data: Data) -> dict[str, np.ndarray]:
    """out, dq, dk, dv in float32 by the reference, one example and one key-value head at a time."""
    case = data.case
    group = case.heads // case.kv_heads

    def run(q, k, v, g, table, given):
        mask = data.mask if table is None else BlockTable(table, case.block, data.mask.full_rows)
        f = lambda q, k, v: attention(q, k, v, mask, impl="reference", softcap=case.softcap, **given)
        out, pull = jax.vjp(f, *(x.astype(jnp.float32) for x in (q, k, v)))
        return out, *pull(g.astype(jnp.float32))

    run, parts = jax.jit(run), []
    for b in range(case.batch):
        heads = []
        for kv in range(case.kv_heads):
            ours, theirs = slice(kv * group, (kv + 1) * group), slice(kv, kv + 1)
            q, k, v, g = (x[b : b + 1, :, ours if x.shape[2] == case.heads else theirs] for x in data.arrays)
            table = data.mask.blocks if isinstance(data.mask, BlockTable) else None
            table = table[ours] if table is not None and len(table) > 1 else table
            given = {name: x[b : b + 1] for name, x in data.features.items() if name not in ("softcap", "sinks")}
            given |= {"sinks": data.features["sinks"][ours]} if case.sinks else {}
            heads.append([np.asarray(x) for x in run(q, k, v, g, table, given)])
        parts.append([np.concatenate(x, 2) for x in zip(*heads, strict=True)])
    return dict(zip(("out", "dq", "dk", "dv"), (np.concatenate(x) for x in zip(*parts, strict=True)), strict=True))


def anchor(data: Data, out: np.ndarray, samples: int = 8) -> float:
    """The error of some rows of `out` against the definition in float64."""
    case, rng, errors = data.case, np.random.default_rng(1), []
    for t in [0, case.t - 1, *rng.integers(0, case.t, samples).tolist()]:
        b, n = int(rng.integers(case.batch)), int(rng.integers(case.heads))
        kv = n // (case.heads // case.kv_heads)
        q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (
            data.arrays[0][b, t, n], data.arrays[1][b, :, kv], data.arrays[2][b, :, kv]))  # fmt: skip
        logits = k @ q * case.head_dim**-0.5
        if case.softcap is not None:
            logits = case.softcap * np.tanh(logits / case.softcap)
        if isinstance(data.mask, BlockTable):
            listed = np.asarray(data.mask.blocks)[n % len(data.mask.blocks), t // case.block]
            count = np.bincount(listed[listed >= 0], minlength=case.s // case.block).repeat(case.block)
            count = np.ones(case.s) if t // case.block in (0, case.t // case.block - 1) else count
        else:
            count = data.dense(b, slice(t, t + 1))[0]
        weights = count * np.exp(logits)
        total = weights.sum() + (np.exp(float(data.features["sinks"][n])) if case.sinks else 0)
        want = weights @ v / total
        errors.append(np.linalg.norm(out[b, t, n] - want) / np.linalg.norm(want))
    return max(errors)


def row_error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error of a row; inf if anything is not finite."""
    if not np.isfinite(got).all():
        return math.inf
    size = np.linalg.norm(want, axis=-1)
    return float((np.linalg.norm(got - want, axis=-1) / np.maximum(size, np.median(size))).max())


def measure(call, wait, samples: int, sample_ms: float) -> float:
    """Milliseconds a call: the median of samples of many calls in a row, of which the last is waited for."""
    for _ in range(2):
        wait(call())
    start = time.perf_counter()
    wait(call())
    calls = min(1000, max(1, round(sample_ms / 1000 / (time.perf_counter() - start))))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            last = call()
        wait(last)
        times.append((time.perf_counter() - start) / calls)
    return 1000 * statistics.median(times)


def check_and_time(row: Row, contender, data: Data, want: dict[str, np.ndarray], dtype: str, timing) -> Row:
    """Fills the row; what a contender raises becomes its reason."""
    case = data.case
    try:
        start = time.perf_counter()
        runner = contender(data)
        both = None if case.decode else runner.both
        got = both() if both else (runner.forward(),)
        runner.wait(got)
        row.compile_s = time.perf_counter() - start
        for name, x, limit in zip(want, got, (TOLERANCE[dtype][0], *3 * [TOLERANCE[dtype][1]]), strict=False):
            row.errors[name] = row_error(runner.host(x), want[name])
            if not row.errors[name] <= limit:
                row.status, row.why = (
                    "wrong",
                    f"{row.why} {name} is off by {row.errors[name]:.1e} > {limit:.0e}".strip(),
                )
        del got
        row.forward_ms = measure(runner.forward, runner.wait, *timing)
        tflop = 2 * data.pairs * 2 * case.head_dim / 1e12
        row.forward_tflops = tflop / row.forward_ms * 1e3
        if both and (backward_ms := measure(both, runner.wait, *timing) - row.forward_ms) > 0:
            row.backward_ms, row.backward_tflops = backward_ms, 2.5 * tflop / backward_ms * 1e3
        if case.decode:
            row.gb_per_s = sum(x.nbytes for x in data.arrays[1:3]) / row.forward_ms / 1e6
    except Refused as reason:
        row.status, row.why = "refused", str(reason)
    except Exception as error:  # out of memory, an unsupported shape: the others go on
        row.status, row.why = "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return row


def show(case: Case, rows: list[Row], note: str, console: Console) -> None:
    table = Table(title=f"{case}\n{note}", title_justify="left")
    rate = "GB/s" if case.decode else "TFLOP/s"
    for name in ("", "worst error", "forward ms", rate, "backward ms", "TFLOP/s", f"forward / {BASELINE}"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    base = next((row.forward_ms for row in rows if row.contender == BASELINE), None)
    number = lambda x, digits: "" if x is None else f"{x:,.{digits}f}"
    for row in rows:
        if row.status in ("refused", "failed"):
            continue
        style = "red" if row.status == "wrong" else None
        worst = f"{max(row.errors.values()):.1e}{' wrong' if row.status == 'wrong' else ''}"
        ratio = "" if base is None or row.forward_ms is None else f"{base / row.forward_ms:.2f}x"
        table.add_row(
            row.contender, worst, number(row.forward_ms, 3), number(row.gb_per_s or row.forward_tflops, 1),
            number(row.backward_ms, 3), number(row.backward_tflops, 1), ratio, style=style,
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if row.status != "ok":
            console.print(f"  {row.contender} {row.status}: {row.why}", markup=False, highlight=False)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the command."""
    versions = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "torch", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    device = jax.devices()[0]
    return {"device": device.device_kind, "platform": jax.default_backend(), "versions": versions}


def markdown(report: dict[str, Any]) -> str:
    """The rows as one table, with the command that made them."""
    where = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version != "absent")
    lines = [f"`{report['command']}` on {report['device']} ({where}), {report['date']}, {report['dtype']}.", ""]
    lines += [
        "| case | contender | worst error | forward ms | TFLOP/s | backward ms | TFLOP/s |",
        "|---|---|" + 5 * "---:|",
    ]
    for row in report["rows"]:
        if row["status"] in ("refused", "failed"):
            lines.append(
                f"| {row['case']} | {row['contender']} | {row['status']}: {row['why'].replace('|', '/')} | | | | |"
            )
            continue
        worst = f"{max(row['errors'].values()):.1e}" + (" **wrong**" if row["status"] == "wrong" else "")
        figures = [row[name] for name in ("forward_ms", "forward_tflops", "backward_ms", "backward_tflops")]
        cells = ["" if x is None else f"{x:.3f}" if i % 2 == 0 else f"{x:.1f}" for i, x in enumerate(figures)]
        lines.append(f"| {row['case']} | {row['contender']} | {worst} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--small", action="store_true", help="a dry run of a few tiny shapes, on any machine, in well under a minute")
    add(
        "--cases",
        nargs="+",
        default=["*"],
        metavar="PATTERN",
        help="only cases like these, as in 'hd128-*' 'bigbird-*'",
    )
    add("--contenders", nargs="+", default=["*"], metavar="PATTERN", help="only these, as in 'jaxlm*' 'jax cudnn'")
    add("--list", action="store_true", help="list cases and contenders, and do nothing")
    add("--dtype", choices=list(TOLERANCE), default="bfloat16")
    add("--samples", type=int, default=7, help="samples of each time (7)")
    add("--sample-ms", type=float, default=100, help="milliseconds that the calls of a sample fill (100)")
    add("--json", type=Path, metavar="FILE", help="write everything there, after each case")
    add("--markdown", type=Path, metavar="FILE", help="write the table there, for docs/measurements")
    args = parser.parse_args(argv)
    if args.small:
        args.samples, args.sample_ms = min(args.samples, 2), min(args.sample_ms, 1)
    if args.samples < 1:
        parser.error(f"--samples must be at least 1, got {args.samples}")
    return args


def main(argv: list[str] | None = None) -> int:
    args, console = parse(argv), Console()
    console = console if console.is_terminal else Console(width=120)
    like = lambda name, patterns: any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    chosen = [case for case in cases(args.small) if like(case.name, args.cases)]
    everyone = {name: run for name, run in contenders(args.small).items() if like(name, args.contenders)}
    if args.list or not chosen or not everyone:
        console.print("\n".join(["cases:", *(f"  {case}" for case in cases(args.small))]), markup=False)
        console.print("\n".join(["contenders:", *(f"  {name}" for name in contenders(args.small))]), markup=False)
        return 0 if args.list else 2
    if jax.default_backend() != "gpu" and not args.small:
        console.print(f"No GPU: jax runs on {jax.default_backend()}. --small makes a dry run anywhere.", style="red")
        return 2
    command = " ".join(["python", "scripts/gpu_check.py", *(sys.argv[1:] if argv is None else argv)])
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = machine() | {"command": command, "date": date, "dtype": args.dtype, "tolerance": TOLERANCE[args.dtype]}
    report["rows"] = rows = []
    console.print(f"{report['device']}, {report['versions']}", markup=False)
    for case in chosen:
        data = make(case, args.dtype)
        want = exact(data)
        if (error := anchor(data, want["out"])) > ANCHOR:
            console.print(f"{case.name}: the reference itself is off by {error:.1e} > {ANCHOR:.0e}", style="red")
            return 1
        timing = (args.samples, args.sample_ms)
        done = []
        for name, run in everyone.items():
            done.append(check_and_time(Row(case.name, name), run, data, want, args.dtype, timing))
            gc.collect()
        q, k, _, _ = data.arrays
        told = explain_attention(q.shape, k.shape, data.mask, dtype=q.dtype, features=tuple(data.features))
        share = data.pairs / (case.batch * case.heads * case.t * case.s)
        show(case, done, f"attention chooses {told.chosen}; {share:.1%} of T x S counts", console)
        rows += [dataclasses.asdict(row) for row in done]
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        if args.markdown:
            args.markdown.write_text(markdown(report))
    bad = [
        row
        for row in rows
        if row["status"] == "wrong" or (row["status"] == "failed" and row["contender"].startswith("jaxlm"))
    ]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
