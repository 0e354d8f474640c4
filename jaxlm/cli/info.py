"""`jaxlm info`: what a checkpoint holds, from its config and the headers of its files; no weights are read."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from jaxlm.cli.console import IgnoreFields, Source, count, facts, out, size, table

Stored = dict[str, tuple[str, tuple[int, ...], int, str]]  # tensor -> type, shape, bytes, file


def info(
    source: Source,
    /,
    *,
    params: Annotated[bool, tyro.conf.arg(help="also list every tensor")] = False,
    ignore_fields: IgnoreFields = (),
) -> int:
    """Says what a checkpoint holds: architecture, kinds of layers, parameters, context length, tokenizer.

    Reads the config and the headers of the files, never the weights.

    Example: jaxlm info SmolLM2.gguf --params
    """
    from jaxlm.checkpoints.gguf import GgufSource
    from jaxlm.checkpoints.opening import open_checkpoint

    with open_checkpoint(Path(source)) as checkpoint:
        config = checkpoint.family.config(checkpoint.hf_config, ignore_fields)
        stored = gguf_tensors(checkpoint.source) if isinstance(checkpoint.source, GgufSource) else tensors(checkpoint.source)
        described = [
            ("architecture", f"{checkpoint.family.name}: {checkpoint.family.summary}"),
            *architecture(config),
            ("parameters", count(sum(math.prod(shape) for _, shape, _, _ in stored.values()))),
            ("tokenizer", tokenizer(checkpoint)),
        ]
    out.print(facts(described), highlight=False)
    out.print()
    out.print(by_type(stored), highlight=False)
    if params:
        out.print()
        out.print(every(stored), highlight=False)
    return 0


def architecture(config: Any) -> Iterator[tuple[str, str]]:
    """What the config of a decoder says, in words."""
    a = config.attention
    yield "layers", f"{len(config.kinds)}: {kinds(config.kinds)}"
    yield "context", f"{config.context:,} tokens"
    yield "vocabulary", f"{config.vocab_size:,} tokens, {'tied' if config.tie_embeddings else 'untied'} head"
    yield "width", f"{config.d_model}; {a.n_heads} heads of {a.head_dim}, {a.n_kv_heads} for keys and values"
    if config.mlp is not None:
        yield "feed-forward", f"{config.mlp.d_ff}{', gated' if config.mlp.gated else ''}, {config.mlp.act}"
    if config.moe is not None:
        yield "experts", f"{config.moe.n_experts} of {config.moe.expert.d_ff}, {config.moe.top_k} for each token"


def kinds(layers: tuple[Any, ...]) -> str:
    """'15 attention, window 512, rope theta 10000; 3 attention, rope theta 1e+06'."""
    counts = {kind: layers.count(kind) for kind in dict.fromkeys(layers)}
    return "; ".join(f"{n} x {describe(kind)}" for kind, n in counts.items())


def describe(kind: Any) -> str:
    words = [kind.mixer]
    if kind.mlp != "dense":
        words.append("experts" if kind.mlp == "moe" else kind.mlp)
    if kind.window is not None:
        words.append(f"window {kind.window}")
    if kind.rope is not None:
        scaling = "" if kind.rope.scaling == "default" else f" ({kind.rope.scaling})"
        words.append(f"rope {kind.rope.theta:g}{scaling}")
    return ", ".join(words)


def tensors(source) -> Stored:
    """What a safetensors checkpoint stores."""
    return {
        name: (t.dtype.name, tuple(t.shape), t.dtype.itemsize * math.prod(t.shape), t.file)
        for name, t in source.tensors.items()
    }


def gguf_tensors(source) -> Stored:
    """What a GGUF file stores, in its own names and quantized types."""
    file = source.file
    return {
        name: (t.type.name, t.shape, t.lines * t.line_bytes, file.path.name) for name, t in file.tensors.items()
    }


def by_type(stored: Stored) -> Table:
    """Tensors, parameters and bytes for each type of storage."""
    made = table("stored as", ">tensors", ">parameters", ">bytes")
    for kind in dict.fromkeys(kind for kind, *_ in stored.values()):
        mine = [(shape, n_bytes) for k, shape, n_bytes, _ in stored.values() if k == kind]
        values = count(sum(math.prod(shape) for shape, _ in mine))
        made.add_row(kind, str(len(mine)), values, size(sum(n for _, n in mine)))
    return made


def every(stored: Stored) -> Table:
    """One line for each tensor."""
    made = table("tensor", "type", "shape", ">bytes", "file")
    for name, (kind, shape, n_bytes, file) in stored.items():
        made.add_row(name, kind, " x ".join(map(str, shape)), size(n_bytes), file)
    return made
