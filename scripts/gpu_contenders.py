"""What gpu_check.py compares: cases, their random data, and everyone who computes attention, each behind one form."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.kernels.attention import IMPLS, attention
from jaxlm.kernels.bigbird import bigbird, random_blocks
from jaxlm.kernels.block_table import BlockTable, block_counts, multiplicity
from jaxlm.kernels.call import call_of
from jaxlm.kernels.masks import CAUSAL, EVERYTHING, Band, Mask, longformer, window


class Refused(Exception):
    """This contender does not compute this case, and says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    batch: int
    t: int
    s: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask = CAUSAL
    documents: int = 1  # packed into each row
    block: int = 0  # BigBird's, instead of the mask
    evaluation: bool = False  # BigBird without random blocks: the first block counts four times
    softcap: float | None = None
    sinks: bool = False

    @property
    def decode(self) -> bool:
        return self.t == 1

    def __str__(self) -> str:
        extra = {"documents": self.documents > 1, "softcap": self.softcap, "sinks": self.sinks}
        what = f"BigBird in blocks of {self.block}" if self.block else str(self.mask)
        what += "".join(f", {name}" for name, given in extra.items() if given)
        q, k = [self.batch, self.t, self.heads, self.head_dim], [self.batch, self.s, self.kv_heads, self.head_dim]
        return f"{self.name}: q {q}, k and v {k}, {what}"


def cases(small: bool) -> list[Case]:
    """16k tokens and mostly heads x head_dim = 2048; small ones keep the kinds of attention and not the sizes."""
    tokens, shrink = (256, 64) if small else (16384, 1)
    made = []

    def add(name: str, t: int, head_dim: int, kv_share: int = 1, width: int = 2048, **rest) -> None:
        t, batch = t // shrink, tokens // (t // shrink)
        heads, head_dim = (4, head_dim // 4) if small else (width // head_dim, head_dim)
        made.append(Case(name, batch, t, t, heads, heads // kv_share, head_dim, **rest))

    for head_dim in (64, 128, 256):
        for name, mask in (("causal", CAUSAL), ("full", EVERYTHING)):
            for t in (4096, 16384):
                add(f"hd{head_dim}-{name}-{t // 1024}k", t, head_dim, mask=mask)
    block = 4 if small else 64
    add("gqa-4k", 4096, 128, kv_share=4, width=4096)
    add("window-16k", 16384, 128, mask=window(1024 // shrink))
    add("segments-16k", 16384, 128, documents=8)
    add("longformer-4k", 4096, 64, mask=longformer(512 // shrink, 64 // shrink))
    add("softcap-sinks-4k", 4096, 128, softcap=20.0, sinks=True)
    for t in (4096, 8192, 16384):
        add(f"bigbird-{t // 1024}k", t, 64, width=768, block=block)
    add("bigbird-evaluation-4k", 4096, 64, width=768, block=block, evaluation=True)
    long, batch = (512, 2) if small else (32768, 16)
    made.append(Case("decode-32k", batch, 1, long, 4 if small else 32, 1 if small else 8, 16 if small else 128))
    kept = (
        "hd64-causal-4k",
        "hd128-full-4k",
        "gqa",
        "window",
        "segments",
        "softcap",
        "bigbird-4k",
        "bigbird-e",
        "decode",
    )
    return [case for case in made if not small or case.name.startswith(kept)]


@dataclasses.dataclass(frozen=True)
class Data:
    """A case with its arrays: q, k, v and the output's gradient; the mask; the other arguments of attention."""

    case: Case
    arrays: tuple[jax.Array, ...]
    mask: Mask | BlockTable
    features: dict[str, Any]

    @functools.cached_property
    def pairs(self) -> int:
        """(query, key) pairs that count, over batch and heads: half of all under a causal mask, by convention."""
        case = self.case
        if isinstance(self.mask, BlockTable):
            listed = np.asarray(block_counts(self.mask, case.s // case.block) > 0)
            return round(float(listed.mean()) * case.batch * case.heads * case.t * case.s)
        if case.mask in (EVERYTHING, CAUSAL) and case.documents == 1:
            half = 2 if case.mask == CAUSAL and not case.decode else 1
            return case.batch * case.heads * case.t * case.s // half
        rows = range(0, case.t, 1024)
        seen = sum(int(self.dense(b, slice(r, r + 1024)).sum()) for b in range(case.batch) for r in rows)
        return seen * case.heads

    def dense(self, b: int, rows: slice) -> np.ndarray:
        """bool [rows, S] of one example, by the mask's own definition (not for a BlockTable)."""
        assert isinstance(self.mask, Mask)
        q, k = np.arange(self.case.t)[rows, None], np.arange(self.case.s)[None]
        if "q_pos" in self.features:
            q = np.asarray(self.features["q_pos"])[b, rows, None]
        seen = self.mask(q, k)
        if "q_segments" in self.features:
            segments = np.asarray(self.features["q_segments"])[b]
            seen = seen & (segments[rows, None] == segments)
        return seen

    def counts(self) -> jax.Array | None:
        """How often each key counts, [B or 1, N or 1, T, S], where causal, full or a window does not say it already."""
        if isinstance(self.mask, BlockTable):
            return multiplicity(self.mask, self.case.t, self.case.s)[None]
        if self.plain() is not None:
            return None
        batch = self.case.batch if self.case.documents > 1 else 1
        return jnp.stack([jnp.asarray(self.dense(b, slice(None)), jnp.float32) for b in range(batch)])[:, None]

    def plain(self) -> tuple[bool, int | None] | None:
        """(causal, window) if that is all of the mask."""
        if isinstance(self.mask, BlockTable) or self.case.documents > 1:
            return None
        if self.case.decode or self.mask == EVERYTHING:
            return False, None
        if isinstance(self.mask, Band) and self.mask.lo == 0:
            return True, None if self.mask.hi is None else self.mask.hi + 1
        return None


def make(case: Case, dtype, seed: int = 0) -> Data:
    """Normal data: a GPU clocks down on it as it does in use, and no value is special."""
    rng = np.random.default_rng(seed)
    q, k = (case.batch, case.t, case.heads, case.head_dim), (case.batch, case.s, case.kv_heads, case.head_dim)
    arrays = tuple(jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for shape in (q, k, k, q))
    mask, features = case.mask, {}
    if case.block:
        # transformers draws from the first blocks only; anywhere is what the paper's figure shows, and the harder case.
        n = case.t // case.block
        drawn = rng.integers(1, n - 1, (case.heads, n - 2, 3)).astype(np.int32)
        paper = case.t in (1024, 3072, 4096)
        indices = random_blocks(case.t, heads=case.heads, seed=seed, block=case.block) if paper else drawn
        mask = bigbird(case.t, None if case.evaluation else indices, block=case.block)
    if case.documents > 1:
        cuts = np.sort(rng.integers(1, case.t, (case.batch, case.documents - 1)), 1)
        segments = jnp.asarray((np.arange(case.t)[None, :, None] >= cuts[:, None]).sum(-1), jnp.int32)
        features |= {"q_segments": segments, "k_segments": segments}
    if case.softcap is not None:
        features["softcap"] = case.softcap
    if case.sinks:
        features["sinks"] = jnp.asarray(rng.standard_normal(case.heads, np.float32))
    if case.decode:
        features["q_pos"] = jnp.full((case.batch, 1), case.s - 1, jnp.int32)
    return Data(case, arrays, mask, features)


@dataclasses.dataclass(frozen=True)
class Runner:
    """forward() gives out; both() gives out, dq, dk, dv; wait blocks until they are there; host gives float32 numpy."""

    forward: Callable[[], Any]
    both: Callable[[], Any] | None  # None has no gradient
    wait: Callable[[Any], Any]
    host: Callable[[Any], np.ndarray]


def in_jax(f: Callable, data: Data, extra: Any) -> Runner:
    """f(q, k, v, extra); extra is an argument, lest XLA folds large masks into the program."""
    q, k, v, g = data.arrays
    forward = jax.jit(f)

    @jax.jit
    def both(q, k, v, g, extra):
        out, pull = jax.vjp(lambda *qkv: f(*qkv, extra), q, k, v)
        return out, *pull(g)

    host = lambda x: np.asarray(x.astype(jnp.float32))
    return Runner(lambda: forward(q, k, v, extra), lambda: both(q, k, v, g, extra), jax.block_until_ready, host)


def of_jaxlm(name: str, data: Data) -> Runner:
    if reason := IMPLS[name].refuses(call_of(*data.arrays[:3], data.mask, data.features)):
        raise Refused(reason)
    static = {name: value for name, value in data.features.items() if not isinstance(value, jax.Array)}
    given = {name: value for name, value in data.features.items() if isinstance(value, jax.Array)}
    if isinstance(data.mask, BlockTable):
        run = lambda q, k, v, extra: attention(q, k, v, extra[0], impl=name, **extra[1], **static)
        return in_jax(run, data, (data.mask, given))
    return in_jax(lambda q, k, v, given: attention(q, k, v, data.mask, impl=name, **given, **static), data, given)


def of_jax_nn(implementation: str, data: Data) -> Runner:
    """jax.nn.dot_product_attention; what it has no words for is a dense mask, and a bias of log(counts)."""
    if data.case.softcap is not None or data.case.sinks:
        raise Refused("has no softcap and no sinks")
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise Refused(f"needs an NVIDIA GPU, the platform is {jax.default_backend()!r}")
    plain, counts = data.plain(), data.counts()
    causal, size = plain or (False, None)
    extra = {}
    if counts is not None:
        extra["mask"] = counts > 0
        if data.case.block:
            extra["bias"] = jnp.log(jnp.maximum(counts, 1)).astype(data.arrays[0].dtype)
    call: Any = jax.nn.dot_product_attention
    reach = None if size is None else (size - 1, 0)
    f = functools.partial(call, is_causal=causal, local_window_size=reach, implementation=implementation)
    return in_jax(lambda q, k, v, extra: f(q, k, v, **extra), data, extra)


def torch_device(small: bool) -> str:
    """Where torch runs; Refused says why it does not."""
    if importlib.util.find_spec("torch") is None:
        raise Refused("torch is not installed")
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if not small:
        raise Refused(f"torch {torch.__version__} has no CUDA device")
    torch.set_num_threads(1)
    return "cpu"


def in_torch(f: Callable, data: Data, device: str, gradient: bool = True) -> Runner:
    """f(q, k, v) on [B, N, T, H] tensors with the values of the JAX arrays."""
    import torch

    dtype = getattr(torch, str(data.arrays[0].dtype))
    host = [np.asarray(x.astype(jnp.float32)) for x in data.arrays]
    q, k, v, g = (torch.from_numpy(x).to(device, dtype).transpose(1, 2).contiguous() for x in host)
    leaves = [x.requires_grad_(gradient) for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            return f(*leaves)

    def both():
        out = f(*leaves)
        return out, *torch.autograd.grad(out, leaves, g)

    wait = (lambda x: torch.cuda.synchronize()) if device == "cuda" else (lambda x: None)
    return Runner(forward, both if gradient else None, wait, lambda x: x.detach().transpose(1, 2).float().cpu().numpy())


def of_sdpa(small: bool, data: Data) -> Runner:
    """torch's scaled_dot_product_attention, with the backend it picks."""
    device = torch_device(small)
    import torch

    if data.case.softcap is not None or data.case.sinks:
        raise Refused("has no softcap and no sinks")
    plain, counts = data.plain(), data.counts()
    if plain is not None and plain[1] is not None:
        counts = jnp.asarray(data.dense(0, slice(None)), jnp.float32)[None, None]
    rest: dict[str, Any] = {"is_causal": plain == (True, None), "enable_gqa": data.case.heads != data.case.kv_heads}
    if counts is not None:
        seen = torch.from_numpy(np.array(counts)).to(device)
        dtype = getattr(torch, str(data.arrays[0].dtype))
        rest["attn_mask"] = seen.log().to(dtype) if data.case.block else seen > 0
    return in_torch(functools.partial(torch.nn.functional.scaled_dot_product_attention, **rest), data, device)


def of_flex(small: bool, data: Data) -> Runner:
    """torch's FlexAttention: compiled on a GPU, with a BlockMask made of the same predicate or table."""
    device = torch_device(small)
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = data.case
    if case.sinks:
        raise Refused("has no sinks")
    score = None
    if isinstance(data.mask, BlockTable):
        counts = torch.from_numpy(np.array(block_counts(data.mask, case.s // case.block))).to(device)
        counts, block = counts.expand(case.heads, -1, -1).contiguous(), case.block
        seen = lambda b, h, q, k: counts[h, q // block, k // block] > 0
        if int(counts.max()) > 1:
            logs = counts.float().log()
            score = lambda x, b, h, q, k: x + logs[h, q // block, k // block]
    elif case.documents > 1:
        segments = torch.from_numpy(np.array(data.features["q_segments"])).to(device)
        seen = lambda b, h, q, k: data.mask(q, k) & (segments[b, q] == segments[b, k])
    else:
        last = case.s - 1 if case.decode else 0
        seen = lambda b, h, q, k: data.mask(q + last, k)
    if case.softcap is not None:
        score = lambda x, b, h, q, k: case.softcap * torch.tanh(x / case.softcap)
    size = (case.batch if case.documents > 1 else None, case.heads if case.block else None, case.t, case.s)
    full = data.plain() == (False, None)
    block_mask = None if full else create_block_mask(seen, *size, device=device, _compile=device == "cuda")
    run = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    rest = {"score_mod": score, "block_mask": block_mask, "enable_gqa": case.heads != case.kv_heads}
    return in_torch(functools.partial(run, **rest), data, device, gradient=device == "cuda")  # it has none on a CPU


def contenders(small: bool) -> dict[str, Callable[[Data], Runner]]:
    """Everyone, by name; each raises Refused for a case that it does not compute."""
    ours = {f"jaxlm {name}": functools.partial(of_jaxlm, name) for name in IMPLS}
    return ours | {
        "jax cudnn": functools.partial(of_jax_nn, "cudnn"),
        "jax xla": functools.partial(of_jax_nn, "xla"),
        "torch sdpa": functools.partial(of_sdpa, small),
        "torch flex": functools.partial(of_flex, small),
    }
