"""Cases for every implementation of attention, and what is due of each: a float64 reference in numpy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxlm.kernels.block_table import BlockTable
from jaxlm.kernels.call import dropout_seed, kept
from jaxlm.kernels.masks import (
    CAUSAL,
    EVERYTHING,
    Band,
    BlockLayout,
    KeysBefore,
    Mask,
    QueriesBefore,
    chunked_local,
    longformer,
    prefix_lm,
    strided,
    window,
)


@dataclasses.dataclass(frozen=True)
class Table:
    """A random BlockTable: its heads (1: shared), slots, block, full rows; `holes` leaves some slots empty."""

    heads: int = 1
    slots: int = 4
    block: int = 8
    full_rows: tuple[int, ...] = (0, -1)
    holes: bool = False

    def make(self, t: int, s: int) -> BlockTable:
        rng = np.random.default_rng(7)
        # Drawn with replacement from few blocks, so that repeats, which count again, are common.
        low = -1 if self.holes else 0
        blocks = rng.integers(low, s // self.block, (self.heads, t // self.block, self.slots))
        return BlockTable(jnp.asarray(blocks, jnp.int32), self.block, self.full_rows)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    mask: Mask | Table = CAUSAL
    t: int = 40
    s: int = 40
    n: int = 4
    k: int = 2
    h: int = 8
    dv: int = 8
    batch: int = 2
    dtype: str = "float32"
    features: tuple[str, ...] = ()
    bias: str = "BNTS"  # axes of the bias that do not broadcast
    shared: bool = False  # positions, segments and validity are those of all the batch
    lse: bool = True

    def __str__(self) -> str:
        return self.name

    def given(self) -> set[str]:
        """The keyword arguments of `attention` that it uses, but for the scale, which no one refuses."""
        pairs = {"segments": ("q_segments", "k_segments"), "positions": ("q_pos", "k_pos")}
        return {name for f in self.features for name in pairs.get(f, (f,))} - {"scale", "nothing"}


def scaled(mask: Mask | Table, by: int) -> Mask | Table:
    """The mask of positions `by` times as many: with a tile that is `by` times as large it looks the same."""
    if isinstance(mask, Table | BlockLayout):
        return dataclasses.replace(mask, block=by * mask.block)
    fields: dict[str, Any] = {field.name: getattr(mask, field.name) for field in dataclasses.fields(mask)}
    fields = {name: x if x is None else scaled(x, by) if isinstance(x, Mask) else by * x for name, x in fields.items()}
    return dataclasses.replace(mask, **fields)


MASKS = {
    "causal": CAUSAL,
    "full": EVERYTHING,
    "window": window(9),
    "both-ways": Band(-5, 11),
    "prefix": prefix_lm(11),
    "chunked": chunked_local(12),
    "longformer": longformer(8, 3),
    "strided": strided(6),
    "layout": BlockLayout(8, ((0, 1), (1,), (0, 2, 4), (), (3, 4))),
    "window-or-prefix": window(5) | KeysBefore(18),
    "causal-but-far": CAUSAL & ~window(7),
    "queries-first": (CAUSAL & QueriesBefore(20)) | window(3),
}
EVERY_FEATURE = ("positions", "segments", "k_valid", "bias", "alibi", "scale", "softcap", "sinks")
PACKED = ("segments", "k_valid", "scale", "softcap", "sinks")
ONE_EACH = ("segments", "k_valid", "alibi", "scale", "softcap", "sinks", "dropout")

CASES = [
    *(Case(name, mask) for name, mask in MASKS.items()),
    # Shapes.
    Case("heads", n=3, k=3),
    Case("one-key-head", window(9), n=4, k=1),
    Case("values-narrower", dv=5),
    Case("values-wider", window(9), dv=16),
    Case("ragged", t=37, s=37),
    Case("ragged-more-keys", Band(-9, 6), t=21, s=45),
    Case("ragged-more-queries", window(9), t=45, s=21),
    Case("one-tile", t=5, s=7),
    Case("one-query", t=1, s=40, features=("positions",)),
    Case("few-queries", window(20), t=3, s=43, features=("positions",)),
    Case("few-queries-all", window(20), t=3, s=43, features=EVERY_FEATURE),
    Case("few-queries-nothing", t=3, dv=5, n=4, k=1, features=("nothing", "k_valid", "sinks")),
    Case("few-queries-dropout", t=3, s=40, features=("dropout",)),
    # Block tables.
    Case("table", Table()),
    Case("table-by-head", Table(heads=4)),
    Case("table-holes", Table(heads=4, slots=5, holes=True, full_rows=(2,)), t=40, s=48),
    Case("table-one-key-head", Table(heads=1, full_rows=()), n=4, k=1, dv=5),
    Case("table-all", Table(heads=4, holes=True), features=(*EVERY_FEATURE, "dropout")),
    Case("table-shared-all", Table(holes=True), features=(*EVERY_FEATURE, "dropout"), bias="NT", shared=True),
    Case("table-packed", Table(heads=4, holes=True), features=PACKED),
    # Features.
    *(Case(feature, features=(feature,)) for feature in ONE_EACH),
    *(Case(f"bias-{axes or 'one'}", features=("bias",), bias=axes) for axes in ("BNTS", "NTS", "NS", "BT", "")),
    Case("positions", window(9), features=("positions",)),
    Case("positions-shared", window(9), t=37, features=("positions", "segments"), shared=True),
    Case("left-padding", features=("q_pos", "k_pos")),
    Case("sees-nothing", features=("nothing", "k_valid")),
    Case("sees-only-sinks", features=("nothing", "k_valid", "sinks")),
    Case("all", prefix_lm(11), t=37, s=45, dv=5, features=(*EVERY_FEATURE, "dropout")),
    Case("all-shared", window(9), features=(*EVERY_FEATURE, "dropout"), bias="N", shared=True),
    # bfloat16.
    Case("bfloat16", dtype="bfloat16"),
    Case("bfloat16-window", window(9), t=37, dtype="bfloat16", features=("softcap", "segments")),
    Case("bfloat16-table", Table(), dtype="bfloat16"),
    Case("bfloat16-one-query", t=1, dtype="bfloat16", features=("positions",)),
    Case("bfloat16-output-only", dtype="bfloat16", lse=False),
    Case("bfloat16-window-output-only", window(9), dtype="bfloat16", lse=False),
    Case("bfloat16-full-output-only", EVERYTHING, dtype="bfloat16", lse=False),
]  # fmt: skip


@functools.cache
def inputs(case: Case) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, other keyword arguments): numpy, and of the case's dtype so that both sides start from the same."""
    rng = np.random.default_rng(3)
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float32
    b, t, s, n = case.batch, case.t, case.s, case.n
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    rows = 1 if case.shared else b
    arrays = {"q": normal(b, t, n, case.h), "k": normal(b, s, case.k, case.h), "v": normal(b, s, case.k, case.dv)}
    arrays = {name: (1.5 * x).astype(dtype) for name, x in arrays.items()}
    other: dict[str, Any] = {"scale": 0.3 if "scale" in case.features else case.h**-0.5}
    for feature in case.features:
        if feature == "positions":  # gaps, repeats, empty slots and padding, in no order
            arrays["q_pos"], arrays["k_pos"] = rng.integers(-1, 60, (rows, t)), rng.integers(-1, 60, (rows, s))
        elif feature in ("q_pos", "k_pos"):  # each row of the batch is padded on its left by another length
            x = np.arange(t if feature == "q_pos" else s) - 5 * np.arange(rows)[:, None]
            arrays[feature] = np.maximum(x, -1)
        elif feature == "segments":
            arrays["q_segments"] = np.sort(rng.integers(0, 3, (rows, t)))
            arrays["k_segments"] = np.sort(rng.integers(0, 3, (rows, s)))
        elif feature == "k_valid":
            arrays["k_valid"] = (rng.random((rows, s)) < 0.8) & ("nothing" not in case.features)
        elif feature == "bias":
            sizes = {"B": b, "N": n, "T": t, "S": s}
            arrays["bias"] = normal(*(size if axis in case.bias else 1 for axis, size in sizes.items()))
        elif feature in ("alibi", "sinks"):
            arrays[feature] = normal(n) * (0.1 if feature == "alibi" else 1)
        elif feature == "softcap":
            other["softcap"] = 1.5
        elif feature == "dropout":
            other["dropout"] = (0.3, jax.random.key(5))
    arrays = {name: x.astype(np.int32) if x.dtype == np.int64 else x for name, x in arrays.items()}
    return arrays, other


def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    d_out = rng.normal(size=(case.batch, case.t, case.n, case.dv))
    d_out = d_out.astype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float32)
    return d_out, rng.normal(size=d_out.shape[:3]).astype(np.float32) * case.lse


def counts(case: Case, x: dict[str, np.ndarray]) -> np.ndarray:
    """How many times each key counts for each query, [B or 1, N or 1, T, S]."""
    q_pos = x.get("q_pos", np.arange(case.t)[None])[:, None, :, None]
    k_pos = x.get("k_pos", np.arange(case.s)[None])[:, None, None, :]
    if isinstance(case.mask, Table):
        table = case.mask.make(case.t, case.s)
        blocks, size = np.asarray(table.blocks), table.block
        listed = np.zeros((len(blocks), case.t, case.s))
        for head, row in np.ndindex(blocks.shape[:2]):
            for j in blocks[head, row]:
                if j >= 0:
                    listed[head, row * size : (row + 1) * size, j * size : (j + 1) * size] += 1
        for row in table.full_rows:
            row %= blocks.shape[1]
            listed[:, row * size : (row + 1) * size] = 1
        count = listed[None] * (k_pos >= 0)
    else:
        count = (case.mask(q_pos, k_pos) & (k_pos >= 0)).astype(np.float64)
    if "q_segments" in x:
        count = count * (x["q_segments"][:, None, :, None] == x["k_segments"][:, None, None, :])
    if "k_valid" in x:
        count = count * x["k_valid"][:, None, None, :]
    return count


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """out, lse, and the gradient of sum(out * d_out) + sum(lse * d_lse), in float64 by the formulas."""
    x, other = inputs(case)
    count = counts(case, x)
    x = {name: value.astype(np.float64) for name, value in x.items()}
    d_out, d_lse = (np.moveaxis(d.astype(np.float64), 1, 2) for d in cotangents(case))  # [B, N, T, ...]
    group, cap, scale = case.n // case.k, other.get("softcap"), other["scale"]
    by_head = lambda y: np.repeat(np.moveaxis(y, 1, 2), group, 1)  # [B, S, K, D] -> [B, N, S, D]
    q, k, v = np.moveaxis(x["q"], 1, 2), by_head(x["k"]), by_head(x["v"])
    capped = scale * q @ np.swapaxes(k, 2, 3)
    capped = capped if cap is None else cap * np.tanh(capped / cap)
    distance = x.get("k_pos", np.arange(case.s)[None])[:, None, :] - x.get("q_pos", np.arange(case.t)[None])[:, :, None]
    logits = capped + x.get("bias", 0) + (x["alibi"][:, None, None] * distance[:, None] if "alibi" in x else 0)
    sink = np.exp(x["sinks"])[:, None, None] if "sinks" in x else np.zeros((case.n, 1, 1))
    weights = count * np.exp(logits)  # the logits are small
    total = weights.sum(-1, keepdims=True) + sink
    p = weights / np.where(total == 0, 1, total)
    keep = 1.0
    if "dropout" in other:
        rate, key = other["dropout"]
        rows = np.arange(case.batch * case.n * case.t).reshape(case.batch, case.n, case.t, 1)
        keep = np.asarray(kept(dropout_seed(key), rate, rows, np.arange(case.s))) / (1 - rate)
    out = (p * keep) @ v
    with np.errstate(divide="ignore"):
        lse = np.log(total)[..., 0]
    # d out / d p_j = keep_j v_j, d p_i / d logit_j = p_i (i == j) - p_i p_j, d lse / d logit_j = p_j.
    d_p = keep * (d_out @ np.swapaxes(v, 2, 3))
    d_logits = p * (d_p - (p * d_p).sum(-1, keepdims=True) + d_lse[..., None])
    d_scaled = scale * d_logits * (1 if cap is None else 1 - (capped / cap) ** 2)
    back = lambda y: np.moveaxis(y.reshape(case.batch, case.k, group, *y.shape[2:]).sum(2), 1, 2)
    grads = {
        "q": np.moveaxis(d_scaled @ k, 1, 2),
        "k": back(np.swapaxes(d_scaled, 2, 3) @ q),
        "v": back(np.swapaxes(p * keep, 2, 3) @ d_out),
    }
    if "bias" in x:
        shared = tuple(axis for axis in range(4) if x["bias"].shape[axis] == 1)
        grads["bias"] = d_logits.sum(shared, keepdims=True)
    if "alibi" in x:
        grads["alibi"] = (d_logits * distance[:, None]).sum((0, 2, 3))
    if "sinks" in x:
        # The sink's share falls as the others rise: d out / d sink = -p_sink out, d lse / d sink = p_sink.
        grads["sinks"] = ((sink / np.where(total == 0, 1, total))[..., 0] * (d_lse - (out * d_out).sum(-1))).sum((0, 2))
    results = {"out": np.moveaxis(out, 1, 2), "lse": np.moveaxis(lse, 1, 2)}
    return results | {f"d_{name}": grad for name, grad in grads.items()}
